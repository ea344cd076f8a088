"""Files and flags -> a checked ConfigDict; JSON and back; what differs.

A config of the user's own command line is code that is trusted. One that came with
weights, or any `.json`, is data: the functions it names are `build.Foreign`.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
import importlib.util
import json
from pathlib import Path
import re
import sys
from typing import Any, NamedTuple

import ml_collections

from cmjax import build
from cmjax.configs import parts
from cmjax.core import UserError, first_line

ConfigDict = ml_collections.ConfigDict

REQUIRED = '?'  # the value of a key that has no default and must be given
MOST_STEPS = 2**31 - 1  # a step is an int32


class Number(NamedTuple):
  """A key of the top level that holds a number, and its bounds, both included."""

  kind: type
  low: float
  high: float


def _count(low: int, high: int = 2**24) -> Number:
  return Number(int, low, high)


_SEED = _count(0, 2**32 - 1)  # jax keeps 32 bits of a seed: others would be the same
_OFTEN = _count(0, MOST_STEPS)

# The top level of a config. A part is a dict with `fn`, or empty where it may be left
# out; parts are dicts of parts under names of the user's choice.
SCHEMA = {
  'seed': _SEED,
  'batch_size': _count(1),
  'total_images': _count(1, 2**53),
  'grad_clip_norm': Number(float, 0.0, 1e30),
  'accumulate': _count(1),
  'max_skipped_steps': _OFTEN,
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
  'evaluation': {
    'samples': _count(2),
    'batch_size': _count(1),
    'seed': _SEED,
    'pictured': _count(1, 2**16),
  },
  'every': {
    'log_steps': _count(1, MOST_STEPS),
    'picture_steps': _OFTEN,
    'evaluate_steps': _OFTEN,
    'checkpoint_steps': _count(1, MOST_STEPS),
  },
  'keep_checkpoints': _count(1),
}


# Where configs are -------------------------------------------------------------------


def shipped() -> dict[str, str]:
  """The configs that come with cmjax, by name: the first line of each."""
  found = {}
  for path in sorted(_shipped_folder().glob('[a-z]*.py')):
    if path.stem != 'parts':
      text = path.read_text(encoding='utf-8')
      found[path.stem] = ast.get_docstring(ast.parse(text)).splitlines()[0]
  return found


def _shipped_folder() -> Path:
  return Path(parts.__file__).resolve().parent


def load(name: str | Path, trust: Iterable[str] = ()) -> ConfigDict:
  """The config of `NAME`, `FILE.py` or `RUN/config.json`, checked.

  Args:
    name: a config that ships (`ect`), a Python file with a function `get_config`, or
      the `config.json` of a run; the first two with `:ARGUMENT` if they take one.
    trust: packages whose functions a `.json` may name.

  Raises: UserError if there is no such config, it does not take the argument, or a key
    is unknown, missing or of the wrong type.
  """
  file, _, argument = str(name).partition(':')
  path = Path(file)
  if path.suffix == '.json':
    if not path.is_file():
      raise UserError(f'--config: no file {file!r}')
    return checked(completed(read_json(path, trust)))
  if path.suffix != '.py':
    known = shipped()
    if file not in known:
      raise UserError(
        f'--config: no config {file!r}{build.hint(file, known)}; a file of your own '
        'ends with .py'
      )
    path = _shipped_folder() / f'{file}.py'
  if not path.is_file():
    raise UserError(
      f'--config: no file {file!r}; cmjax --mode=configs lists those that ship'
    )
  return checked(_called(path, argument, str(name)))


def _called(path: Path, argument: str, name: str) -> Any:
  """What `get_config` of a file returns."""
  folder, name_of_module = path.resolve().parent, f'cmjax.configs.{path.stem}'
  if folder != _shipped_folder():
    name_of_module = f'config_{path.stem}'
    allow_imports_from(folder)
  spec = importlib.util.spec_from_file_location(name_of_module, path)
  module = importlib.util.module_from_spec(spec)
  with build.user_errors(f'--config={name}'):
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise UserError(f'--config={path}: has no function get_config')
    try:
      return module.get_config(*([argument] if argument else []))
    except UserError as error:
      raise UserError(f'--config={name}: {error}') from error


def allow_imports_from(folder: str | Path) -> None:
  """Lets a config import, and name functions of, the modules in a folder.

  They come last: nothing that is installed can be hidden by them.
  """
  if str(folder) not in sys.path:
    sys.path.append(str(folder))


# JSON --------------------------------------------------------------------------------


def read_json(path: str | Path, trust: Iterable[str] = ()) -> ConfigDict:
  """The config in a file that `to_json` wrote. Raises: UserError if it holds none."""
  try:
    text = Path(path).read_text(encoding='utf-8')
  except (OSError, UnicodeError) as error:
    raise UserError(f'{path}: cannot be read ({first_line(error)})') from error
  return from_json(text, str(path), trust)


def from_json(
  text: str, where: str = 'config', trust: Iterable[str] = ()
) -> ConfigDict:
  """The config that `to_json` wrote, its functions foreign but those of `trust`.

  Raises: UserError if it is none.
  """
  try:
    value = json.loads(text)
    if not isinstance(value, dict) or not value:
      raise ValueError('not an object with keys')
    packages = (trust,) if isinstance(trust, str) else tuple(trust)
    return ConfigDict(_from_data(value, packages))
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise UserError(f'{where}: holds no config ({first_line(error)})') from error


def _from_data(value: Any, trust: tuple[str, ...]) -> Any:
  if isinstance(value, dict):
    for key in value:
      _check_name(key)
    found = {key: _from_data(item, trust) for key, item in value.items()}
    if 'fn' in found:
      if not isinstance(found['fn'], str):
        raise ValueError('a function that is no text')
      found['fn'] = build.Foreign(found['fn'], trust)
    return found
  if isinstance(value, list):
    return tuple(_from_data(item, trust) for item in value)
  return value


def _check_name(key: str) -> None:
  """Raises ValueError for a key that is no name: names of parts become file names."""
  if not re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_=.-]{0,63}', key):
    raise ValueError(f'the key {key[:40]!r} is no name of letters, digits and _')


def to_json(config: ConfigDict) -> str:
  """The resolved config as indented JSON with sorted keys; tuples become lists."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def completed(config: ConfigDict) -> ConfigDict:
  """A run's config with the keys that did not exist when it was written."""
  whole = parts.base()
  with whole.ignore_type():
    for key in config:
      if isinstance(SCHEMA.get(key), dict) and isinstance(config[key], ConfigDict):
        whole[key].update(config[key])
      else:
        whole[key] = config[key]
  return whole


# Values from the command line --------------------------------------------------------


def override(config: ConfigDict, key: str, text: str) -> None:
  """Sets the value at a dotted key, `network.width`, from the text of a flag.

  A key may be one that the config has, or one that the function of its part takes.

  Raises: UserError naming the key, or what the text must be.
  """
  *parents, last = key.split('.')
  part, where = config, 'config'
  for name in parents:
    if name not in part and last == 'fn' and SCHEMA.get(where[7:]) == 'parts':
      part[name] = {}  # a new part, under a name of the user's choice
    if name not in part:
      raise UserError(f'--{where}.{name}: unknown key{build.hint(name, part)}')
    part, where = part[name], f'{where}.{name}'
    if not isinstance(part, ConfigDict):
      raise UserError(f'--config.{key}: {where} is a value, without keys')
  current = part.get(last)
  if isinstance(current, ConfigDict):
    own = ', '.join(current) or 'none'
    raise UserError(f'--config.{key}: holds keys of its own; set one of {own}')
  annotation = _annotation(part, where, last)
  value = _parsed(text, current, annotation, f'--config.{key}={text}')
  with part.unlocked(), part.ignore_type():
    part[last] = value


def _annotation(part: ConfigDict, where: str, key: str) -> Any:
  """The type that a key should have, None if nothing says it."""
  if key == 'fn':
    return str
  if build.is_part(part):
    takes = build.parameters(part.fn, f'{where}.fn')
    if key in takes:
      return takes[key].annotation
    known = list(takes)
    told = f'--{where}.{key}: {part.fn} has no such key'
  else:
    schema = SCHEMA
    for name in where.split('.')[1:]:
      schema = schema.get(name, {}) if isinstance(schema, Mapping) else {}
    if isinstance(schema, Mapping) and key in schema:
      kind = schema[key]
      return kind.kind if isinstance(kind, Number) else kind
    known, told = list(part), f'--{where}.{key}: unknown key'
  if key in part:
    return None
  raise UserError(told + build.hint(key, known))


_TRUTH = {'true': True, '1': True, 'false': False, '0': False}


def _parsed(text: str, current: Any, annotation: Any, flag: str) -> Any:
  kind = annotation if annotation in (bool, int, float, str) else None
  if kind is None and current is not None and current != REQUIRED:
    kind = type(current)
  try:
    if kind is bool:
      return _TRUTH[text.lower()]
    if kind in (int, float):
      return kind(text)
    if kind is not None and issubclass(kind, str):
      return text
    value = ast.literal_eval(text)
    if kind in (tuple, list) and not isinstance(value, tuple | list):
      value = (value,)
    return tuple(value) if isinstance(value, list) else value
  except (ValueError, KeyError, SyntaxError, TypeError, MemoryError, RecursionError):
    if kind is None:
      return text
    raise UserError(f'{flag}: must be {kind.__name__}, got {text!r}') from None


# Checks ------------------------------------------------------------------------------


def checked(config: ConfigDict, where: str = 'config') -> ConfigDict:
  """The config itself, once its keys and types are those of `SCHEMA`.

  Raises: UserError naming the first key that is unknown, missing or of a wrong type.
  """
  if not isinstance(config, ConfigDict):
    raise UserError(
      f'{where}: get_config() must return a ConfigDict, not a {type(config).__name__}'
    )
  _check(config, SCHEMA, where)
  if not config.samplers:
    raise UserError(f'{where}.samplers: give at least one')
  if config.total_images // config.batch_size >= MOST_STEPS:
    raise UserError(
      f'{where}.total_images: more than 2**31 steps of {config.batch_size} images'
    )
  return config


def _check(config: Any, schema: Mapping[str, Any], where: str) -> None:
  for key in config:
    if key not in schema:
      raise UserError(f'{where}.{key}: unknown key{build.hint(key, schema)}')
  for key, kind in schema.items():
    path = f'{where}.{key}'
    if key not in config:
      raise UserError(f'{path}: missing; configs/parts.py:base() holds every key')
    value = config[key]
    if isinstance(kind, Number):
      build.check_value(value, kind.kind, path)
      _check_bounds(value, kind, path)
    elif isinstance(kind, type):
      build.check_value(value, kind, path)
    elif not isinstance(value, ConfigDict):
      raise UserError(f'{path}: must be a dict, got {value!r}')
    elif isinstance(kind, dict):
      _check(value, kind, path)
    elif kind == 'parts':
      for name in value:
        with build.user_errors(path):
          _check_name(name)
        build.check_part(value[name], f'{path}.{name}')
    elif kind == 'part' or value:
      build.check_part(value, path)


def _check_bounds(value: float, number: Number, where: str) -> None:
  if number.low <= value <= number.high:
    return
  if value < number.low and number.low in (0, 1):
    least = 'must not be negative' if number.low == 0 else 'must be positive'
    raise UserError(f'{where}: {least}, got {value!r}')
  raise UserError(
    f'{where}: must be between {number.low:g} and {number.high:,}, got {value!r}'
  )


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
