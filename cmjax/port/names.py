"""How the parameters of a network map to the tensors of a file.

`assemble` carries out a `Plan` and names tensors that are missing, unused, or of
another shape.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
import re
import reprlib
from typing import Any, NamedTuple

import numpy as np

from cmjax.core import Params, UserError

Address = tuple[str, ...]  # path of a parameter: ('enc_32x32_conv', 'kernel')
Tensors = dict[str, np.ndarray]
Layout = Callable[[np.ndarray], np.ndarray]
# The tensor of the file that a parameter comes from, and how to transpose it.
Locate = Callable[[Address], tuple[str, Layout]]

MAX_PIXELS = 2**14  # per side of an image; also the features of a point
MAX_CLASSES = 10**6


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def short_repr(value: Any) -> str:
  """The repr of a value from a file, cut to one line of at most 120 characters."""
  return ' '.join(_SHORT.repr(value).split())[:120]


def shape_of(value: Any, where: str) -> tuple[int, ...]:
  """The shape of one example, [H, W, C] or [C].

  Raises: UserError unless it is 1 or 3 whole numbers in [1, MAX_PIXELS].
  """
  valid = isinstance(value, list | tuple) and len(value) in (1, 3)
  if not valid or not all(type(n) is int and 0 < n <= MAX_PIXELS for n in value):
    raise UserError(
      f'{where}: the shape must be 1 or 3 whole numbers in [1, {MAX_PIXELS}], got '
      f'{short_repr(value)}'
    )
  return tuple(value)


def classes_of(value: Any, where: str) -> int:
  """The number of classes; raises UserError unless in [0, MAX_CLASSES]."""
  if type(value) is not int or not 0 <= value <= MAX_CLASSES:
    raise UserError(
      f'{where}: the number of classes must be in [0, {MAX_CLASSES}], got '
      f'{short_repr(value)}'
    )
  return value


class Plan(NamedTuple):
  """The model a file holds, as parts of a config, and how to read its parameters."""

  origin: str  # whose format it is
  network: dict[str, Any]
  precond: dict[str, Any]
  shape: tuple[int, ...]  # of one example: (H, W, C) or (C,)
  classes: int  # 0: unconditional
  tensors: Tensors  # by their names in the file
  locate: Locate
  computed: str = '^$'  # pattern of tensors that our network computes


def assemble(plan: Plan, like: Params, path: str | Path) -> tuple[Params, list[str]]:
  """Parameters as numpy arrays with the shapes of `like`, and names of unused tensors.

  Removes the tensors it uses from the plan, so that each is in memory only once.

  Raises: UserError naming the first tensor that is missing, of another shape, or not
    finite.
  """

  def walk(tree, address):
    if isinstance(tree, Mapping):
      return {key: walk(tree[key], (*address, key)) for key in tree}
    ours = '/'.join(address)
    try:
      name, layout = plan.locate(address)
    except (KeyError, ValueError) as error:
      raise UserError(
        f'{path}: has no parameter {ours}; is it of another network?'
      ) from error
    if name not in plan.tensors:
      raise UserError(f'{path}: has no tensor {name} for the parameter {ours}')
    tensor = plan.tensors.pop(name)
    try:
      array = layout(tensor)
    except ValueError:  # another number of axes, or not divisible into q, k and v
      array = tensor
    if array.shape != tree.shape:
      raise UserError(
        f'{path}: {name} has shape {short_repr(array.shape)}, but the parameter {ours} '
        f'has {tree.shape}; it is of another network'
      )
    array = np.asarray(array, tree.dtype, order='C')
    if not np.isfinite(array).all():
      raise UserError(
        f'{path}: {name} has values that are not finite; download it again'
      )
    return array

  params = walk(like, ())
  unused = (name for name in plan.tensors if not re.search(plan.computed, name))
  return params, sorted(unused)


def native_plan(
  tensors: Tensors, meta: Mapping[str, Any], network: dict, precond: dict
) -> Plan:
  """The plan of a file that cmjax wrote: no name or layout differs."""
  return Plan(
    origin=meta['origin'],
    network=network,
    precond=precond,
    shape=tuple(meta['shape']),
    classes=meta['classes'],
    tensors=tensors,
    locate=lambda address: ('/'.join(address), as_is),
  )


LEAVES = {'kernel': 'weight', 'scale': 'weight'}  # names of flax -> of torch


def as_is(a: np.ndarray) -> np.ndarray:
  """The array itself, whose layout is the same."""
  return a


def from_torch(a: np.ndarray) -> np.ndarray:
  """[out, in, H, W] -> [H, W, in, out], and [out, in] -> [in, out]."""
  return a.transpose((*range(2, a.ndim), 1, 0)) if a.ndim > 1 else a


def sines_first(a: np.ndarray) -> np.ndarray:
  """[out, in] -> [in, out], and inputs from cosines, sines to sines, cosines."""
  return np.roll(from_torch(a), a.shape[-1] // 2, axis=0) if a.ndim > 1 else a


def interleaved(a: np.ndarray) -> np.ndarray:
  """Channels [q..., k..., v...] -> [q, k, v, q, k, v, ...] on the last axis."""
  thirds = np.reshape(a, (*a.shape[:-1], 3, -1))
  return np.reshape(np.swapaxes(thirds, -1, -2), a.shape)
