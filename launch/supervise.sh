# What the scripts beside this one share: their options, and how they look after what they start. Sourced by them.
#
#   --dry-run       show the command, and do nothing
#   --no-doctor     train without first seeing whether the machines are fit for it
#   MAX_RESTARTS    how often ranks that failed are started again (default: 3); they go on from the newest checkpoint
#
# Told to stop (SIGTERM, SIGINT, SIGUSR1), a script passes that on to the ranks, which save and leave; told again, they
# leave at once. Its exit status is then 75, and the same command goes on. What no restart mends (status 2: the recipe is
# wrong, or run_dir was removed; 75: stopped on purpose) the ranks write down in a file, since launchers call every status
# but 0 a failure.

dry="" doctor="--doctor" words=() launcher=0 heard=0 signal="" told="" early=""

wrong() {
    echo "$(basename "$0"): $*; see --help" >&2
    exit 2
}

options() {
    local word
    for word in "$@"; do
        case "$word" in
        --dry-run) dry=1 ;;
        --no-doctor) doctor="" ;;
        -h | --help) sed -n '2,/^set /{/^set /d;/^#SBATCH/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        -*) wrong "$word: not understood; allowed: --dry-run, --no-doctor, --help, a recipe, key=value" ;;
        *) words+=("$word") ;;
        esac
    done
    [ ${#words[@]} -gt 0 ] || wrong "no recipe given; give RECIPE.yaml"
    number MAX_RESTARTS "${MAX_RESTARTS:-3}"
}

number() {
    [[ "$2" =~ ^[0-9]+$ ]] || wrong "$1: given '$2'; a whole number is needed"
}

gpus() {
    nvidia-smi -L 2>/dev/null | grep -c GPU || true
}

# Of this process and those below it, the ones that are ranks: a launcher gives them LOCAL_RANK, and they have helpers of
# their own.
ranks_of() {
    local child
    # Not by a pipe: what writes into it fails where grep has found the word early, and with it all (pipefail).
    if grep -qz '^LOCAL_RANK=' "/proc/$1/environ" 2>/dev/null; then
        echo "$1"
        return
    fi
    for child in $(cat "/proc/$1/task"/*/children 2>/dev/null); do
        ranks_of "$child"
    done
}

# Tell the ranks, those too that come up later: a launcher starts a rank again that the signal has killed in its cradle.
pass_on() {
    heard=$((heard + 1)) signal="$1" told=" "
    [ "$launcher" != 0 ] || return 0 # nothing has been started
    [ -n "$(ranks_of "$launcher")" ] || early=1
    tell_ranks
    if [ -n "$early" ] || [ "$heard" -gt 1 ]; then # else it waits for others, or starts ranks again
        kill -TERM -- "-$launcher" 2>/dev/null || true
    fi
}

tell_ranks() {
    local rank
    for rank in $(ranks_of "$launcher"); do
        [[ "$told" == *" $rank "* ]] || kill "-$signal" "$rank" 2>/dev/null || true
        told+="$rank "
    done
}

# Run a launcher to its end. Only the ranks are told to stop: a launcher that is told kills them, and fails.
run_once() {
    local status=0 told_status
    [ "$heard" = 0 ] || return 75
    DSCL_STATUS_TO="$(mktemp)" || wrong "no temporary file can be made; make room in ${TMPDIR:-/tmp}"
    export DSCL_STATUS_TO
    set -m # in a process group of its own, so that a Ctrl-C comes only here
    "$@" &
    launcher=$!
    set +m
    wait "$launcher" || status=$?
    while [ "$heard" -gt 0 ] && kill -0 "$launcher" 2>/dev/null; do # it was a signal that ended the waiting
        tell_ranks
        sleep 1
    done
    [ "$heard" = 0 ] || { status=0; wait "$launcher" || status=$?; }
    told_status="$(<"$DSCL_STATUS_TO")"
    rm -f "$DSCL_STATUS_TO"
    # A rank that its launcher ends because another one failed says 75 as well.
    if [ "$told_status" = 2 ] || { [ "$told_status" = 75 ] && { [ "$status" = 0 ] || [ "$heard" -gt 0 ]; }; }; then
        status="$told_status"
    elif [ -n "$early" ] && [ "$status" != 0 ]; then
        status=75
    fi
    return "$status"
}

# launch RESTARTS COMMAND...: for launchers that do not start failed ranks again themselves.
launch() {
    local left="$1" status
    shift
    if [ -n "$dry" ]; then
        echo "$*"
        return
    fi
    trap 'pass_on TERM' TERM
    trap 'pass_on TERM' HUP
    trap 'pass_on INT' INT
    trap 'pass_on USR1' USR1
    while true; do
        status=0
        run_once "$@" || status=$?
        case "$status:$left:$heard" in
        0:* | 2:* | 75:* | *:0:* | *:*:[1-9]*) return "$status" ;;
        esac
        echo "$(basename "$0"): ended with status $status; starting again (then $((left - 1)) times more)" >&2
        left=$((left - 1))
    done
}
