#!/usr/bin/env bash
# Lint, types and all tests, in an environment that this makes where it is needed. Words are passed on to pytest.
#
#   ./tests/run.sh                     everything
#   ./tests/run.sh tests/data -k pack  a part of the tests, after lint and types
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$here/launch/environment.sh"
cd "$here"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$DSCL_PYTHON" -m ruff check .
"$DSCL_PYTHON" -m ruff format --check .
"$DSCL_PYTHON" -m mypy
"$DSCL_PYTHON" -m pytest "$@"
