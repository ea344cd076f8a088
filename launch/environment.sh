# Sourced by the other scripts, in the root of the checkout: makes .venv if there is none,
# installs cmjax and its test tools into it, and activates it.
python=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "cmjax needs Python 3.11 or newer; $python is $("$python" --version). Set PYTHON." >&2
    exit 2
  }
  "$python" -m venv .venv
fi
source .venv/bin/activate
stamp=.venv/installed
if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
  python -m pip install --quiet --editable '.[test]'
  touch "$stamp"
fi
