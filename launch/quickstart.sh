#!/usr/bin/env bash
# From an empty machine to a score matrix: install the packages, make five small text tasks with a tokenizer and a
# briefly pretrained LLaMA (once), and fine-tune the LLaMA on one task after another with two ranks under ZeRO 3.
#
#   ./launch/quickstart.sh [--dry-run] [--out DIR] [--seed N] [--fresh] [key=value ...]
#
#   --dry-run   print the commands, and do nothing
#   --out DIR   folder of the stage and the run (default: out in the repository)
#   --seed N    seed of the language, the tasks and the order of samples (default: 0)
#   --fresh     remove the run of an earlier start; otherwise that run is resumed, or shown if it is complete
#   key=value   overrides of launch/recipes/quickstart.yaml, for example train.lr=3e-4
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="$here/out" seed=0 fresh="" dry="" overrides=()

wrong() {
    echo "quickstart: $*; see --help" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case "$1" in
    --out) [ $# -ge 2 ] || wrong "--out: a folder is needed"; out="$(realpath -m "$2")"; shift ;;
    --seed) [[ "${2:-}" =~ ^[0-9]+$ ]] || wrong "--seed: given '${2:-}'; a whole number of at least 0 is needed"; seed="$2"; shift ;;
    --fresh) fresh=1 ;;
    --dry-run) dry=1 ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *=*) overrides+=("$1") ;;
    *) wrong "$1: not understood; allowed: --dry-run, --out, --seed, --fresh, --help, key=value" ;;
    esac
    shift
done

do_it() {
    if [ -n "$dry" ]; then echo "$*"; else "$@"; fi
}

[ -n "$dry" ] && DSCL_PYTHON=python || source "$here/launch/environment.sh"
cd "$here"
stage="$out/stage-$seed" run="$out/quickstart-$seed"
[ -z "$fresh" ] || do_it rm -rf "$run"
do_it "$DSCL_PYTHON" tools/make_stage.py --out "$stage" --seed "$seed"

gpus="$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)"
[ "$gpus" = 1 ] && ranks=1 || ranks=2
paths=("model.name=$stage/model") number=0
for task in kind mood nation land tense; do
    paths+=("stream.$number.path=$stage/$task")
    number=$((number + 1))
done
do_it exec "$DSCL_PYTHON" -m dscl train launch/recipes/quickstart.yaml --nproc "$ranks" \
    "run_dir=$run" "seed=$seed" "data.cache_dir=$out/cache" "${paths[@]}" ${overrides[@]+"${overrides[@]}"}
