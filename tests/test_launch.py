"""The scripts of launch/ choose a Python and pass arguments on."""

import subprocess

import pytest

from tests.conftest import ROOT

SHIM = """#!/bin/sh
echo "pyenv: ${0##*/}: command not found" >&2
echo "The command exists in these Python versions:" >&2
exit 127
"""


@pytest.fixture
def environment(tmp_path):
  """Sources environment.sh where `python`s are fakes: a version, or a shim's error."""
  (tmp_path / 'launch').mkdir()
  for name in ('environment.sh', 'find_python.sh'):
    (tmp_path / 'launch' / name).symlink_to(ROOT / 'launch' / name)
  (tmp_path / 'setup.cfg').touch()

  def source(pythons, folder='bin', **variables):
    for name, version in pythons.items():
      path = tmp_path / (name if '/' in name else f'{folder}/{name}')
      path.parent.mkdir(parents=True, exist_ok=True)
      # Tells its version; a venv of it only keeps which Python made it.
      path.write_text(
        f"""#!/bin/sh
case "$2" in
  venv) mkdir -p "$3/bin"; echo "echo made by {name}" > "$3/bin/activate"
        touch -d 2100-01-01 "$3/installed" ;;
  *) echo a warning >&2; echo {version} ;;
esac
"""
        if version
        else SHIM
      )
      path.chmod(0o755)
    (tmp_path / 'tools').mkdir()
    for tool in ('mkdir', 'touch'):
      (tmp_path / 'tools' / tool).symlink_to(f'/bin/{tool}')
    path = f'{tmp_path}/{folder}:{tmp_path}/tools'
    return subprocess.run(
      ['/bin/bash', '-c', 'set -euo pipefail; source launch/environment.sh'],
      cwd=tmp_path,
      env={'PATH': path, 'HOME': str(tmp_path)} | variables,
      capture_output=True,
      text=True,
    )

  return source


@pytest.mark.parametrize(
  ('pythons', 'chosen'),
  [
    ({'python3': '3.12'}, 'python3'),
    ({'python3': '3.14', 'python3.13': '3.13'}, 'python3'),
    ({'python3': '3.11', 'python3.13': '3.13', 'python3.12': '3.12'}, 'python3.13'),
    ({'python3': '3.9', 'python3.13': '', 'python3.12': '3.12'}, 'python3.12'),
    ({'python3': '', 'python3.11': '3.11'}, 'python3.11'),
    ({'python3.12': '3.12'}, 'python3.12'),
    (
      {'python3': '', '.pyenv/versions/3.13.1/bin/python3.13': '3.13'},
      '.pyenv/versions/3.13.1/bin/python3.13',
    ),
  ],
)
def test_a_python_that_runs_is_found(environment, pythons, chosen):
  done = environment(pythons)
  assert (done.returncode, done.stdout) == (0, f'made by {chosen}\n'), done.stderr
  assert bool(done.stderr) == (pythons[chosen] == '3.11')  # the last for jax 0.10


@pytest.mark.parametrize(
  ('pythons', 'words'),
  [
    ({}, 'no python3; set PYTHON to Python 3.11 or newer'),
    (
      {'python3': '', 'python3.13': ''},
      'python3 does not run (pyenv: python3: command not found); '
      'set PYTHON to Python 3.11 or newer',
    ),
    ({'python3': '3.9'}, 'needs Python 3.11 or newer; python3 is 3.9. Set PYTHON.'),
    ({'python3': '2.7'}, 'needs Python 3.11 or newer; python3 is 2.7. Set PYTHON.'),
  ],
)
def test_without_one_the_reason_is_one_line(environment, pythons, words):
  done = environment(pythons)
  assert (done.returncode, done.stdout) == (2, '')
  assert len(done.stderr.splitlines()) == 1
  assert words in done.stderr


def test_variables_choose_the_python_and_the_folder(environment, tmp_path):
  pythons = {'python3': '3.13', 'python3.12': '3.12', 'python3.10': '3.10'}
  done = environment(pythons, VENV='other', PYTHON='python3.12')
  assert done.stdout == 'made by python3.12\n'
  assert (tmp_path / 'other').is_dir()
  assert not (tmp_path / '.venv').exists()


def test_a_python_of_the_user_is_not_replaced(environment):
  done = environment({'python3': '3.13', 'python3.10': '3.10'}, PYTHON='python3.10')
  assert done.returncode == 2
  assert 'python3.10 is 3.10' in done.stderr


@pytest.mark.parametrize(
  ('arguments', 'passed'),
  [
    ([], []),
    (['-k', 'a b'], ['-k', 'a b']),
    (['--fast', 'tests/test_x.py'], ['-m', 'not slow', 'tests/test_x.py']),
  ],
)
def test_fast_leaves_the_slow_tests_out(arguments, passed, tmp_path):
  (tmp_path / 'launch').mkdir()
  (tmp_path / 'launch' / 'test.sh').symlink_to(ROOT / 'launch' / 'test.sh')
  (tmp_path / 'launch' / 'environment.sh').touch()
  python = tmp_path / 'python'
  python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
  python.chmod(0o755)
  done = subprocess.run(
    ['/bin/bash', tmp_path / 'launch' / 'test.sh', *arguments],
    env={'PATH': f'{tmp_path}:/usr/bin:/bin'},
    capture_output=True,
    text=True,
    check=True,
  )
  words = ['-m', 'pytest', '-n', 'auto', '--dist', 'loadfile']
  assert done.stdout.splitlines() == [*words, *passed]
