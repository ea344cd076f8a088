"""Builds the parts of a config: calls their functions with checked keywords.

A part names a function by import path, `fn='package.module:function'`, and the
function's signature is the schema of the part. What a part must return follows from its
place: a top-level key, or the annotation of a parameter. A function that returns
another kind raises UserError.
"""

from collections.abc import Callable, Iterable, Sequence
import difflib
import functools
import math
import typing
from typing import Any, Literal, TypeGuard, cast

from ml_collections import ConfigDict

from cmjax.core import Model, Network, UserError
from cmjax.runtime.errors import user_errors
from cmjax.runtime.functions import (
  OPTAX_PARTS,
  function,
  is_silent,
  members_of,
  name_of_kind,
  signature,
)

_PLAIN = (bool, int, float, str)
_LARGEST = 2**53  # of an integer: float64 does not represent all larger ones


def build(spec: ConfigDict, where: str, kind: Any = None, **given: Any) -> Any:
  """Calls the function that a part names, with the part's own keywords.

  A value that is itself a part is built first. `given` holds what the run provides,
  such as a model or the batch size; a function receives those that its signature names.

  Args:
    spec: the part.
    where: its dotted path, for errors.
    kind: the return type that is needed, as functions annotate it; any if None.
    **given: what the run provides.

  Raises: UserError naming the function, the key and the keys that the function takes.
    An error raised by a function outside cmjax and its libraries keeps its traceback.
  """
  call = bound(spec, where, kind, **given)
  with user_errors(where):
    built = call()
  _check_built(built, path_of(spec), f'{where}.fn', kind)
  return built


def bound(
  spec: ConfigDict, where: str, kind: Any = None, **given: Any
) -> functools.partial[Any]:
  """The call that `build` makes, with the same arguments and errors."""
  path = path_of(spec)
  fn = function(path, f'{where}.fn', kind)
  parameters = signature(fn).parameters
  keywords = {}
  for key in spec:
    if key == 'fn':
      continue
    if key not in parameters:
      names = [name for name in parameters if name not in given]
      raise UserError(f'{where}.{key}: {path} has no such key{hint(key, names)}')
    if key in given:
      raise UserError(f'{where}.{key}: is set by the run; leave it out')
    annotation = parameters[key].annotation
    keywords[key] = _value(spec[key], path, f'{where}.{key}', annotation, given)
  keywords |= {key: value for key, value in given.items() if key in parameters}
  for name, parameter in parameters.items():
    if name in keywords or parameter.default is not parameter.empty:
      continue
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
      continue
    if name == 'teacher':
      raise UserError(f'{where}: {path} needs a teacher; give --config.teacher=PATH')
    raise UserError(f'{where}.{name}: missing; {path} needs it')
  return functools.partial(fn, **keywords)


def build_each(
  parts: ConfigDict, where: str, kind: Any = None, **given: Any
) -> dict[str, Any]:
  """Builds every part of a dict of parts, by name."""
  return {
    name: build(cast(ConfigDict, part), f'{where}.{name}', kind, **given)
    for name, part in parts.items()
  }


def build_model(config: Any) -> tuple[Network, Model]:
  """The raw network of a `Config` or `ConfigDict`, and the model with its precond."""
  network = build(config.network, 'config.network', Network)
  return network, build(config.precond, 'config.precond', Model, network=network)


def path_of(part: ConfigDict) -> str:
  """The import path of the function that a part names."""
  return cast(str, part.fn)  # by `check_part`


def is_part(value: Any) -> TypeGuard[ConfigDict]:
  """Whether a config value names a function to build."""
  return isinstance(value, ConfigDict) and 'fn' in value


def check_part(value: Any, where: str) -> None:
  """Raises UserError unless the value is a dict with the import path of a function."""
  if not is_part(value) or not isinstance(value.fn, str):
    raise UserError(f"{where}: needs fn='package.module:function'")


def hint(key: str, names: Iterable[str]) -> str:
  """The name that a mistyped key is close to, or all names, as the end of an error."""
  names = list(names)
  initials = {''.join(word[:1] for word in name.split('_')): name for name in names}
  close = next(iter(difflib.get_close_matches(key, names, n=1)), initials.get(key))
  return f', did you mean {close}?' if close else f'; known: {", ".join(names)}'


def check_value(value: Any, annotation: Any, where: str) -> None:
  """Raises UserError if a value does not have the annotated type or is out of range.

  Floats must be finite, and integers at most 2**53 in magnitude.
  """
  if annotation in _PLAIN:
    allowed = (int, float) if annotation is float else annotation
    wrong_bool = isinstance(value, bool) and annotation is not bool
    if not isinstance(value, allowed) or wrong_bool:
      raise UserError(f'{where}: must be {annotation.__name__}, got {value!r}')
  if typing.get_origin(annotation) is Literal and value not in typing.get_args(
    annotation
  ):
    choices = ', '.join(map(str, typing.get_args(annotation)))
    raise UserError(f'{where}: must be one of {choices}, got {value!r}')
  for number in value if isinstance(value, tuple | list) else [value]:
    if isinstance(number, float) and not math.isfinite(number):
      raise UserError(f'{where}: must be finite, got {value!r}')
    if isinstance(number, int) and abs(number) > _LARGEST:
      raise UserError(f'{where}: must not exceed 2**53')
  kind = next(iter(typing.get_args(annotation)), None)
  if kind in (int, float, str) and _is_sequence(annotation):
    if not isinstance(value, tuple | list):
      raise UserError(f'{where}: must be a tuple of {kind.__name__}, got {value!r}')
    for item in value:
      check_value(item, kind, where)


def _value(
  value: Any, path: str, where: str, annotation: Any, given: dict[str, Any]
) -> Any:
  """A keyword of the function at `path`, checked, or built if it is a part."""
  if isinstance(value, ConfigDict):
    if annotation in _PLAIN or _is_sequence(annotation):
      raise UserError(f'{where}: must be a value, but has keys of its own')
    check_part(value, where)
    # optax annotates optimisers and schedules with its own types.
    inner = OPTAX_PARTS if path.startswith('optax') else annotation
    return build(value, where, None if is_silent(inner) else inner, **given)
  others = [kind for kind in members_of(annotation) if not _is_function(kind)]
  if not others or (others == [type(None)] and value is not None):
    raise UserError(f"{where}: needs fn='package.module:function', got {value!r}")
  check_value(value, annotation, where)
  if path.startswith('optax'):
    _check_of_optax(value, where)
  return value


def _is_function(annotation: Any) -> bool:
  """Whether an annotation is the type of a function, which a config gives by name."""
  return typing.get_origin(annotation) is Callable or '__call__' in getattr(
    annotation, '__dict__', {}
  )


def _is_sequence(annotation: Any) -> bool:
  origin = typing.get_origin(annotation)
  return isinstance(origin, type) and issubclass(origin, Sequence)


def _check_built(built: Any, path: str, where: str, kind: Any) -> None:
  """Raises UserError if a built value is not of the kind, as far as can be checked."""
  for member in members_of(kind):
    protocol = getattr(member, '_is_protocol', False)
    if isinstance(member, type) and (
      not protocol or getattr(member, '_is_runtime_protocol', False)
    ):
      fits = isinstance(built, member)
    else:
      fits = not _is_function(member) or callable(built)
    if fits:
      return
  raise UserError(
    f'{where}: {path} returned a value of type {type(built).__name__}, not '
    f'{name_of_kind(kind)}'
  )


# Arguments that the optimisers of optax do not check.
_FRACTIONS = {'b1', 'b2', 'b3', 'decay', 'momentum', 'decay_rate', 'beta'}
_NOT_NEGATIVE = {'eps', 'eps_root', 'weight_decay', 'learning_rate', 'epsilon'}


def _check_of_optax(value: Any, where: str) -> None:
  key = where.rpartition('.')[2]
  if isinstance(value, bool) or not isinstance(value, int | float):
    return
  if key in _FRACTIONS and not 0 <= value < 1:
    raise UserError(f'{where}: must be in [0, 1), got {value!r}')
  if key in _NOT_NEGATIVE and value < 0:
    raise UserError(f'{where}: must not be negative, got {value!r}')
