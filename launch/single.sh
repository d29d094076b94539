#!/usr/bin/env bash
# Train on this machine, with a rank for each GPU.
#
#   ./launch/single.sh RECIPE.yaml [key=value ...]
#
#   --dry-run        print the command, and do nothing
#   --no-doctor      train without `dscl doctor` before it
#   NPROC_PER_NODE   ranks (default: one for each GPU, or one)
#   MAX_RESTARTS     how often failed ranks are started again (default: 3); they resume from the newest checkpoint
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$here/launch/supervise.sh"
options "$@"
[ -n "$dry" ] && DSCL_PYTHON=python || source "$here/launch/environment.sh"
export LOCAL_RANK=0 # so that this script passes signals on to dscl, which passes them on to its ranks
launch "${MAX_RESTARTS:-3}" "$DSCL_PYTHON" -m dscl train "${words[@]}" ${doctor:+"$doctor"} --nproc "${NPROC_PER_NODE:-auto}"
