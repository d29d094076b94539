#!/usr/bin/env bash
# Train on one or several nodes with torchrun. Run the same command on every node.
#
#   ./launch/torchrun.sh RECIPE.yaml [key=value ...]                                            one node
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 ./launch/torchrun.sh RECIPE.yaml [key=value ...]     each of two nodes
#
#   --dry-run        print the command, and do nothing
#   --no-doctor      train without `dscl doctor` before it
#   NNODES           nodes (default: 1), or a range like 2:4
#   NODE_RANK        this node's number; node 0 hosts the rendezvous (default: the node with MASTER_ADDR hosts it)
#   MASTER_ADDR      the node that hosts the rendezvous, one of the nodes; needed with several nodes
#   MASTER_PORT      the port of the rendezvous (default: 29400)
#   LOCAL_ADDR       this node's address, if its name does not resolve to it
#   RDZV_ID          the job's name, if several jobs use one rendezvous address (default: dscl)
#   NPROC_PER_NODE   ranks on this node (default: one for each GPU, or one)
#   MAX_RESTARTS     how often failed ranks are started again (default: 3); they resume from the newest checkpoint
#
# Kubeflow's variables (PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT, PET_NPROC_PER_NODE) are defaults.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$here/launch/supervise.sh"
options "$@"

for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT NPROC_PER_NODE; do
    pet="PET_$name"
    [ -n "${!name:-}" ] || printf -v "$name" %s "${!pet:-}"
done
[[ "${NNODES:=1}" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || wrong "NNODES: given '$NNODES'; a number, or a range like 2:4, is needed"
case "${NPROC_PER_NODE:-auto}" in
auto | gpu) NPROC_PER_NODE="$(gpus)"; [ "$NPROC_PER_NODE" != 0 ] || NPROC_PER_NODE=1 ;;
*) number NPROC_PER_NODE "$NPROC_PER_NODE" ;;
esac
place=(--standalone)
if [ "$NNODES" != 1 ]; then
    [ -n "$MASTER_ADDR" ] || wrong "MASTER_ADDR: not set, with NNODES=$NNODES; give the address of one of the nodes"
    place=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}" --rdzv-id "${RDZV_ID:-dscl}")
    # torchrun finds the host of the rendezvous by name and address. In containers these may be wrong; NODE_RANK is not.
    [ -z "$NODE_RANK" ] || place+=(--rdzv-conf "is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)")
    [ -z "${LOCAL_ADDR:-}" ] || place+=(--local-addr "$LOCAL_ADDR")
fi
command=(
    -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" "${place[@]}"
    --max-restarts "${MAX_RESTARTS:-3}" -m dscl train "${words[@]}" ${doctor:+"$doctor"}
)
unset "${!PET_@}" # torchrun would read them as options

[ -n "$dry" ] && DSCL_PYTHON=python || source "$here/launch/environment.sh"
source "$here/launch/nccl.env"
# Ranks agree on a new TCP store at every restart, since the node that hosted the old one may be gone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
launch 0 "$DSCL_PYTHON" "${command[@]}"
