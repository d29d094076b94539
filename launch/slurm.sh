#!/usr/bin/env bash
#SBATCH --job-name=dscl
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dscl-%j.log
#SBATCH --signal=USR1@300
# dscl as a Slurm job: submits itself, and each task of the job is a rank. Run it where sbatch is.
#
#   NNODES=2 NPROC_PER_NODE=8 ./launch/slurm.sh RECIPE.yaml [key=value ...]
#
#   --dry-run        show the command, and submit nothing
#   --no-doctor      train without first seeing whether the machines are fit for it
#   NNODES           nodes (default: 1)
#   NPROC_PER_NODE   ranks on a node (default: 8, a GPU each)
#   SBATCH           further options of sbatch, e.g. "--partition=gpu --time=24:00:00 --cpus-per-task=12"
#   GPU_OPTION       how a node's GPUs are asked for (default: --gpus-per-node=NPROC_PER_NODE; "" where there are none)
#   MAX_RESTARTS     how often ranks that failed are started again (default: 3); they go on from the newest checkpoint
#
# The folder of dscl, the recipe's data, its cache and run_dir have to be on a file system that all nodes share. 300 s
# before the time limit (--signal), when the job is preempted, or by `scancel --signal=USR1 JOB`, the ranks save and the
# job goes back into the queue, to go on from there. `scancel JOB` ends it for good, at the newest checkpoint.
set -euo pipefail
home="${DSCL_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}" # a job runs a copy of this file, kept elsewhere
source "$home/launch/supervise.sh"

submit() {
    local nodes="${NNODES:-1}" ranks="${NPROC_PER_NODE:-8}"
    [ -n "$doctor" ] || words+=(--no-doctor)
    number NNODES "$nodes"
    number NPROC_PER_NODE "$ranks"
    # shellcheck disable=SC2206 # options, word by word
    local command=(
        sbatch "--nodes=$nodes" "--ntasks-per-node=$ranks" ${GPU_OPTION---gpus-per-node=$ranks} ${SBATCH:-}
        "--export=ALL,DSCL_HOME=$home,DSCL_JOB=1" "$home/launch/slurm.sh" "${words[@]}"
    )
    if [ -n "$dry" ]; then echo "${command[*]}"; else "${command[@]}"; fi
}

# In the job. Signals reach the ranks without this script, and dead ranks are noticed by the others.
run() {
    local left="${MAX_RESTARTS:-3}" status cancelled=""
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun asks for it anew
    trap : USR1
    trap 'left=0 cancelled=1' TERM
    source "$home/launch/environment.sh"
    source "$home/launch/nccl.env"
    while true; do
        status=0
        srun --kill-on-bad-exit=0 --wait=150 "$DSCL_PYTHON" -m dscl train "${words[@]}" ${doctor:+"$doctor"} || status=$?
        case "$status:$left" in
        75:*) [ -n "$cancelled" ] || scontrol requeue "$SLURM_JOB_ID" || true; exit 75 ;;
        0:* | 2:* | *:0) exit "$status" ;;
        esac
        echo "slurm.sh: ended with status $status; starting again (then $((left - 1)) times more)" >&2
        left=$((left - 1))
    done
}

options "$@"
if [ -n "${DSCL_JOB:-}" ] && [ -n "${SLURM_JOB_ID:-}" ]; then run; else submit; fi
