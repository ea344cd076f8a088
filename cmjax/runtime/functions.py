"""Imports the functions that configs name, if they may be called.

A part of a config that came with weights names its function by a `Foreign` string. Such
a function is imported and called only if it belongs to `cmjax` (an optimiser or a
schedule also to optax) and returns the kind that is needed, or to a trusted package.
"""

from collections.abc import Callable, Iterable, Sequence
import importlib
from importlib.machinery import ModuleSpec, PathFinder
import inspect
from pathlib import Path
import sys
from types import ModuleType, UnionType
import typing
from typing import Any

import optax

from cmjax.core import Schedule, UserError, first_line
from cmjax.distances import Distance
from cmjax.oracles import Mixture
from cmjax.runtime.errors import frame_of_user, user_errors
from cmjax.times import Pairs, Times
from cmjax.weightings import Weighting

EITHER_SCHEDULE = Schedule | optax.Schedule  # they differ only in their annotations
OPTAX_PARTS = EITHER_SCHEDULE | optax.GradientTransformation
# The kinds that a foreign part may have for a parameter without an annotation.
_ALGEBRA = EITHER_SCHEDULE | Distance | Weighting | Times | Pairs | Mixture


class Foreign(str):
  """The import path of a function, from a config that is data, not the user's code."""

  __slots__ = ('trusted',)
  trusted: tuple[str, ...]

  def __new__(cls, path: str, trusted: Iterable[str] = ()):
    """`trusted`: packages whose functions may be imported and called."""
    self = super().__new__(cls, path)
    self.trusted = tuple(name for name in trusted if name not in ('cmjax', 'optax'))
    return self

  def __reduce__(self):
    """Copies stay foreign."""
    return Foreign, (str(self), self.trusted)


class _Folders:
  """Finds modules in the user's folders, after every other finder.

  A module in them cannot hide an installed one, and `sys.path` is not changed. The
  finder stays, because a function of the user may import a neighbour at any time.
  """

  def __init__(self):
    self.folders: list[str] = []

  def find_spec(
    self,
    fullname: str,
    path: Sequence[str] | None = None,
    target: ModuleType | None = None,
  ) -> ModuleSpec | None:
    """The spec of a top-level module in one of the folders."""
    return None if path else PathFinder.find_spec(fullname, self.folders, target)


_user_folders = _Folders()


def allow_imports_from(folder: str | Path) -> None:
  """Lets configs import, and name functions of, the modules in a folder."""
  if str(folder) not in _user_folders.folders:
    _user_folders.folders.append(str(folder))
  if _user_folders not in sys.meta_path:
    sys.meta_path.append(_user_folders)


def parameters(path: str, where: str) -> dict[str, inspect.Parameter]:
  """The parameters of the function at an import path, by name.

  Raises: UserError if there is no such function, or it is foreign and not trusted.
  """
  return dict(_foreign_checked(path, where).parameters)


def function(path: str, where: str, kind: Any) -> Callable[..., Any]:
  """The function at an import path, if it may be called and returns `kind`.

  Raises: UserError if there is no such function, it returns another kind, or it is
    foreign and may not be called.
  """
  foreign = isinstance(path, Foreign) and _package(path) not in path.trusted
  if foreign:
    kind = _ALGEBRA if kind is None else kind
    hidden = path.rpartition(':')[2].startswith('_')
    if _package(path) not in _packages_for(kind) or hidden:
      raise _refusal(path, where, kind)
  fn = _imported(path, where)
  returned = signature(fn).return_annotation
  fits = kind is None or is_kind(returned, kind)
  if foreign and (is_silent(returned) or not fits):
    raise _refusal(path, where, kind)
  if not fits and not is_silent(returned):
    raise UserError(
      f'{where}: {path} returns {name_of_kind(returned)}, not {name_of_kind(kind)}'
    )
  return fn


def is_schedule(path: str, where: str, kind: Any) -> bool:
  """Whether the function at a path returns a schedule: of cmjax, optax or the user.

  By its return annotation or, without one, by the kind that its place needs.

  Raises: UserError if there is no such function, or it is foreign and not trusted.
  """
  returned = _foreign_checked(path, where).return_annotation
  if not is_silent(returned):
    return is_kind(returned, EITHER_SCHEDULE)
  return any(is_kind(member, EITHER_SCHEDULE) for member in members_of(kind))


def _foreign_checked(path: str, where: str) -> inspect.Signature:
  """The signature of a function whose package may be imported."""
  trusted = ('cmjax', 'optax', *(path.trusted if isinstance(path, Foreign) else ()))
  if isinstance(path, Foreign) and _package(path) not in trusted:
    raise _refusal(path, where, None)
  return signature(_imported(path, where))


def _package(path: str) -> str:
  return path.partition(':')[0].partition('.')[0]


def _imported(path: str, where: str) -> Callable[..., Any]:
  module, _, name = path.partition(':')
  with user_errors(where):
    try:
      fn = getattr(importlib.import_module(module), name)
      inspect.signature(fn)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
      if frame_of_user(error):
        raise
      raise UserError(
        f'{where}: cannot import {str(path)!r} ({first_line(error)})'
      ) from error
  return fn


def signature(fn: Callable[..., Any]) -> inspect.Signature:
  """The signature, with annotations evaluated where they are strings."""
  try:
    return inspect.signature(fn, eval_str=True)
  except Exception:  # a name that exists only for type checkers
    return inspect.signature(fn)


def is_silent(annotation: Any) -> bool:
  """Whether an annotation is missing, Any, or cannot be evaluated."""
  return annotation in (inspect.Parameter.empty, Any) or isinstance(annotation, str)


def _packages_for(kind: Any) -> tuple[str, ...]:
  of_optax = (optax.GradientTransformation, optax.Schedule)
  return ('cmjax', 'optax') if any(is_kind(k, kind) for k in of_optax) else ('cmjax',)


def _refusal(path: str, where: str, kind: Any) -> UserError:
  package = _package(path)
  returning = '' if kind is None else f' that returns {name_of_kind(kind)}'
  advice = 'the config is damaged or hostile'
  if package.isidentifier() and package not in ('cmjax', 'optax'):
    advice = (
      f'if you wrote or checked the package {package}, give --trust={package}, or '
      f'trust=({package!r},) to load'
    )
  return UserError(
    f'{where}: the config that came with the weights names {str(path)!r}, which is not '
    f'a function of cmjax{returning}, so it was not called; {advice}'
  )


def is_kind(returned: Any, kind: Any) -> bool:
  """Whether what a function returns can be used where `kind` is needed."""
  for member in members_of(kind):
    if returned == member:
      return True
    if member == Schedule and returned == optax.Schedule:
      return True
    if isinstance(returned, type) and isinstance(member, type):
      protocol = getattr(member, '_is_protocol', False)
      if not protocol and issubclass(returned, member):
        return True
  return False


def members_of(kind: Any) -> tuple[Any, ...]:
  """The members of a union, or the kind itself."""
  union = typing.get_origin(kind) in (typing.Union, UnionType)
  return typing.get_args(kind) if union else (kind,)


def name_of_kind(kind: Any) -> str:
  """The name of a kind, for errors."""
  names = [
    getattr(member, '__name__', None) or str(member).rpartition('.')[2]
    if isinstance(member, type) or hasattr(member, '__supertype__')
    else 'a function'
    for member in members_of(kind)
  ]
  return ' or '.join(dict.fromkeys(names))
