"""Overrides values of a config, as `--config.network.width=24` does."""

import ast
import dataclasses
from typing import Any

from cmjax.core import UserError
from cmjax.runtime.build import hint, is_part, path_of
from cmjax.runtime.config import REQUIRED, Config, ConfigDict, Key, keys_of
from cmjax.runtime.config_json import report_renamed
from cmjax.runtime.functions import parameters
from cmjax.runtime.renamed import function_now, key_now


def override(config: ConfigDict, key: str, text: str) -> None:
  """Sets the value at a dotted key, such as `network.width`, from the text of a flag.

  A key may be one that the config has, or one that the function of its part takes.

  Raises: UserError naming the key, or what the text must be.
  """
  *parents, last = key.split('.')
  part, where = config, 'config'
  for name in parents:
    name = _now(part, where, name)
    if name not in part and last == 'fn' and _may_hold(part, where, name):
      part[name] = {}  # a new part: of a name of the user's choice, or of a parameter
    if name not in part:
      raise UserError(f'--{where}.{name}: unknown key{hint(name, part)}')
    inner, where = part[name], f'{where}.{name}'
    if not isinstance(inner, ConfigDict):
      raise UserError(f'--config.{key}: {where} is a value and has no keys')
    part = inner
  last = _now(part, where, last)
  current = part.get(last)
  if isinstance(current, ConfigDict):
    keys = ', '.join(current) or 'none'
    raise UserError(f'--config.{key}: has keys of its own; set one of {keys}')
  annotation = _annotation(part, where, last)
  value = _parsed(text, current, annotation, f'--config.{key}={text}')
  if last == 'fn' and isinstance(value, str):
    value = _function_now(value, f'--config.{key}')
  with part.unlocked(), part.ignore_type():
    part[last] = value


def _now(part: ConfigDict, where: str, key: str) -> str:
  """The current name of a key; an outdated name is reported."""
  fn = str(part.fn) if is_part(part) else ''
  now = key_now(key, fn, where.removeprefix('config').lstrip('.'))
  if now != key:
    report_renamed(f'--{where}.{key} is now --{where}.{now}')
  return now


def _function_now(path: str, flag: str) -> str:
  now = function_now(path)
  if now != path:
    report_renamed(f'{flag}: {path} is now {now}')
  return now


def _key(path: str) -> Key | None:
  """The declaration in `Config` of the key at a path; None for a key of a part."""
  record: type = Config
  *parents, last = path.split('.')[1:] or ['']
  for name in parents:
    if name not in keys_of(record):
      return None
    record = keys_of(record)[name].kind
    if not dataclasses.is_dataclass(record):
      return None
  return keys_of(record).get(last)


def _may_hold(part: ConfigDict, where: str, name: str) -> bool:
  """Whether a part of this name can be added at a path."""
  if is_part(part):
    return name in parameters(path_of(part), f'{where}.fn')
  key = _key(where)
  return key is not None and key.form == 'parts'


def _annotation(part: ConfigDict, where: str, key: str) -> Any:
  """The type that a key should have; None if none is declared."""
  if key == 'fn':
    return str
  if is_part(part):
    names = parameters(path_of(part), f'{where}.fn')
    if key in names:
      return names[key].annotation
    mistake = f'--{where}.{key}: {part.fn} has no such key'
  else:
    declared = _key(f'{where}.{key}')
    if declared:
      return declared.kind
    names, mistake = part, f'--{where}.{key}: unknown key'
  if key in part:
    return None
  raise UserError(mistake + hint(key, names))


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
