#!/usr/bin/env bash
#SBATCH --job-name=dscl
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dscl-%j.log
#SBATCH --signal=B:USR1@300
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
#   DSCL_CACHE       where prepared data are kept, seen by all nodes (default: .cache in the folder of dscl)
#   MAX_RESTARTS     how often ranks that failed are started again (default: 3); they go on from the newest checkpoint
#
# The folder of dscl, the recipe's data and run_dir have to be on a file system that all nodes share. 300 s before the
# time limit (--signal, of which the B: tells this script, and it the ranks) or when the job is preempted, the ranks save
# and the job goes back into the queue, to go on from there; so it does by `scancel --batch --signal=USR1 JOB`, even if
# they do not save in time. `scancel JOB` ends it for good, at the newest checkpoint.
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

# In the job. Dead ranks are noticed by the others.
run() {
    local left="${MAX_RESTARTS:-3}" status cancelled=""
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun asks for it anew
    trap announce USR1
    trap 'left=0 cancelled+=1' TERM
    source "$home/launch/environment.sh"
    source "$home/launch/nccl.env"
    # Data are prepared once for all nodes: they see this folder, and need not see anybody's own.
    [ ! -w "$home" ] || export DSCL_CACHE="${DSCL_CACHE:-$home/.cache}"
    while true; do
        status=75
        if [ "$heard" = 0 ]; then status=0; step || status=$?; fi
        case "$status" in 0 | 2) exit "$status" ;; esac
        # The end that was announced comes, and is not announced again: what fails now has no time for another start.
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
    [ "$launcher" = 0 ] || kill -USR1 "$launcher" 2>/dev/null || true # srun passes it on to the ranks
}

# The ranks, to their end. In the background, since a shell hears nothing while it waits for what is not.
step() {
    local status before=-1
    srun --kill-on-bad-exit=0 --wait=150 "$DSCL_PYTHON" -m dscl train "${words[@]}" ${doctor:+"$doctor"} &
    launcher=$!
    while [ "$before" != "$heard$cancelled" ]; do # it was a signal that ended the waiting
        before="$heard$cancelled" status=0
        wait "$launcher" || status=$?
    done
    launcher=0
    return "$status"
}

options "$@"
if [ -n "${DSCL_JOB:-}" ] && [ -n "${SLURM_JOB_ID:-}" ]; then run; else submit; fi
