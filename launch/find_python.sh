# shellcheck shell=bash
# Sourced by launch/environment.sh and .ci/run.

# Prints the version of the Python that $1 runs, such as 3.13; fails with the error of
# the command itself, in one line, if it does not run.
python_version() {
  local output
  if output=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>&1); then
    echo "${output##*$'\n'}"
  else
    echo "$1 does not run (${output%%$'\n'*})" >&2
    return 1
  fi
}

# Prints a working Python of exactly the version $1: from PATH, or one that pyenv has
# installed but not activated.
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
