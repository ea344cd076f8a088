# shellcheck shell=bash
# Sourced by the other scripts, in the root of the checkout: creates a venv if it does not
# exist, installs cmjax and its test tools into it, and activates it.
# VENV is its folder (default .venv), PYTHON the Python that creates it (default: python3 if
# it is 3.12 or newer, which get the newest jax; else the newest Python installed).
source launch/find_python.sh
venv=${VENV:-.venv}

stop() {
  echo "$1" >&2
  exit 2
}

at_least() {  # VERSION MINOR
  [ "${1%.*}" = 3 ] && [ "${1#*.}" -ge "$2" ]
}

choose_python() {
  local version
  if [ -z "${PYTHON:-}" ] && ! at_least "$(python_version python3 2>/dev/null)" 12; then
    for version in 3.13 3.12 3.11; do
      ! find_python "$version" || return 0
    done
  fi
  echo "${PYTHON:-python3}"
}

if [ ! -f "$venv/bin/activate" ]; then
  python=$(choose_python)
  command -v "$python" >/dev/null || stop "no $python; set PYTHON to Python 3.11 or newer"
  version=$(python_version "$python" 2>&1) ||
    stop "$version; set PYTHON to Python 3.11 or newer"
  at_least "$version" 11 ||
    stop "cmjax needs Python 3.11 or newer; $python is $version. Set PYTHON."
  at_least "$version" 12 ||
    echo "$python is $version; jax 0.10 is the newest for it, 3.12 gets a newer one" >&2
  "$python" -m venv "$venv" ||
    stop "cannot create $venv; on Debian and Ubuntu: apt install python3-venv"
fi
source "$venv/bin/activate"
if [ ! -e "$venv/installed" ] || [ setup.cfg -nt "$venv/installed" ]; then
  python -m pip install --quiet --editable '.[test]'
  touch "$venv/installed"
fi
