"""Which network a released file holds, and where in it each of our parameters is.

`assemble` follows a `Plan` to the letter: a tensor that is missing, has another shape,
or is left over is named in the error.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
import re
import reprlib
from typing import Any, NamedTuple

import numpy as np

from cmjax.core import Params, UserError

Address = tuple[str, ...]  # of one of our parameters: ('enc_32x32_conv', 'kernel')
Tensors = dict[str, np.ndarray]
Layout = Callable[[np.ndarray], np.ndarray]
Find = Callable[[Address], tuple[str, Layout]]  # a parameter here -> its name there


MOST_PIXELS = 2**14  # on a side of an image, and features of a point
MOST_CLASSES = 10**6


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: Any) -> str:
  """A value out of a file as an error repeats it: in one short line."""
  return ' '.join(_SHORT.repr(value).split())[:120]


def shape_of(value: Any, where: str) -> tuple[int, ...]:
  """The shape of one example, [H, W, C] or [C].

  Raises: UserError unless it is one or three whole numbers of a size that images have.
  """
  known = isinstance(value, list | tuple) and len(value) in (1, 3)
  if not known or not all(type(n) is int and 0 < n <= MOST_PIXELS for n in value):
    raise UserError(
      f'{where}: the shape must be 1 or 3 whole numbers in [1, {MOST_PIXELS}], got '
      f'{shown(value)}'
    )
  return tuple(value)


def classes_of(value: Any, where: str) -> int:
  """The number of labels; raises UserError unless it is a whole number in range."""
  if type(value) is not int or not 0 <= value <= MOST_CLASSES:
    raise UserError(
      f'{where}: the number of classes must be in [0, {MOST_CLASSES}], got '
      f'{shown(value)}'
    )
  return value


class Plan(NamedTuple):
  """Which model a file holds, as config parts, and how to read its parameters."""

  origin: str  # whose format it is
  network: dict[str, Any]
  precond: dict[str, Any]
  shape: tuple[int, int, int]  # H, W, C
  classes: int  # 0: unconditional
  tensors: Tensors  # under the file's own names
  find: Find
  computed: str = '^$'  # pattern of tensors that our network computes itself


def assemble(plan: Plan, like: Params, path: str | Path) -> tuple[Params, list[str]]:
  """Our parameters as numpy arrays in the shapes of `like`, and the names left over.

  The plan's tensors are used up on the way, so that each is held only once.

  Raises: UserError naming the first parameter that is missing, of another shape, or
    not finite.
  """

  def walk(tree, address):
    if isinstance(tree, Mapping):
      return {key: walk(tree[key], (*address, key)) for key in tree}
    ours = '/'.join(address)
    try:
      name, layout = plan.find(address)
    except (KeyError, ValueError) as error:
      raise UserError(f'{path} has no parameter {ours}; another network?') from error
    if name not in plan.tensors:
      raise UserError(f'{path} has no {name}, which parameter {ours} needs')
    theirs = plan.tensors.pop(name)
    try:
      found = layout(theirs)
    except ValueError:  # of another number of axes, or not in thirds
      found = theirs
    if found.shape != tree.shape:
      raise UserError(
        f'{path}: {name} has shape {shown(found.shape)} where parameter {ours} needs '
        f'{tree.shape}; it is of another network'
      )
    found = np.asarray(found, tree.dtype, order='C')
    if not np.isfinite(found).all():
      raise UserError(f'{path}: {name} is not finite; the file is damaged')
    return found

  params = walk(like, ())
  over = (name for name in plan.tensors if not re.search(plan.computed, name))
  return params, sorted(over)


def own(
  tensors: Tensors, meta: Mapping[str, Any], network: dict, precond: dict
) -> Plan:
  """The plan of a file of ours: names and layouts are ours already."""
  return Plan(
    origin=meta['origin'],
    network=network,
    precond=precond,
    shape=tuple(meta['shape']),
    classes=meta['classes'],
    tensors=tensors,
    find=lambda address: ('/'.join(address), as_is),
  )


LEAVES = {'kernel': 'weight', 'scale': 'weight'}  # of flax, and of torch


def as_is(a: np.ndarray) -> np.ndarray:
  """The layout of what is laid out as here."""
  return a


def from_torch(a: np.ndarray) -> np.ndarray:
  """[out, in, H, W] -> [H, W, in, out], and [out, in] -> [in, out]."""
  return a.transpose((*range(2, a.ndim), 1, 0)) if a.ndim > 1 else a


def sines_first(a: np.ndarray) -> np.ndarray:
  """The first dense layer of ADM, which meets cosines first there and last here."""
  return np.roll(from_torch(a), a.shape[-1] // 2, axis=0) if a.ndim > 1 else a


def alternating(a: np.ndarray) -> np.ndarray:
  """Output channels all q, all k, all v -> q, k, v, q, k, v, ... on the last axis."""
  thirds = np.reshape(a, (*a.shape[:-1], 3, -1))
  return np.reshape(np.swapaxes(thirds, -1, -2), a.shape)
