#!/usr/bin/env bash
# Train on the nodes of a hostfile with DeepSpeed's launcher.
#
#   HOSTFILE=hostfile ./launch/deepspeed.sh RECIPE.yaml [key=value ...]      on one node, which reaches the others by ssh
#   HOSTFILE=hostfile NODE_RANK=0 MASTER_ADDR=node0 ./launch/deepspeed.sh RECIPE.yaml [key=value ...]
#                                                                            on every node, without ssh
#
#   --dry-run        print the command, and do nothing
#   --no-doctor      train without `dscl doctor` before it
#   HOSTFILE         a file with a line for each node, its name and number of ranks, as in launch/hostfile.sample
#   NODE_RANK        this node's number in the hostfile, from 0; if set, ssh is not used
#   MASTER_ADDR      the address of node 0; needed if NODE_RANK is set
#   MASTER_PORT      the port on node 0 (default: 29500)
#   MAX_RESTARTS     how often failed ranks are started again (default: 3); they resume from the newest checkpoint
#
# With ssh, the launcher needs pdsh, and this repository with its .venv at the same path on all nodes. A signal to this
# script does not reach the ranks then. To stop the job, send the signal to the process that RUN_DIR/.lock names, on the
# host that it names.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$here/launch/supervise.sh"
options "$@"

[ -n "${HOSTFILE:-}" ] || wrong "HOSTFILE: not set; name a file like launch/hostfile.sample"
[ -f "$HOSTFILE" ] || wrong "HOSTFILE: $HOSTFILE is not there; name a file like launch/hostfile.sample"
command=(-m deepspeed.launcher.runner --hostfile "$(realpath "$HOSTFILE")" --master_port "${MASTER_PORT:-29500}")
if [ -n "${NODE_RANK:-}" ]; then
    number NODE_RANK "$NODE_RANK"
    [ -n "${MASTER_ADDR:-}" ] || wrong "MASTER_ADDR: not set, with NODE_RANK=$NODE_RANK; give the address of node 0"
    command+=(--no_ssh --node_rank "$NODE_RANK")
fi
[ -z "${MASTER_ADDR:-}" ] || command+=(--master_addr "$MASTER_ADDR")
command+=(--module dscl train "${words[@]}" ${doctor:+"$doctor"})

[ -n "$dry" ] && DSCL_PYTHON=python || source "$here/launch/environment.sh"
source "$here/launch/nccl.env"
if [ -z "${NODE_RANK:-}$dry" ]; then # ssh passes on only the variables in this file
    DS_ENV_FILE="$(mktemp)"
    trap 'rm -f "$DS_ENV_FILE"' EXIT
    env | grep -E '^(DSCL|DEEPSPEED|DS|TORCH|PYTORCH|NCCL|GLOO|OMP)_' | grep -v '^DSCL_STATUS_TO' >"$DS_ENV_FILE" || true
    export DS_ENV_FILE
fi
launch "${MAX_RESTARTS:-3}" "$DSCL_PYTHON" "${command[@]}"
