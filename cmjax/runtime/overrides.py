"""Overrides values of a config, as `--config.network.width=24` does."""

import ast
from collections.abc import Mapping
import dataclasses
import typing
from typing import Any

from cmjax.core import UserError
from cmjax.runtime.build import hint, is_part, path_of
from cmjax.runtime.config_json import report_renamed
from cmjax.runtime.config_record import REQUIRED, Config, ConfigDict, Key, keys_of
from cmjax.runtime.functions import parameters
from cmjax.runtime.renamed import function_now, key_now


def override(config: ConfigDict, key: str, text: str) -> None:
  """Sets the value at a dotted key, such as `network.width`, from the text of a flag.

  A key may be one that the config has, or one that the function of its part takes. A
  part that may be left out is replaced by the text 'None'.

  Raises: UserError naming the key, or what the text must be.
  """
  part, where, last = _place(config, key, '--config')
  current, annotation = part.get(last), _annotation(part, where, last)
  is_off = text == 'None' and type(None) in typing.get_args(annotation)
  if isinstance(current, ConfigDict) and not is_off:
    keys = ', '.join(current) or 'none'
    raise UserError(f'--config.{key}: has keys of its own; set one of {keys}')
  value = None
  if not is_off:
    value = _parsed(text, current, annotation, f'--config.{key}={text}')
  _set(part, where, last, value)


def set_value(config: ConfigDict, key: str, value: Any) -> None:
  """Sets the value at a dotted key.

  A dict sets each of its keys, unless it has `fn`: then it is a part, as a whole.

  Raises: UserError naming the key.
  """
  if isinstance(value, Mapping) and 'fn' not in value:
    for inner, item in value.items():
      set_value(config, f'{key}.{inner}', item)
    return
  part, where, last = _place(config, key, 'config')
  if isinstance(value, Mapping):
    value = ConfigDict(value)
    if last not in part and not _may_hold(part, where, last):
      raise UserError(f'{where}.{last}: unknown key{hint(last, part)}')
  else:
    _annotation(part, where, last)  # raises for an unknown key
  _set(part, where, last, value)


def _place(config: ConfigDict, key: str, root: str) -> tuple[ConfigDict, str, str]:
  """The part that holds a dotted key, its own place below `root`, and the last key."""
  *parents, last = key.split('.')
  part, where = config, root
  for name in parents:
    name = _now(part, where, name)
    if name not in part and last == 'fn' and _may_hold(part, where, name):
      part[name] = {}  # a new part: of a name of the user's choice, or of a parameter
    if name not in part:
      raise UserError(f'{where}.{name}: unknown key{hint(name, part)}')
    inner, where = part[name], f'{where}.{name}'
    if not isinstance(inner, ConfigDict):
      name = where.removeprefix('--')
      raise UserError(f'{root}.{key}: {name} is a value and has no keys')
    part = inner
  return part, where, _now(part, where, last)


def _set(part: ConfigDict, where: str, key: str, value: Any) -> None:
  if key == 'fn' and isinstance(value, str):
    value = _function_now(value, f'{where}.{key}')
  with part.unlocked(), part.ignore_type():
    part[key] = value


def _now(part: ConfigDict, where: str, key: str) -> str:
  """The current name of a key; an outdated name is reported."""
  fn = str(part.fn) if is_part(part) else ''
  now = key_now(key, fn, where.partition('.')[2])
  if now != key:
    report_renamed(f'{where}.{key} is now {where}.{now}')
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
    mistake = f'{where}.{key}: {part.fn} has no such key'
  else:
    declared = _key(f'{where}.{key}')
    if declared:
      return declared.kind
    names, mistake = part, f'{where}.{key}: unknown key'
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
