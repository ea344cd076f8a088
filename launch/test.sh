#!/usr/bin/env bash
# Runs the tests, one file per core at a time; arguments go to pytest. Python >= 3.11.
# Usage: launch/test.sh [--fast] [PYTEST_ARGUMENTS...]   (--fast: without the slow files)
# For a second Python: VENV=.venv-3.11 PYTHON=python3.11 launch/test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --fast ]; then
  shift
  set -- -m 'not slow' "$@"
fi
source launch/environment.sh
exec python -m pytest -n auto --dist loadfile "$@"
