"""Loads a config, `NAME`, `FILE.py` or `RUN/config.json`, with overrides, checked."""

import ast
from collections.abc import Iterable
import contextlib
import functools
from importlib import resources
import importlib.util
from pathlib import Path
from typing import Any

from cmjax.core import UserError
from cmjax.runtime.build import hint
from cmjax.runtime.config_json import read_json, with_names_of_today
from cmjax.runtime.config_record import (
  Config,
  ConfigDict,
  checked,
  completed,
  data_of,
  differences,
)
from cmjax.runtime.errors import user_errors
from cmjax.runtime.functions import allow_imports_from
from cmjax.runtime.overrides import override, set_value


def shipped() -> dict[str, str]:
  """The first docstring line of each config that ships with cmjax, by name."""
  lines = {}
  for path in sorted(_shipped_folder().glob('[a-z]*.py')):
    if path.stem not in ('parts', 'papers'):
      text = path.read_text(encoding='utf-8')
      lines[path.stem] = (ast.get_docstring(ast.parse(text)) or '').partition('\n')[0]
  return lines


def _shipped_folder() -> Path:
  return Path(str(resources.files('cmjax.configs'))).resolve()


def load(name: str | Path, /, *, trust: Iterable[str] = (), **overrides: Any) -> Config:
  """The config of `NAME`, `FILE.py` or `RUN/config.json`, checked.

  `load('ect:digits', batch_size=64, network=dict(width=96))` changes two values.

  Args:
    name: a config that ships (`ect`), a Python file with a function `get_config`, or
      the `config.json` of a run; the first two with `:ARGUMENT` if they take one.
    trust: packages whose functions a `.json` may name.
    **overrides: values by key. A dict changes some keys of a part, or replaces the
      part if it has `fn`.

  Raises: UserError if there is no such config, it does not take the argument, or a key
    is unknown, missing or of the wrong type.
  """
  config = read(name, trust)
  for key, value in overrides.items():
    set_value(config, key, value)
  return checked(config)


def closest(config: ConfigDict | Config) -> tuple[str, Config]:
  """The config that ships with the fewest differences: its `NAME:DATA`, and itself.

  Configs that do not load are left out.
  """
  candidates = _all_shipped()
  best = min(candidates, key=lambda name: len(differences(candidates[name], config)))
  return best, candidates[best]


@functools.cache
def _all_shipped() -> dict[str, Config]:
  names = [f'{name}:{data}' for name in shipped() for data in data_of(name)]
  configs = {}
  for name in names:
    with contextlib.suppress(UserError):
      configs[name] = checked(read(name))
  return configs


def overridden(config: ConfigDict, overrides: Iterable[tuple[str, str]]) -> Config:
  """The config with values from the command line, checked."""
  for key, text in overrides:
    override(config, key, text)
  return checked(config)


def read(name: str | Path, trust: Iterable[str] = ()) -> ConfigDict:
  """`load` without overrides: a checked ConfigDict, whose values may still be set."""
  file, _, argument = str(name).partition(':')
  path = Path(file)
  if path.suffix == '.json':
    if not path.is_file():
      raise UserError(f'--config: no file {file!r}')
    config = completed(read_json(path, trust))
    checked(config)
    return config
  if path.suffix != '.py':
    names = shipped()
    if file not in names:
      raise UserError(
        f'--config: no config {file!r}{hint(file, names)}; the name of a file ends '
        'with .py'
      )
    path = _shipped_folder() / f'{file}.py'
  if not path.is_file():
    raise UserError(
      f'--config: no file {file!r}; cmjax --mode=configs lists the configs that ship'
    )
  known = data_of(path.stem) if path.resolve().parent == _shipped_folder() else ()
  if argument and known and argument not in known:
    raise UserError(f'--config={name}: no data {argument!r}; known: {", ".join(known)}')
  config = _called(path, argument, str(name))
  checked(config)
  return config


def _called(path: Path, argument: str, name: str) -> Any:
  """What `get_config` of a file returns, with outdated names translated."""
  folder, module_name = path.resolve().parent, f'cmjax.configs.{path.stem}'
  if folder != _shipped_folder():
    module_name = f'config_{path.stem}'
    allow_imports_from(folder)
  spec = importlib.util.spec_from_file_location(module_name, path)
  assert spec is not None  # as the suffix is .py
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  with user_errors(f'--config={name}'):
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise UserError(f'--config={path}: has no function get_config')
    try:
      config = module.get_config(*([argument] if argument else []))
    except UserError as error:
      raise UserError(f'--config={name}: {error}') from error
  if isinstance(config, ConfigDict):
    _translate(config, f'--config={name}')
  return config


def _translate(config: ConfigDict, where: str) -> None:
  """Translates outdated names in place; values without any keep their references."""
  old = config.to_dict()
  new = with_names_of_today(old, where)
  with config.unlocked(), config.ignore_type():
    for key in old.keys() - new.keys():
      del config[key]
    for key, value in new.items():
      if key not in old or value != old[key]:
        config[key] = value
