#!/usr/bin/env bash
# dscl on this machine alone, with a rank for each GPU.
#
#   ./launch/single.sh RECIPE.yaml [key=value ...]
#
#   --dry-run        show the command, and do nothing
#   --no-doctor      train without first seeing whether the machines are fit for it
#   NPROC_PER_NODE   ranks (default: one for each GPU, or one)
#   MAX_RESTARTS     how often ranks that failed are started again (default: 3); they go on from the newest checkpoint
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$here/launch/supervise.sh"
options "$@"
[ -n "$dry" ] && DSCL_PYTHON=python || source "$here/launch/environment.sh"
export LOCAL_RANK=0 # so that a signal is passed on to it, and by it to its ranks
launch "${MAX_RESTARTS:-3}" "$DSCL_PYTHON" -m dscl train "${words[@]}" ${doctor:+"$doctor"} --nproc "${NPROC_PER_NODE:-auto}"
