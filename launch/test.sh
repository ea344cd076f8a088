#!/usr/bin/env bash
# Runs the tests, a file a core at a time; arguments go to pytest. Needs Python >= 3.11.
# For a second Python: VENV=.venv-3.11 PYTHON=python3.11 launch/test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
exec python -m pytest -n auto --dist loadfile "$@"
