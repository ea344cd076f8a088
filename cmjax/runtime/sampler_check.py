"""Traces samplers abstractly: their noise levels, and mistakes before any compute."""

from collections.abc import Mapping
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from cmjax.core import Model, Params, UserError
from cmjax.precond import TwoTime
from cmjax.runtime.config_record import ConfigDict
from cmjax.runtime.errors import part_errors
from cmjax.runtime.pretrained import SIGMA_RANGE
from cmjax.samplers import Sampler, Samples


def sigmas_of(
  sampler: Sampler,
  f: Model,
  params: Params,
  shape: tuple[int, ...],
  classes: int,
  batch_size: int = 1,
) -> tuple[float, ...]:
  """The noise level of each network evaluation, without computing any.

  Args:
    sampler: the sampler.
    f: the model.
    params: its parameters; abstract ones suffice.
    shape: of one example.
    classes: number of classes; 0 to sample without labels.
    batch_size: of the abstract batch.
  """
  leaves, structure = jax.tree.flatten(params)
  shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves)
  return _traced(sampler, f, (structure, shapes), shape, classes, batch_size)


@functools.lru_cache(maxsize=16)  # a trace takes as long as many evaluations
def _traced(
  sampler: Sampler,
  f: Model,
  abstract: tuple[Any, tuple[jax.ShapeDtypeStruct, ...]],
  shape: tuple[int, ...],
  classes: int,
  batch_size: int,
) -> tuple[float, ...]:
  sigmas: list[float] = []

  def trace(params, keys, cond):
    samples: Any = sampler(f, params, keys, cond, shape)
    if not isinstance(samples, Samples):
      got = type(samples).__name__
      raise UserError(f'must return Samples, not a value of type {got}')
    sigmas.extend(float(sigma) for sigma in samples.sigmas)
    return samples.x

  params = jax.tree.unflatten(*abstract)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
  one_hot = jax.ShapeDtypeStruct((batch_size, classes), jnp.float32)
  jax.eval_shape(trace, params, keys, one_hot if classes else None)
  return tuple(sigmas)


def check_sigmas(sigmas: tuple[float, ...], f: Model, objective: ConfigDict) -> None:
  """Checks that a model was trained at the noise levels of a sampler.

  The range of training ends at 80, or at the greatest `sigma_max` of the objective. A
  two-time model is trained up to t = 1 of the linear process, where sigma is infinite.

  Raises: UserError naming the noise level that is out of range.
  """
  highest = max([SIGMA_RANGE[1], *_values(objective, 'sigma_max')])
  if isinstance(f, TwoTime):
    highest = math.inf
  for sigma in sigmas:
    if not 0 < sigma <= highest * (1 + 1e-6):
      raise UserError(
        f'evaluates the network at sigma = {sigma:g}, which was trained in '
        f'(0, {highest:g}]'
      )


def check_samplers(
  samplers: Mapping[str, Sampler],
  f: Model,
  params: Params,
  shape: tuple[int, ...],
  classes: int,
  objective: ConfigDict,
) -> None:
  """Traces each sampler, and checks its noise levels.

  Raises: UserError naming the sampler that the model cannot be sampled with.
  """
  for name, sampler in samplers.items():
    with part_errors(f'config.samplers.{name}'):
      check_sigmas(sigmas_of(sampler, f, params, shape, classes), f, objective)


def _values(part: Any, key: str) -> list[float]:
  """Every number of that key in a part and in the parts within it."""
  if not isinstance(part, ConfigDict):
    return []
  inner = [value for item in part.values() for value in _values(item, key)]
  value = part.get(key) if key in part else None
  return inner + ([float(value)] if isinstance(value, int | float) else [])
