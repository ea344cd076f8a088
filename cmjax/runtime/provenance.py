"""The record of a run: `starts.jsonl`, a row per start and end, and `.ended`."""

from collections.abc import Iterator, Mapping
import contextlib
import datetime
import importlib.metadata
import json
import os
from pathlib import Path
import platform
import shlex
import subprocess
import sys
from typing import Any

import jax

import cmjax
from cmjax.runtime import paths

NAME = 'starts.jsonl'
LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
GIT_S = 5.0  # seconds after which git is given up


@contextlib.contextmanager
def recorded(
  workdir: Path, first_step: int, facts: Mapping[str, Any]
) -> Iterator[None]:
  """Appends a row at the start of a run, and one at its end with the error if any.

  Raises: OSError if the first row cannot be written.
  """
  path = workdir / NAME
  _append(path, start(first_step) | dict(facts))
  error = None
  try:
    yield
  except Exception as raised:
    error = f'{type(raised).__name__}: {" ".join(str(raised).split())[:1_000]}'
    raise
  finally:
    try:
      if paths.answers(path):
        _append(path, {'ended': _now(), 'error': error})
    except Exception as failed:  # an error of the run itself is more important
      if not paths.reason(failed):
        raise


def start(first_step: int) -> dict[str, Any]:
  """The command, versions, devices and revision of this process."""
  device = jax.devices()[0]
  name = Path(sys.argv[0]).name
  command = ['cmjax' if name == '__main__.py' else name, *sys.argv[1:]]
  return {
    'started': _now(),
    'command': shlex.join(command),
    'first_step': first_step,
    'versions': _versions(),
    'device_kind': device.device_kind,
    'platform': device.platform,
    'devices': jax.device_count(),
    'processes': jax.process_count(),
    'git': revision(Path(cmjax.__file__).resolve().parent.parent),
  }


def revision(checkout: Path) -> dict[str, Any] | None:
  """The git revision of a checkout of cmjax, and whether files of it have changed.

  None if it is an installed package, or if git is missing, slow or fails.
  """
  if not (checkout / '.git').exists():
    return None
  environment = {k: v for k, v in os.environ.items() if not k.startswith('GIT_')}

  def git(*arguments: str) -> str:
    done = subprocess.run(
      ['git', '--no-optional-locks', '-C', str(checkout), *arguments],
      capture_output=True,
      check=True,
      env=environment,
      stdin=subprocess.DEVNULL,
      text=True,
      timeout=GIT_S,
    )
    return done.stdout.strip()

  try:
    changed = bool(git('status', '--porcelain', '--untracked-files=no'))
    return {'revision': git('rev-parse', 'HEAD'), 'uncommitted_changes': changed}
  except (OSError, subprocess.SubprocessError, UnicodeError):
    return None


def starts(workdir: Path) -> list[dict[str, Any]]:
  """The rows of a run, oldest first; those that cannot be read are left out."""
  path = workdir / NAME
  try:
    lines = path.read_bytes().splitlines() if path.is_file() else []
  except OSError:
    return []
  rows = []
  for line in lines:
    with contextlib.suppress(ValueError, RecursionError):
      row = json.loads(line)
      if isinstance(row, dict) and ('started' in row or 'ended' in row):
        rows.append(row)
  return rows


def caught_up(workdir: Path) -> int | None:
  """The last step of a run whose last pictures and evaluations are done, or None."""
  try:
    return int((workdir / '.ended').read_text(encoding='ascii'))
  except (OSError, ValueError):
    return None


def mark_caught_up(workdir: Path, step: int) -> None:
  """Writes what `caught_up` reads; a saved checkpoint cannot be changed to hold it."""
  paths.write_text(workdir / '.ended', str(step))


def _append(path: Path, row: Mapping[str, Any]) -> None:
  """Adds a row; a last row that a kill cut short is dropped."""
  old = path.read_bytes() if path.exists() else b''
  whole = old[: old.rfind(b'\n') + 1]
  paths.write_bytes(path, whole + json.dumps(row).encode() + b'\n')


def _versions() -> dict[str, str]:
  versions = {'cmjax': cmjax.__version__, 'python': platform.python_version()}
  for name in LIBRARIES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return versions


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
