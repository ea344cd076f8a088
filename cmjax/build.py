"""Parts of a config -> functions called with checked keywords.

A part names a function by import path, `fn='package.module:function'`, and the
function's signature is the part's schema. What a part must be follows from where it
stands: a top-level key, or the annotation of the parameter it is for. A function that
returns another kind of thing is refused.

A part of a config that came with weights names its function by a `Foreign` string. Such
a function is called only if it is one of `cmjax` (or, in an optimiser, of optax) that
returns the kind wanted, or of a package that the user trusts; no other is imported.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import difflib
import importlib
import inspect
import math
import sys
from types import TracebackType, UnionType
import typing
from typing import Any

from ml_collections import ConfigDict
import optax

from cmjax.core import Model, Network, Schedule, UserError, first_line
from cmjax.distances import Distance, Weighting
from cmjax.oracles import Mixture
from cmjax.times import Pairs, Times

_PLAIN = (bool, int, float, str)
MOST = 2**53  # of an integer: above it a float cannot count


class Foreign(str):
  """A function's import path in a config that came as data."""

  __slots__ = ('trusted',)

  def __new__(cls, path: str, trusted: Iterable[str] = ()):
    """`trusted`: packages whose functions may be imported and called."""
    self = super().__new__(cls, path)
    self.trusted = tuple(name for name in trusted if name not in ('cmjax', 'optax'))
    return self

  def __reduce__(self):
    """Copies stay foreign."""
    return Foreign, (str(self), self.trusted)


def build(spec: ConfigDict, where: str, kind: Any = None, **given: Any) -> Any:
  """Calls the function a part names, with the part's own keywords.

  A value that is itself a part is built first. Of `given`, what the run provides (a
  model, the batch size), a function receives the names its signature holds.

  Args:
    spec: the part.
    where: its dotted path, for errors.
    kind: the type that is needed, as functions annotate it; None: any.
    **given: what the run provides.

  Raises: UserError naming the function, the key and what the function takes. An error
    raised by a function outside cmjax and its libraries keeps its traceback.
  """
  fn = function(spec.fn, f'{where}.fn', kind)
  parameters = inspect.signature(fn).parameters
  keywords = {}
  for key in spec:
    if key == 'fn':
      continue
    if key not in parameters:
      takes = [name for name in parameters if name not in given]
      raise UserError(f'{where}.{key}: {spec.fn} has no such key{hint(key, takes)}')
    if key in given:
      raise UserError(f'{where}.{key}: is set by the run, leave it out')
    value, annotation = spec[key], parameters[key].annotation
    if isinstance(value, ConfigDict):
      if annotation in _PLAIN or _is_sequence(annotation):
        raise UserError(f'{where}.{key}: must be a value, and has keys of its own')
      check_part(value, f'{where}.{key}')
      value = build(value, f'{where}.{key}', _inner_kind(spec.fn, annotation), **given)
    elif _is_function(annotation):
      raise UserError(
        f"{where}.{key}: needs fn='package.module:function', got {value!r}"
      )
    else:
      check_value(value, annotation, f'{where}.{key}')
      if spec.fn.startswith('optax'):
        _check_rate(key, value, f'{where}.{key}')
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
  with user_errors(where):
    built = fn(**keywords)
  _check_built(built, spec.fn, f'{where}.fn', kind)
  return built


def build_each(
  parts: ConfigDict, where: str, kind: Any = None, **given: Any
) -> dict[str, Any]:
  """Builds every part of a dict of parts, by name."""
  return {name: build(parts[name], f'{where}.{name}', kind, **given) for name in parts}


def build_model(config: ConfigDict) -> tuple[Network, Model]:
  """The raw network, and the model it becomes through its preconditioning."""
  network = build(config.network, 'config.network', Network)
  return network, build(config.precond, 'config.precond', Model, network=network)


def schedules(config: ConfigDict, **given: Any) -> dict[str, Schedule]:
  """Every part that is a schedule of `cmjax.schedules`, built, by dotted path."""
  found = {}

  def walk(part, where):
    for key in part:
      value = part[key]
      if is_part(value) and str(value.fn).startswith('cmjax.schedules:'):
        found[f'{where}.{key}'] = build(value, f'{where}.{key}', Schedule, **given)
      elif isinstance(value, ConfigDict):
        walk(value, f'{where}.{key}')

  walk(config, 'config')
  return found


def is_part(value: Any) -> bool:
  """Whether a config value names a function to build."""
  return isinstance(value, ConfigDict) and 'fn' in value


def check_part(value: Any, where: str) -> None:
  """Raises UserError unless the value is a dict with the import path of a function."""
  if not is_part(value) or not isinstance(value.fn, str):
    raise UserError(f"{where}: needs fn='package.module:function'")


def parameters(path: str, where: str) -> dict[str, inspect.Parameter]:
  """The parameters of the function at an import path, by name.

  Raises: UserError if there is no such function, or it is foreign and not trusted.
  """
  package = path.partition(':')[0].partition('.')[0]
  if isinstance(path, Foreign) and package not in ('cmjax', 'optax', *path.trusted):
    raise _refusal(path, where, None)
  return dict(inspect.signature(_imported(path, where)).parameters)


def hint(key: str, known: Iterable[str]) -> str:
  """What a mistyped key may have meant, as the end of an error."""
  known = list(known)
  initials = {''.join(word[:1] for word in name.split('_')): name for name in known}
  close = next(iter(difflib.get_close_matches(key, known, n=1)), initials.get(key))
  return f', did you mean {close}?' if close else f'; known: {", ".join(known)}'


def check_value(value: Any, annotation: Any, where: str) -> None:
  """Raises UserError for a value of another type than the annotation's, and for NaN."""
  if annotation in _PLAIN:
    allowed = (int, float) if annotation is float else annotation
    wrong_bool = isinstance(value, bool) and annotation is not bool
    if not isinstance(value, allowed) or wrong_bool:
      raise UserError(f'{where}: must be {annotation.__name__}, got {value!r}')
  for number in value if isinstance(value, tuple | list) else [value]:
    if isinstance(number, float) and not math.isfinite(number):
      raise UserError(f'{where}: must be finite, got {value!r}')
    if isinstance(number, int) and abs(number) > MOST:
      raise UserError(f'{where}: must not exceed 2**53')
  items = getattr(annotation, '__args__', ())
  if items[:1] and items[0] in (int, float, str) and _is_sequence(annotation):
    if not isinstance(value, tuple | list):
      raise UserError(f'{where}: must be a tuple of {items[0].__name__}, got {value!r}')
    for item in value:
      check_value(item, items[0], where)


# What kind of thing a function makes ------------------------------------------------


# What a foreign part inside a part may be where no annotation tells.
_ALGEBRA = Schedule | Distance | Weighting | Times | Pairs | Mixture


def function(path: str, where: str, kind: Any) -> Callable[..., Any]:
  """The function at an import path, if one of its kind may stand there.

  Raises: UserError if there is no such function, it returns another kind, or it is
    foreign and not to be called.
  """
  package = path.partition(':')[0].partition('.')[0]
  foreign = isinstance(path, Foreign) and package not in path.trusted
  if foreign and kind is None:
    kind = _ALGEBRA
  hidden = path.rpartition(':')[2].startswith('_')
  if foreign and (package not in _packages_for(kind) or hidden):
    raise _refusal(path, where, kind)
  found = _imported(path, where)
  returned = inspect.signature(found).return_annotation
  silent = returned in (inspect.Signature.empty, Any) or isinstance(returned, str)
  fits = kind is None or silent or _is_kind(returned, kind)
  if foreign and (silent or not fits):
    raise _refusal(path, where, kind)
  if not fits:
    raise UserError(
      f'{where}: {path} returns {_name(returned)}, and this needs {_name(kind)}'
    )
  return found


def _imported(path: str, where: str) -> Callable[..., Any]:
  module, _, name = path.partition(':')
  with user_errors(where):
    try:
      found = getattr(importlib.import_module(module), name)
      inspect.signature(found)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
      if frame_of_user(error):
        raise
      told = f'cannot import {str(path)!r} ({first_line(error)})'
      raise UserError(f'{where}: {told}') from error
  return found


def _packages_for(kind: Any) -> tuple[str, ...]:
  optimiser = _is_kind(optax.GradientTransformation, kind)
  return ('cmjax', 'optax') if optimiser else ('cmjax',)


def _refusal(path: Foreign, where: str, kind: Any) -> UserError:
  package = path.partition(':')[0].partition('.')[0]
  wanted = '' if kind is None else f' that returns {_name(kind)}'
  way_out = 'its config is damaged, or hostile'
  if package.isidentifier() and package not in ('cmjax', 'optax'):
    way_out = (
      f'if you wrote or checked the package {package}, give --trust={package}, or '
      f'trust=({package!r},) to load'
    )
  return UserError(
    f'{where}: the config that came with the weights names {str(path)!r}, which is not '
    f'a function of cmjax{wanted}, so it was not called; {way_out}'
  )


def _inner_kind(path: str, annotation: Any) -> Any:
  """What a part inside a part must be, by the annotation of its parameter."""
  if path.startswith('optax'):  # annotations of optax's own: a rate, or an optimiser
    return Schedule | optax.GradientTransformation
  return None if annotation in (inspect.Parameter.empty, Any) else annotation


def _is_kind(returned: Any, kind: Any) -> bool:
  """Whether what a function returns can stand where `kind` is needed."""
  for wanted in _members(kind):
    if returned == wanted:
      return True
    if isinstance(returned, type) and isinstance(wanted, type):
      protocol = getattr(wanted, '_is_protocol', False)
      if not protocol and issubclass(returned, wanted):
        return True
  return False


def _members(kind: Any) -> tuple[Any, ...]:
  union = typing.get_origin(kind) in (typing.Union, UnionType)
  return typing.get_args(kind) if union else (kind,)


def _is_function(annotation: Any) -> bool:
  """Whether an annotation stands for a function, which a config must name."""
  return typing.get_origin(annotation) is Callable or '__call__' in getattr(
    annotation, '__dict__', {}
  )


def _is_sequence(annotation: Any) -> bool:
  origin = typing.get_origin(annotation)
  return isinstance(origin, type) and issubclass(origin, Sequence)


def _check_built(built: Any, path: str, where: str, kind: Any) -> None:
  """Refuses what is plainly of another kind, from functions without annotations."""
  for wanted in _members(kind):
    if isinstance(wanted, type) and not getattr(wanted, '_is_protocol', False):
      fits = isinstance(built, wanted)
    else:
      fits = not _is_function(wanted) or callable(built)
    if fits:
      return
  made = f'a value of type {type(built).__name__}'
  raise UserError(f'{where}: {path} returned {made}, and this needs {_name(kind)}')


def _name(kind: Any) -> str:
  names = [
    getattr(member, '__name__', None) or str(member).rpartition('.')[2]
    if isinstance(member, type) or hasattr(member, '__supertype__')
    else 'a function'
    for member in _members(kind)
  ]
  return ' or '.join(dict.fromkeys(names))


# Optimisers of optax check no rates of their own.
_SHARES = {'b1', 'b2', 'b3', 'decay', 'momentum', 'decay_rate', 'beta'}
_NOT_NEGATIVE = {'eps', 'eps_root', 'weight_decay', 'learning_rate', 'epsilon'}


def _check_rate(key: str, value: Any, where: str) -> None:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return
  if key in _SHARES and not 0 <= value < 1:
    raise UserError(f'{where}: must be in [0, 1), got {value!r}')
  if key in _NOT_NEGATIVE and value < 0:
    raise UserError(f'{where}: must not be negative, got {value!r}')


# Whose mistake an error is -----------------------------------------------------------


@contextlib.contextmanager
def user_errors(where: str) -> Iterator[None]:
  """Within it, a ValueError or TypeError of ours becomes a UserError of one line.

  One that a function of the user's raised keeps its traceback, with a note of which
  part of the config called it.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if frame_of_user(error):
      error.add_note(f'raised in {where}')
      raise
    if isinstance(error, ValueError | TypeError | ArithmeticError | MemoryError):
      raise UserError(f'{where}: {first_line(error)}') from error
    raise


# Packages that raise on behalf of whoever called them.
_LIBRARIES = {
  *('cmjax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'numpy', 'ml_collections'),
  *('tqdm', 'tensorboardX', 'tensorboard', 'clu', 'absl', 'safetensors', 'msgpack'),
  *('tensorstore', 'array_record', 'google', 'xxhash'),
  *('tensorflow_datasets', 'etils', 'sklearn', 'scipy', 'joblib', 'PIL', 'matplotlib'),
  *sys.stdlib_module_names,
}


def frame_of_user(error: BaseException) -> TracebackType | None:
  """The traceback from its first line that is of neither cmjax nor a library."""
  trace = error.__traceback__
  while trace is not None:
    module = trace.tb_frame.f_globals
    spec = module.get('__spec__')  # says what `python -m` calls __main__
    name = spec.name if spec else module.get('__name__', '')
    if name.partition('.')[0] not in _LIBRARIES:
      return trace
    trace = trace.tb_next
  return None
