# Sourced by launch/environment.sh and .ci/run.

# Prints the version of the Python that $1 runs, such as 3.13; fails with the error of
# the command itself, in one line, if it does not run.
python_version() {
  local said
  if said=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>&1); then
    echo "${said##*$'\n'}"
  else
    echo "$1 does not run (${said%%$'\n'*})" >&2
    return 1
  fi
}

# Prints a Python of exactly the version $1 that runs: of PATH, or one that pyenv has
# installed and not activated.
find_python() {
  local path
  for path in "python$1" "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$1".*/bin/"python$1"; do
    if [ "$(python_version "$path" 2>/dev/null)" = "$1" ]; then
      echo "$path"
      return
    fi
  done
  return 1
}
