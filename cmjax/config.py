"""ConfigDict -> checked values -> built functions: the only door for ml_collections.

A part of a config names a function by import path, `fn='package.module:function'`, and
the function's signature is the part's schema. `build` checks the one against the other.
"""

from collections.abc import Callable, Iterator, Mapping
import difflib
import importlib
import importlib.util
import inspect
import json
from pathlib import Path
import sys
import typing
from typing import Any

import ml_collections
from ml_collections import config_flags

from cmjax.core import Model, Network, UserError

ConfigDict = ml_collections.ConfigDict

REQUIRED = '?'  # the value of a key that has no default and must be given

# The top level of a config. A part is a dict with `fn`, or empty where it may be left
# out; parts are dicts of parts under names of the user's choice.
SCHEMA = {
  'seed': int,
  'batch_size': int,
  'total_images': int,
  'grad_clip_norm': float,
  'accumulate': int,
  'max_skipped_steps': int,
  'init_from': str,
  'teacher': str,
  'sample_weights': str,
  'mesh': 'part',
  'data': 'part',
  'network': 'part',
  'precond': 'part',
  'objective': 'part',
  'optimizer': 'part',
  'target_rate': 'part or empty',
  'reference': 'part or empty',
  'perceptual': 'part or empty',
  'ema': 'parts',
  'samplers': 'parts',
  'metrics': 'parts',
  'studies': 'parts',
  'evaluation': {'samples': int, 'batch_size': int, 'seed': int, 'pictured': int},
  'every': {
    'log_steps': int,
    'picture_steps': int,
    'evaluate_steps': int,
    'checkpoint_steps': int,
  },
  'keep_checkpoints': int,
}
POSITIVE = (
  'batch_size',
  'total_images',
  'accumulate',
  'evaluation.samples',
  'evaluation.batch_size',
  'evaluation.pictured',
  'every.log_steps',
  'every.checkpoint_steps',
  'keep_checkpoints',
)
NOT_NEGATIVE = (
  'seed',
  'grad_clip_norm',
  'max_skipped_steps',
  'evaluation.seed',
  'every.picture_steps',
  'every.evaluate_steps',
)


def define_flag(name: str) -> Any:
  """Defines --name=FILE and --name.key=value; returns the flag holder."""
  return config_flags.DEFINE_config_file(name, None, 'Path of a config file.')


def load(path: str | Path) -> ConfigDict:
  """The resolved config of `FILE` or `FILE:ARGUMENT`, checked.

  Raises: UserError if there is no such file, it does not take the argument, or a key
    is unknown, missing or of the wrong type.
  """
  path, _, argument = str(path).partition(':')
  path = Path(path)
  if not path.is_file():
    raise UserError(f'config: no file {path}; see configs/ for those that ship')
  allow_imports_beside(path)
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  try:
    config = module.get_config(*([argument] if argument else []))
  except ValueError as error:
    raise UserError(f'--config={path}:{argument}: {error}') from error
  return checked(config)


def allow_imports_beside(path: str | Path) -> None:
  """Lets a config file import the modules of its own folder, such as `parts`."""
  folder = str(Path(path).resolve().parent)
  if folder not in sys.path:
    sys.path.insert(0, folder)


def from_json(text: str) -> ConfigDict:
  """The config that `to_json` wrote."""
  return ConfigDict(_tuples(json.loads(text)))


def to_json(config: ConfigDict) -> str:
  """The resolved config as indented JSON with sorted keys; tuples become lists."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def _tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def checked(config: ConfigDict, where: str = 'config') -> ConfigDict:
  """The config itself, once its keys and types are those of `SCHEMA`.

  Raises: UserError naming the first key that is unknown, missing or of a wrong type.
  """
  if not isinstance(config, ConfigDict):
    raise UserError(f'{where}: get_config() must return a ConfigDict, not {config!r}')
  _check(config, SCHEMA, where)
  if not config.samplers:
    raise UserError(f'{where}.samplers: give at least one')
  for key in POSITIVE:
    value = _at(config, key)
    if value <= 0:
      raise UserError(f'{where}.{key}: must be positive, got {value}')
  for key in NOT_NEGATIVE:
    value = _at(config, key)
    if value < 0:
      raise UserError(f'{where}.{key}: must not be negative, got {value}')
    if value >= 2**32:  # jax keeps 32 bits of a seed: others would be the same
      raise UserError(f'{where}.{key}: must be below 2**32, got {value}')
  return config


def _at(config: ConfigDict, dotted: str) -> Any:
  for key in dotted.split('.'):
    config = config[key]
  return config


def _check(config: Any, schema: Mapping[str, Any], where: str) -> None:
  for key in config:
    if key not in schema:
      raise UserError(f'{where}.{key}: unknown key{_hint(key, schema)}')
  for key, kind in schema.items():
    path = f'{where}.{key}'
    if key not in config:
      raise UserError(f'{path}: missing; configs/parts.py:base() holds every key')
    value = config[key]
    if isinstance(kind, type):
      _check_type(value, kind, path)
    elif not isinstance(value, ConfigDict):
      raise UserError(f'{path}: must be a dict, got {value!r}')
    elif isinstance(kind, dict):
      _check(value, kind, path)
    elif kind == 'parts':
      for name in value:
        _check_part(value[name], f'{path}.{name}')
    elif kind == 'part' or value:
      _check_part(value, path)


def _check_part(value: Any, path: str) -> None:
  if not is_part(value) or not isinstance(value.fn, str):
    raise UserError(f"{path}: needs fn='package.module:function'")


def _check_type(value: Any, kind: type, path: str) -> None:
  allowed = (int, float) if kind is float else kind
  if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
    raise UserError(f'{path}: must be {kind.__name__}, got {value!r}')


def _hint(key: str, known: Any) -> str:
  close = difflib.get_close_matches(key, list(known), n=1)
  return f', did you mean {close[0]}?' if close else f'; known: {", ".join(known)}'


def require(config: ConfigDict) -> None:
  """Refuses a config with a value that must be given and is not.

  Raises: UserError naming the keys; a `teacher` alone is enough where it is asked for.
  """
  missing = [path for path, value in _leaves(config, 'config') if value == REQUIRED]
  if 'config.teacher' in missing and 'config.init_from' in missing:
    missing.remove('config.init_from')  # follows the teacher
  if missing:
    raise UserError(f'{", ".join(missing)}: must be given, as in --{missing[0]}=VALUE')


def _leaves(config: Any, where: str) -> Iterator[tuple[str, Any]]:
  for key in config:
    value = config[key]
    if isinstance(value, ConfigDict):
      yield from _leaves(value, f'{where}.{key}')
    else:
      yield f'{where}.{key}', tuple(value) if isinstance(value, list) else value


def differences(old: ConfigDict, new: ConfigDict) -> dict[str, str]:
  """What differs, by dotted path: {'config.batch_size': '256 -> 128'}."""
  a, b = dict(_leaves(old, 'config')), dict(_leaves(new, 'config'))
  absent = 'absent'
  return {
    key: f'{a.get(key, absent)} -> {b.get(key, absent)}'
    for key in sorted(a.keys() | b.keys())
    if a.get(key, absent) != b.get(key, absent)
  }


def build(spec: ConfigDict, where: str, **given: Any) -> Any:
  """Calls the function a part names, with the part's own keywords.

  A value that is itself a part is built first. Of `given`, what the run provides (a
  model, the batch size), a function receives the names its signature holds.

  Raises: UserError naming the function, the key and what the function takes.
  """
  fn = _function(spec.fn, f'{where}.fn')
  parameters = inspect.signature(fn).parameters
  keywords = {}
  for key in spec:
    if key == 'fn':
      continue
    if key not in parameters:
      takes = [name for name in parameters if name not in given]
      raise UserError(f'{where}.{key}: {spec.fn} has no such key{_hint(key, takes)}')
    if key in given:
      raise UserError(f'{where}.{key}: is set by the run, leave it out')
    value, kind = spec[key], parameters[key].annotation
    if isinstance(value, ConfigDict):
      _check_part(value, f'{where}.{key}')
      value = build(value, f'{where}.{key}', **given)
    elif _is_function(kind):
      raise UserError(
        f"{where}.{key}: needs fn='package.module:function', got {value!r}"
      )
    elif kind in (bool, int, float, str):
      _check_type(value, kind, f'{where}.{key}')
    keywords[key] = value
  keywords |= {key: value for key, value in given.items() if key in parameters}
  for name, parameter in parameters.items():
    if name in keywords or parameter.default is not parameter.empty:
      continue
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
      continue
    if name == 'teacher':
      raise UserError(f'{where}: {spec.fn} needs a teacher; give --config.teacher=PATH')
    raise UserError(f'{where}.{name}: missing; {spec.fn} needs it')
  try:
    return fn(**keywords)
  except UserError:
    raise  # it names its key already
  except (ValueError, TypeError) as error:
    raise UserError(f'{where}: {error}') from error


def _is_function(kind: Any) -> bool:
  """Whether an annotation stands for a function, which a config must name."""
  return typing.get_origin(kind) is Callable or '__call__' in getattr(
    kind, '__dict__', {}
  )


def takes(spec: ConfigDict, name: str) -> bool:
  """Whether the function a part names has a parameter of that name."""
  return name in inspect.signature(_function(spec.fn, 'fn')).parameters


def is_part(value: Any) -> bool:
  """Whether a config value names a function to build."""
  return isinstance(value, ConfigDict) and 'fn' in value


def build_each(parts: ConfigDict, where: str, **given: Any) -> dict[str, Any]:
  """Builds every part of a dict of parts, by name."""
  return {name: build(parts[name], f'{where}.{name}', **given) for name in parts}


def _function(path: str, where: str) -> Callable[..., Any]:
  module, _, name = path.partition(':')
  try:
    found = getattr(importlib.import_module(module), name)
    inspect.signature(found)
  except (ImportError, AttributeError, ValueError, TypeError) as error:
    raise UserError(f'{where}: cannot import {path!r} ({error})') from error
  return found


def build_model(config: ConfigDict) -> tuple[Network, Model]:
  """The raw network, and the model it becomes through its preconditioning."""
  network = build(config.network, 'config.network')
  return network, build(config.precond, 'config.precond', network=network)


def schedules(config: ConfigDict, **given: Any) -> dict[str, Callable[[int], Any]]:
  """Every part that is a schedule of `cmjax.schedules`, built, by dotted path."""
  found = {}

  def walk(part, where):
    for key in part:
      value = part[key]
      if is_part(value) and value.fn.startswith('cmjax.schedules:'):
        found[f'{where}.{key}'] = build(value, f'{where}.{key}', **given)
      elif isinstance(value, ConfigDict):
        walk(value, f'{where}.{key}')

  walk(config, 'config')
  return found
