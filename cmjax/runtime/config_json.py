"""Configs as JSON text: those of runs, and those stored with weights.

A config read from text is data, not the user's code: the functions that it names are
`Foreign`. Names of earlier versions are translated.
"""

from collections.abc import Iterable, Mapping
import functools
import json
from pathlib import Path
from typing import Any

from cmjax.core import UserError, first_line
from cmjax.runtime import logs, paths
from cmjax.runtime.config_record import Config, ConfigDict, check_name
from cmjax.runtime.functions import Foreign
from cmjax.runtime.renamed import renamed


def to_json(config: ConfigDict | Config) -> str:
  """The config as indented JSON with sorted keys; tuples become lists."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_json(
  text: str, where: str = 'config', trust: Iterable[str] = ()
) -> ConfigDict:
  """The config that `to_json` wrote, possibly in an earlier version of cmjax.

  Its functions are `Foreign`, except those of the packages in `trust`.

  Raises: UserError if the text holds no config.
  """
  try:
    value = json.loads(text)
    if not isinstance(value, dict) or not value:
      raise ValueError('not an object with keys')
    packages = (trust,) if isinstance(trust, str) else tuple(trust)
    return ConfigDict(_from_data(with_names_of_today(value, where), packages))
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise UserError(f'{where}: holds no config ({first_line(error)})') from error


def read_json(path: str | Path, trust: Iterable[str] = ()) -> ConfigDict:
  """`from_json` of a file. Raises: UserError if it cannot be read, or holds none."""
  try:
    text = paths.path(path).read_bytes().decode()
  except (OSError, UnicodeError) as error:
    raise UserError(f'{path}: cannot be read ({first_line(error)})') from error
  return from_json(text, str(path), trust)


def with_names_of_today(config: Mapping[str, Any], where: str) -> dict[str, Any]:
  """The config with outdated names translated; each is reported once."""
  new, lines = renamed(config)
  for line in lines:
    report_renamed(f'{where}: {line}')
  return new


@functools.cache
def report_renamed(line: str) -> None:
  """Prints a line, if it has not been printed before."""
  logs.say(line)


def _from_data(value: Any, trust: tuple[str, ...]) -> Any:
  if isinstance(value, dict):
    for key in value:
      check_name(key)
    part = {key: _from_data(item, trust) for key, item in value.items()}
    if 'fn' in part:
      if not isinstance(part['fn'], str):
        raise ValueError('the name of a function is not text')
      part['fn'] = Foreign(part['fn'], trust)
    return part
  if isinstance(value, list):
    return tuple(_from_data(item, trust) for item in value)
  return value
