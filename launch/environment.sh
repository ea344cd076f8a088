# Sourced by the other scripts, in the root of the checkout: makes .venv if there is none,
# installs cmjax and its test tools into it, and activates it.
python=${PYTHON:-python3}

stop() {
  echo "$1" >&2
  exit 2
}

if [ ! -f .venv/bin/activate ]; then
  command -v "$python" >/dev/null || stop "no $python; set PYTHON to Python 3.11 or newer"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    stop "cmjax needs Python 3.11 or newer; $("$python" --version) is older. Set PYTHON."
  "$python" -m venv .venv ||
    stop "cannot make .venv; on Debian and Ubuntu: apt install python3-venv"
fi
source .venv/bin/activate
if [ ! -e .venv/installed ] || [ setup.cfg -nt .venv/installed ]; then
  python -m pip install --quiet --editable '.[test]'
  touch .venv/installed
fi
