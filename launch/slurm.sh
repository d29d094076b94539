#!/usr/bin/env bash
#SBATCH --job-name=dscl
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dscl-%j.log
#SBATCH --signal=B:USR1@300
# Train as a Slurm job. The script submits itself with sbatch, and each task of the job is a rank.
#
#   NNODES=2 NPROC_PER_NODE=8 ./launch/slurm.sh RECIPE.yaml [key=value ...]
#
#   --dry-run        print the command, and submit nothing
#   --no-doctor      train without `dscl doctor` before it
#   NNODES           nodes (default: 1)
#   NPROC_PER_NODE   ranks on a node (default: 8, a GPU each)
#   SBATCH           further options of sbatch, e.g. "--partition=gpu --time=24:00:00 --cpus-per-task=12"
#   GPU_OPTION       sbatch's option for a node's GPUs (default: --gpus-per-node=NPROC_PER_NODE; "" for no GPUs)
#   DSCL_CACHE       folder of prepared data, shared by all nodes (default: .cache in the repository)
#   MAX_RESTARTS     how often failed ranks are started again (default: 3); they resume from the newest checkpoint
#
# Nodes must share the file system of this repository, the recipe's data and run_dir. Slurm signals this script 300 s
# before the time limit (--signal=B:...) and when it preempts the job; the script passes the signal on to the ranks. The
# ranks save, and the job goes back into the queue and resumes later, also if they do not save in time. A user does the
# same with `scancel --batch --signal=USR1 JOB`. `scancel JOB` ends the job for good; the newest checkpoint remains.
set -euo pipefail
home="${DSCL_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}" # Slurm runs a copy of this file from another folder
source "$home/launch/supervise.sh"

submit() {
    local nodes="${NNODES:-1}" ranks="${NPROC_PER_NODE:-8}"
    [ -n "$doctor" ] || words+=(--no-doctor)
    number NNODES "$nodes"
    number NPROC_PER_NODE "$ranks"
    # shellcheck disable=SC2206 # options, split at spaces
    local command=(
        sbatch "--nodes=$nodes" "--ntasks-per-node=$ranks" ${GPU_OPTION---gpus-per-node=$ranks} ${SBATCH:-}
        "--export=ALL,DSCL_HOME=$home,DSCL_JOB=1" "$home/launch/slurm.sh" "${words[@]}"
    )
    if [ -n "$dry" ]; then echo "${command[*]}"; else "${command[@]}"; fi
}

# Run the job. Ranks detect the death of another rank themselves.
run() {
    local left="${MAX_RESTARTS:-3}" status cancelled=""
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun needs it again
    trap announce USR1
    trap 'left=0 cancelled+=1' TERM
    source "$home/launch/environment.sh"
    source "$home/launch/nccl.env"
    # Data are prepared once for all nodes in this shared folder; home folders may not be shared.
    [ ! -w "$home" ] || export DSCL_CACHE="${DSCL_CACHE:-$home/.cache}"
    while true; do
        status=75
        if [ "$heard" = 0 ]; then status=0; step || status=$?; fi
        case "$status" in 0 | 2) exit "$status" ;; esac
        # After the signal the job ends soon, and Slurm sends no second signal, so there is no time for another start.
        if [ "$status" = 75 ] || [ "$heard" != 0 ]; then
            [ -n "$cancelled" ] || scontrol requeue "$SLURM_JOB_ID" || true
            exit "$status"
        fi
        [ "$left" != 0 ] || exit "$status"
        echo "slurm.sh: ended with status $status; starting again (then $((left - 1)) times more)" >&2
        left=$((left - 1))
    done
}

announce() {
    heard=$((heard + 1))
    [ "$launcher" = 0 ] || kill -USR1 "$launcher" 2>/dev/null || true # srun passes the signal on to the ranks
}

# Run the ranks to their end. They run in the background, as bash handles signals only during `wait`.
step() {
    local status before=-1
    srun --kill-on-bad-exit=0 --wait=150 "$DSCL_PYTHON" -m dscl train "${words[@]}" ${doctor:+"$doctor"} &
    launcher=$!
    while [ "$before" != "$heard$cancelled" ]; do # a signal ended the wait
        before="$heard$cancelled" status=0
        wait "$launcher" || status=$?
    done
    launcher=0
    return "$status"
}

options "$@"
if [ -n "${DSCL_JOB:-}" ] && [ -n "${SLURM_JOB_ID:-}" ]; then run; else submit; fi
