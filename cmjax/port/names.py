"""Which network a released file holds, and where in it each of our parameters is.

`assemble` follows a `Plan` to the letter: a tensor that is missing, has another shape,
or is left over is told by name.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
import re
from typing import Any, NamedTuple

import numpy as np

from cmjax.core import Params, UserError

Address = tuple[str, ...]  # of one of our parameters: ('enc_32x32_conv', 'kernel')
Tensors = dict[str, np.ndarray]
Layout = Callable[[np.ndarray], np.ndarray]
Find = Callable[[Address], tuple[str, Layout]]  # a parameter here -> its name there


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
    name, layout = plan.find(address)
    ours = '/'.join(address)
    if name not in plan.tensors:
      raise UserError(f'{path} has no {name}, which parameter {ours} needs')
    found = layout(plan.tensors.pop(name))
    if found.shape != tree.shape:
      raise UserError(
        f'{path}: {name} has shape {found.shape} where parameter {ours} needs '
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
