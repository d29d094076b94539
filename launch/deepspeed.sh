#!/usr/bin/env bash
# dscl on the nodes of a hostfile by DeepSpeed's launcher.
#
#   HOSTFILE=hostfile ./launch/deepspeed.sh RECIPE.yaml [key=value ...]      on one node, which reaches the others by ssh
#   HOSTFILE=hostfile NODE_RANK=0 MASTER_ADDR=node0 ./launch/deepspeed.sh RECIPE.yaml [key=value ...]
#                                                                            on every node, without ssh
#
#   --dry-run        show the command, and do nothing
#   --no-doctor      train without first seeing whether the machines are fit for it
#   HOSTFILE         a line for each node, its name and its ranks, as in launch/hostfile.sample
#   NODE_RANK        this node's number, from 0, in the hostfile's order; set, nothing is done by ssh
#   MASTER_ADDR      the address of the node with number 0; needed where NODE_RANK is set
#   MASTER_PORT      its port (default: 29500)
#   MAX_RESTARTS     how often ranks that failed are started again (default: 3); they go on from the newest checkpoint
#
# By ssh the launcher needs pdsh, this folder and its .venv at the same path on all nodes; and a signal here does not
# reach the ranks: to stop the job, send one to the process that RUN_DIR/.lock names, on the host that it names.
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
if [ -z "${NODE_RANK:-}$dry" ]; then # of what is set here, ssh takes along what this file says
    DS_ENV_FILE="$(mktemp)"
    trap 'rm -f "$DS_ENV_FILE"' EXIT
    env | grep -E '^(DSCL|DEEPSPEED|DS|TORCH|PYTORCH|NCCL|GLOO|OMP)_' | grep -v '^DSCL_STATUS_TO' >"$DS_ENV_FILE" || true
    export DS_ENV_FILE
fi
launch "${MAX_RESTARTS:-3}" "$DSCL_PYTHON" "${command[@]}"
