#!/usr/bin/env bash
# Lint, types and tests, in an environment that this makes where it is needed.
#
#   ./tests/run.sh                     the fast suite: what every change has to pass (at most 15 minutes on two cores)
#   ./tests/run.sh --all [--fresh]     the exhaustive suite, file by file; started again, it goes on where it stopped
#   ./tests/run.sh tests/data -k pack  a part of the tests; words are passed on to pytest
#
# What runs when, and what covers it in the fast suite: tests/README.md.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$here/launch/environment.sh"
cd "$here"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$DSCL_PYTHON" -m ruff check .
"$DSCL_PYTHON" -m ruff format --check .
"$DSCL_PYTHON" -m mypy
exec "$DSCL_PYTHON" -m tests.support.suite "$@"
