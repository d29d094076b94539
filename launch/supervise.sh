# Options and process supervision of the launch scripts, which source this file.
#
#   --dry-run       print the command, and do nothing
#   --no-doctor     train without `dscl doctor` before it
#   MAX_RESTARTS    how often failed ranks are started again (default: 3); they resume from the newest checkpoint
#
# On SIGTERM, SIGINT or SIGUSR1 a script passes the signal on to the ranks, which save and exit; on a second signal they
# exit at once. The script's exit status is then 75, and the same command resumes the run. Launchers report every status
# but 0 as a failure, so the ranks write a status that needs no restart to a file: 2 (wrong recipe, or run_dir was removed)
# or 75 (stopped on purpose).

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

# The ranks among this process and its descendants. A launcher sets LOCAL_RANK for ranks. The children of a rank are not
# searched.
ranks_of() {
    local child
    # Not a pipe: its writer would fail when grep exits early, and the pipeline with it (pipefail).
    if grep -qz '^LOCAL_RANK=' "/proc/$1/environ" 2>/dev/null; then
        echo "$1"
        return
    fi
    for child in $(cat "/proc/$1/task"/*/children 2>/dev/null); do
        ranks_of "$child"
    done
}

# Signal the ranks, also those that start later: a launcher restarts a rank that the signal killed during its start.
pass_on() {
    heard=$((heard + 1)) signal="$1" told=" "
    [ "$launcher" != 0 ] || return 0 # nothing is running
    [ -n "$(ranks_of "$launcher")" ] || early=1
    tell_ranks
    if [ -n "$early" ] || [ "$heard" -gt 1 ]; then # otherwise the launcher waits for others, or restarts ranks
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

# Run a launcher to its end. Only the ranks get the signal: a launcher that gets it kills them, and fails.
run_once() {
    local status=0 told_status
    [ "$heard" = 0 ] || return 75
    DSCL_STATUS_TO="$(mktemp)" || wrong "no temporary file can be made; make room in ${TMPDIR:-/tmp}"
    export DSCL_STATUS_TO
    set -m # in its own process group, so that Ctrl-C reaches only this script
    "$@" &
    launcher=$!
    set +m
    wait "$launcher" || status=$?
    while [ "$heard" -gt 0 ] && kill -0 "$launcher" 2>/dev/null; do # a signal ended the wait
        tell_ranks
        sleep 1
    done
    [ "$heard" = 0 ] || { status=0; wait "$launcher" || status=$?; }
    told_status="$(<"$DSCL_STATUS_TO")"
    rm -f "$DSCL_STATUS_TO"
    # A rank that its launcher stops because another rank failed also writes 75.
    if [ "$told_status" = 2 ] || { [ "$told_status" = 75 ] && { [ "$status" = 0 ] || [ "$heard" -gt 0 ]; }; }; then
        status="$told_status"
    elif [ -n "$early" ] && [ "$status" != 0 ]; then
        status=75
    fi
    return "$status"
}

# launch RESTARTS COMMAND...: run a launcher that does not restart failed ranks itself.
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
