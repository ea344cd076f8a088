"""The typed record of a config, its checks, and the differences between two."""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import re
import typing
from typing import Annotated, Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

from cmjax.configs import papers, parts
from cmjax.core import UserError
from cmjax.runtime import build
from cmjax.runtime.errors import user_errors
from cmjax.runtime.records import (
  MAX_STEPS,
  MAY_CHANGE,
  Bounds,
  Count,
  Evaluation,
  Every,
  Loader,
  MayChange,
  OneOf,
  OptionalPart,
  Part,
  Parts,
  Search,
  Seed,
  StepsOrNever,
  Watchdog,
)

REQUIRED = parts.REQUIRED  # the value of a key that must be given


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
  """A config whose keys and types are checked: the only list of its keys.

  `configs/parts.py:base()` explains each key, and is the only list of defaults.
  """

  seed: Seed
  batch_size: Count
  accumulate: Count
  total_images: Annotated[int, Bounds(1, 2**53)]
  grad_clip_norm: Annotated[float, Bounds(0.0, 1e30)]
  max_skipped_steps: Annotated[StepsOrNever, MAY_CHANGE]
  init_from: str
  teacher: str
  guide: Annotated[str, MAY_CHANGE]
  sample_weights: Annotated[str, MAY_CHANGE]
  sample_relative_std: Annotated[float, Bounds(0.0, 0.288), MAY_CHANGE]
  mesh: Annotated[Part, MAY_CHANGE]
  data: Annotated[Part, MayChange(('data_dir', 'path', 'memory_gib'))]
  loader: Annotated[Loader, MAY_CHANGE]
  network: Part
  precond: Part
  objective: Part
  optimizer: Part
  target_decay: OptionalPart
  reference: OptionalPart
  perceptual: OptionalPart
  ema: Parts
  samplers: Annotated[Parts, MAY_CHANGE]
  metrics: Annotated[Parts, MAY_CHANGE]
  studies: Annotated[Parts, MAY_CHANGE]
  trackers: Annotated[Parts, MAY_CHANGE]
  evaluation: Annotated[Evaluation, MAY_CHANGE]
  search: Annotated[Search, MAY_CHANGE]
  every: Annotated[Every, MAY_CHANGE]
  watchdog: Annotated[Watchdog, MAY_CHANGE]
  keep_checkpoints: Annotated[Count, MAY_CHANGE]

  @property
  def total_steps(self) -> int:
    """Steps until `total_images` examples are seen."""
    return -(-self.total_images // self.batch_size)

  def to_dict(self) -> dict[str, Any]:
    """The config as nested dicts, for JSON."""
    values = {
      field.name: getattr(self, field.name) for field in dataclasses.fields(self)
    }
    for name, value in values.items():
      if isinstance(value, ConfigDict):
        values[name] = value.to_dict()
      elif isinstance(value, Evaluation | Search | Every | Loader | Watchdog):
        values[name] = dataclasses.asdict(value)
    return values

  def replace(self, **values: Any) -> 'Config':
    """A checked copy with some top-level values replaced; parts may be dicts."""
    return checked(ConfigDict(self.to_dict() | values))


class Key(NamedTuple):
  """What `Config` declares about one of its keys."""

  kind: type  # bool, int, float, str, ConfigDict, or a record
  form: str  # of a ConfigDict: 'part', 'optional part' or 'parts'
  bounds: Bounds | None
  one_of: OneOf | None
  may_change: MayChange | None


@functools.cache
def keys_of(record: type) -> dict[str, Key]:
  """The keys of `Config` or of a record within it, by name."""
  keys = {}
  for name, hint in typing.get_type_hints(record, include_extras=True).items():
    kind, *marks = typing.get_args(hint) or (hint,)
    first = {type(mark): mark for mark in reversed(marks)}
    marks = (first.get(mark) for mark in (Bounds, OneOf, MayChange))
    keys[name] = Key(kind, first.get(str, ''), *marks)
  return keys


def may_change(path: str) -> bool:
  """Whether a key, such as `config.every.log_steps`, may change when a run resumes."""
  name, *inner = path.removeprefix('config.').split('.')
  mark = keys_of(Config)[name].may_change
  return mark is not None and (not mark.keys or inner[:1] in [[k] for k in mark.keys])


# Checks ------------------------------------------------------------------------------


def checked(
  config: ConfigDict | Config, where: str = 'config', *, weights_alone: bool = False
) -> Config:
  """The record of a config, its keys, types and bounds checked.

  Args:
    config: as `get_config` returns it; a `Config` is returned as it is.
    where: the name of the config in errors.
    weights_alone: whether parts may be empty, as sampling needs no data or objective.

  Raises: UserError naming the first key that is unknown, missing, of a wrong type or
    out of bounds.
  """
  if isinstance(config, Config):
    return config
  if not isinstance(config, ConfigDict):
    raise UserError(
      f'{where}: get_config() must return a ConfigDict, not a {type(config).__name__}'
    )
  config = config.copy_and_resolve_references()
  record = _record(config, Config, where, weights_alone)
  if not record.samplers:
    raise UserError(f'{where}.samplers: give at least one')
  if weights_alone:
    return record
  if record.total_images // record.batch_size >= MAX_STEPS:
    raise UserError(
      f'{where}.total_images: more than 2**31 steps of {record.batch_size} images'
    )
  return record


Record = TypeVar('Record', Config, Evaluation, Search, Every, Loader, Watchdog)


def _record(
  config: ConfigDict, record: type[Record], where: str, weights_alone: bool
) -> Record:
  """The config as a record, its keys and types checked."""
  keys, values = keys_of(record), {}
  for name in config:
    if name not in keys:
      raise UserError(f'{where}.{name}: unknown key{build.hint(name, keys)}')
  for name, key in keys.items():
    path = f'{where}.{name}'
    if name not in config:
      raise UserError(f'{path}: missing; configs/parts.py:base() holds every key')
    value: Any = config[name]
    if key.kind in (bool, int, float, str):
      build.check_value(value, key.kind, path)
      if key.bounds and not (weights_alone and name == 'total_images'):  # 0: unknown
        _check_bounds(value, key.bounds, path)
      if key.one_of and value not in key.one_of.choices:
        choices = ', '.join(key.one_of.choices)
        raise UserError(f'{path}: must be one of {choices}, got {value!r}')
    elif not isinstance(value, ConfigDict):
      raise UserError(f'{path}: must be a dict, got {value!r}')
    elif key.kind is not ConfigDict:
      value = _record(value, key.kind, path, weights_alone)
    elif key.form == 'parts':
      for inner in value:
        with user_errors(path):
          check_name(inner)
        build.check_part(value[inner], f'{path}.{inner}')
    elif value or not (weights_alone or key.form == 'optional part'):
      build.check_part(value, path)
    values[name] = value
  return record(**values)


def _check_bounds(value: float, bounds: Bounds, where: str) -> None:
  low, high = bounds
  if low <= value <= high:
    return
  if value < low and low in (0, 1):
    least = 'must not be negative' if low == 0 else 'must be positive'
    raise UserError(f'{where}: {least}, got {value!r}')
  raise UserError(f'{where}: must be between {low:g} and {high:,}, got {value!r}')


def require(config: Config) -> None:
  """Raises UserError naming the keys that must be given and are not.

  A `teacher` alone is enough where `init_from` is a reference to it.
  """
  missing = [path for path, value in flat(config).items() if value == REQUIRED]
  if 'config.teacher' in missing and 'config.init_from' in missing:
    missing.remove('config.init_from')  # it refers to the teacher
  if missing:
    raise UserError(f'{", ".join(missing)}: must be given, as in --{missing[0]}=VALUE')


def data_of(name: str) -> tuple[str, ...]:
  """The data sets that a config that ships takes, as in `NAME:DATA`."""
  more = [recipe.partition(':')[2] for recipe in recipes_of(name)]
  more += parts.MORE_DATA.get(name, ())
  return tuple(dict.fromkeys((*parts.DATA, *more)))


def recipes_of(name: str) -> dict[str, str]:
  """The recipes of papers that a config has, `NAME:DATA`, with their published FID."""
  recipes = papers.RECIPES.items()
  return {key: recipe.fid for key, recipe in recipes if key.startswith(f'{name}:')}


def flat(config: ConfigDict | Config) -> dict[str, Any]:
  """The values of a config by dotted path, such as `config.batch_size`."""
  return dict(_leaves(config.to_dict(), 'config'))


def _leaves(config: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
  for key, value in config.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f'{where}.{key}')
    else:
      yield f'{where}.{key}', tuple(value) if isinstance(value, list) else value


def differences(old: ConfigDict | Config, new: ConfigDict | Config) -> dict[str, str]:
  """What differs, by dotted path: {'config.batch_size': '256 -> 128'}."""
  a, b = flat(old), flat(new)
  absent = 'absent'
  return {
    key: f'{a.get(key, absent)} -> {b.get(key, absent)}'
    for key in sorted(a.keys() | b.keys())
    if a.get(key, absent) != b.get(key, absent)
  }


def completed(config: ConfigDict, *, with_parts: bool = True) -> ConfigDict:
  """The config, with defaults for the keys that are missing.

  Without `with_parts`, only for numbers, texts and records: parts stay missing.
  """
  whole, keys = parts.base(), keys_of(Config)
  if not with_parts:
    for name, key in keys.items():
      if key.kind is ConfigDict:
        del whole[name]
  with whole.ignore_type():
    for name, value in config.items():
      default = whole.get(name)
      record = name in keys and dataclasses.is_dataclass(keys[name].kind)
      if record and isinstance(default, ConfigDict) and isinstance(value, ConfigDict):
        default.update(value)
      else:
        whole[name] = value
  return whole


def check_name(key: str) -> None:
  """Raises ValueError unless a key can name a part, and so also a file."""
  if not re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_=.-]{0,63}', key):
    raise ValueError(f'the key {key[:40]!r} is not a name of letters, digits and _=.-')
