# The environment that dscl runs in: sourced by launch/quickstart.sh and tests/run.sh, which then call $DSCL_PYTHON.
#
# If the Python at hand has every package at the version of launch/constraints.txt, it is used as it is. Otherwise .venv
# is made beside this folder: torch first, by its exact version, then the rest. A second start finds it done.
#
#   PYTHON             the interpreter to use or to build .venv with (default: the first python3 that is new enough)
#   DSCL_TORCH_INDEX   a package index to take torch from, for example one with CPU-only builds, which are smaller; by
#                      default the usual index decides, and its build serves GPUs and CPUs alike
#   DSCL_VENV          where the environment is made (default: .venv)

DSCL_HOME="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
DSCL_VENV="${DSCL_VENV:-$DSCL_HOME/.venv}"

dscl_stop() {
    echo "dscl: $*" >&2
    exit 2
}

dscl_find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Does this interpreter have all that is needed, at the right versions, and a torch that suits the machine?
dscl_satisfied() {
    "$1" - "$DSCL_HOME/launch/constraints.txt" "$(command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

NEEDED = "torch deepspeed transformers peft datasets sentencepiece tensorboard pyyaml pytest pytest-timeout pytest-xdist ruff mypy types-pyyaml kubeflow-trainer-api".split()
old = sys.version_info < (3, 11)
wanted = {}
for line in open(sys.argv[1], encoding="utf-8"):
    pin, _, marker = line.partition(";")
    if "==" in pin and (not marker or (">=" in marker) != old):
        name, _, number = pin.strip().partition("==")
        wanted[name.lower().replace("_", "-")] = number
for name in NEEDED:
    try:
        found = version(name)
    except PackageNotFoundError:
        sys.exit(f"{name} is not installed")
    if found.partition("+")[0] != wanted[name]:
        sys.exit(f"{name} is {found}, wanted {wanted[name]}")
if int(sys.argv[2] or 0) and version("torch").endswith("+cpu"):
    sys.exit("torch is a CPU build on a machine with a GPU")
PYTHON
}

dscl_install() {
    local python="$DSCL_VENV/bin/python" started=$SECONDS
    if [ ! -x "$python" ]; then
        echo "dscl: making $DSCL_VENV with $("$1" --version)" >&2
        "$1" -m venv "$DSCL_VENV" || dscl_stop "$1 cannot make a virtual environment; install its venv module (python3-venv)"
    fi
    echo "dscl: installing torch, then the rest (some minutes; once)" >&2
    "$python" -m pip install -q --disable-pip-version-check ${DSCL_TORCH_INDEX:+--index-url "$DSCL_TORCH_INDEX"} \
        "$(grep '^torch==' "$DSCL_HOME/launch/constraints.txt")" || return 1
    # DeepSpeed's own setup looks at the torch that is there, so no isolated build; it needs these two for that.
    "$python" -m pip install -q --disable-pip-version-check setuptools wheel || return 1
    (cd "$DSCL_HOME" && "$python" -m pip install -q --disable-pip-version-check --no-build-isolation \
        -c launch/constraints.txt -e ".[test]") || return 1
    echo "dscl: installed in $((SECONDS - started)) s" >&2
}

dscl_environment() {
    local base
    base="$(dscl_find_python)" ||
        dscl_stop "no Python of version 3.10 or newer found (${PYTHON:-python3}); install one, or set PYTHON to its path"
    if ! dscl_satisfied "$base" 2>/dev/null; then
        (
            flock 9 # two starts at once install once
            dscl_satisfied "$DSCL_VENV/bin/python" 2>/dev/null || dscl_install "$base"
        ) 9>"$DSCL_VENV.lock" || dscl_stop "the installation failed; its last lines above say why. Run the same command again to go on"
        base="$DSCL_VENV/bin/python"
        local why
        why="$(dscl_satisfied "$base" 2>&1)" || dscl_stop "the environment in $DSCL_VENV is not right ($why); remove it and run again"
    fi
    export DSCL_PYTHON="$base" PATH="$(dirname "$base"):$PATH" PYTHONPATH="$DSCL_HOME${PYTHONPATH:+:$PYTHONPATH}"
    # Built for this environment's torch; another environment's build would be thrown away, and throw this one away.
    [ "$base" != "$DSCL_VENV/bin/python" ] || export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$DSCL_VENV/torch_extensions}"
    if ! grep -q GPU <<<"$(nvidia-smi -L 2>/dev/null)"; then # a pipe that grep leaves early would fail (pipefail)
        export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    fi
    command -v "${CXX:-c++}" >/dev/null ||
        dscl_stop "no C++ compiler found (${CXX:-c++}), and DeepSpeed builds a small extension with it; install g++ or set CXX"
}

dscl_environment
