"""The folder of a run: which run it holds, and its config."""

from collections.abc import Iterable
from pathlib import Path

from cmjax.core import UserError
from cmjax.runtime import checkpoint, paths, sharding
from cmjax.runtime.config import overridden, read
from cmjax.runtime.config_json import from_json, read_json, to_json
from cmjax.runtime.config_record import (
  Config,
  ConfigDict,
  completed,
  differences,
  may_change,
)


def folder(text: str) -> Path:
  """The path of a --workdir.

  Raises: UserError if it is empty, a file is in its place, or it is in a bucket that
    does not exist, cannot be listed or is of another provider than Google; RetryError
    if the bucket does not answer.
  """
  if not text:
    raise UserError('give --workdir=DIR, the folder of the run')
  path = paths.path(text)
  if paths.remote(path):
    paths.check_access(path)
    if paths.is_file(path):
      raise UserError(f'--workdir: {path} is a file, not a folder')
    return path
  for part in (path, *path.parents):
    if part.exists() and not part.is_dir():
      raise UserError(f'--workdir: {part} is a file, not a folder')
  return path


def own_config(workdir: Path, trust: Iterable[str] = ()) -> ConfigDict | None:
  """The config of the run in a work directory; None if it holds no run.

  Read from `config.json`, or from the newest checkpoint if that file is missing.

  Raises: UserError if it cannot be read, or the folder holds weights alone.
  """
  path = workdir / 'config.json'

  def found() -> str:
    if path.exists():
      return 'config'
    if not checkpoint.any_in(workdir):
      return ''
    return 'run' if checkpoint.is_run(workdir) else 'weights'

  # One process decides, as a checkpoint is then read by all processes together.
  kind = sharding.from_process_0(found)
  if kind == 'config':
    return read_json(path, trust)
  if not kind:
    return None
  if kind == 'weights':
    raise UserError(
      f'{workdir} holds weights but no run; to train from them give '
      f'--config.init_from={workdir} and another --workdir'
    )
  text = checkpoint.read_meta(workdir)['config']
  return from_json(text, str(workdir), trust)


def config_for(
  name: str,
  workdir: Path | None,
  overrides: Iterable[tuple[str, str]] = (),
  trust: Iterable[str] = (),
) -> Config:
  """The config of a command, with its overrides, checked.

  Args:
    name: as for `config.load`; if empty, the config of the run in `workdir`.
    workdir: a work directory, which need not exist.
    overrides: dotted keys and the texts of their values.
    trust: packages whose functions the config of the run may name.

  Raises: UserError if there is no config, or it does not take the overrides.
  """
  config = read(name, trust) if name else None
  if config is None and workdir is not None:
    config = own_config(workdir, trust)
    config = config and completed(config)
  if config is None:
    raise UserError('give --config=NAME, such as ect:digits, or the --workdir of a run')
  return overridden(config, overrides)


def check_claim(workdir: Path, config: Config) -> None:
  """Checks that a work directory holds no run, or one with this config.

  Raises: UserError naming what differs, or if it holds weights alone.
  """
  old = own_config(workdir)
  if old is None:
    return
  changed = [  # except keys that did not exist when the run started
    f'{key}: {change}'
    for key, change in differences(old, config).items()
    if key.split('.')[1] in old and not may_change(key)
  ]
  if changed:
    raise UserError(
      f'{workdir} holds a run with another config ({"; ".join(changed[:3])}); '
      'give that config, or another --workdir'
    )


def write_config(workdir: Path, config: Config) -> None:
  """Writes `config.json`.

  Raises: UserError if it cannot be written, RetryError if a bucket does not answer.
  """
  try:
    paths.write_text(workdir / 'config.json', to_json(config))
  except Exception as error:
    if why := getattr(error, 'strerror', '') or paths.reason(error):
      text = f'--workdir: cannot write {workdir} ({why})'
      raise paths.failure(workdir, text) from error
    raise
