# Set up dscl's Python environment. Scripts source this file and then call $DSCL_PYTHON.
#
# A Python that has every package at the version in launch/constraints.txt is used as it is. Otherwise .venv is made in
# the repository: first torch at its exact version, then the rest. A second start reuses .venv.
#
#   PYTHON             the interpreter to use, or to make .venv with (default: the first python3 from 3.10 on)
#   DSCL_TORCH_INDEX   a package index for torch, for example one with the smaller CPU-only builds; the default is the
#                      usual index, whose build runs on GPUs and CPUs
#   DSCL_VENV          folder of the environment (default: .venv)

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

# Does this interpreter have all packages at the right versions, and a torch build that supports the machine's GPUs?
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
    # DeepSpeed's setup imports the installed torch, so its build is not isolated and needs these two packages.
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
            flock 9 # two concurrent starts install only once
            dscl_satisfied "$DSCL_VENV/bin/python" 2>/dev/null || dscl_install "$base"
        ) 9>"$DSCL_VENV.lock" || dscl_stop "the installation failed; its last lines above say why. Run the same command again to go on"
        base="$DSCL_VENV/bin/python"
        local why
        why="$(dscl_satisfied "$base" 2>&1)" || dscl_stop "the environment in $DSCL_VENV is not right ($why); remove it and run again"
    fi
    export DSCL_PYTHON="$base" PATH="$(dirname "$base"):$PATH" PYTHONPATH="$DSCL_HOME${PYTHONPATH:+:$PYTHONPATH}"
    # Extensions are built for this environment's torch. Environments that shared a folder would rebuild each other's.
    [ "$base" != "$DSCL_VENV/bin/python" ] || export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$DSCL_VENV/torch_extensions}"
    if ! grep -q GPU <<<"$(nvidia-smi -L 2>/dev/null)"; then # not a pipe: it would fail when grep exits early (pipefail)
        export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    fi
    command -v "${CXX:-c++}" >/dev/null ||
        dscl_stop "no C++ compiler found (${CXX:-c++}), and DeepSpeed builds a small extension with it; install g++ or set CXX"
}

dscl_environment
