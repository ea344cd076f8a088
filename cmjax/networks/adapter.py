"""Turns a flax module into a `Network` of pure functions."""

from collections.abc import Callable
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import LOG_WEIGHT, Array, Key, Network, Params

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')

# Limits far beyond any published network, within which a network is built in seconds: a
# config that comes with downloaded weights is not trusted.
MAX_WIDTH = 2**16  # channels of a level, or features of a layer
MAX_BLOCKS = 256  # of an encoder, over all levels


class Weighting(NamedTuple):
  """A learned log-weighting of the loss as a function of c_noise."""

  init: Callable[[Key], Params]
  apply: Callable[[Params, Array], Array]  # (params, c_noise f32[B]) -> f32[B]


def _fourier_series(params, c_noise):
  angles = c_noise[:, None] * jnp.arange(1.0, 17.0)[None, :]
  waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
  return jnp.matmul(waves, params)


# Source: Karras et al. 2024 (EDM2), appendix B; the Fourier series is a cmjax choice.
FOURIER_SERIES = Weighting(lambda key: jnp.zeros(32), _fourier_series)


def as_network(
  module: nn.Module,
  *,
  num_times: int = 1,
  log_weight: bool = False,
  weighting: Weighting = FOURIER_SERIES,
) -> Network:
  """Wraps a flax module called as `module(x, c_noise, cond, deterministic)`.

  With `log_weight` the parameters have one more entry, `log_weight`: those of
  `weighting`, by default 32 Fourier coefficients that start at zero.

  Raises: ValueError if num_times < 1, or if log_weight is used with num_times > 1.
  """
  if num_times < 1 or (log_weight and num_times > 1):
    raise ValueError(
      f'num_times must be at least 1, and exactly 1 with log_weight; got {num_times=}, '
      f'{log_weight=}'
    )

  def init(key, x, c_noise, cond):
    params: Params = module.init(key, x, c_noise, cond, deterministic=True)['params']
    if log_weight:
      params |= {LOG_WEIGHT: weighting.init(jax.random.fold_in(key, 1))}
    return params

  def apply(params, x, c_noise, cond, *, key=None) -> Array:
    rngs = None if key is None else {'dropout': key}
    out = module.apply(
      {'params': params}, x, c_noise, cond, deterministic=key is None, rngs=rngs
    )
    return cast(Array, out)  # no collection is mutable, so flax returns no state

  def log_weight_of(params, c_noise):
    return weighting.apply(params[LOG_WEIGHT], c_noise)

  return Network(init, apply, num_times, log_weight_of if log_weight else None)


def check_settings(
  *,
  num_blocks: int,
  dropout: float,
  noise_scale: float,
  num_times: int,
  log_weight: bool,
  dtype: str,
) -> None:
  """Checks the settings that all networks share.

  Raises: ValueError naming the first that has the wrong type or is out of range.
  """
  checks.whole(1, MAX_BLOCKS, num_blocks=num_blocks)
  checks.real(0, 1, dropout=dropout)
  checks.real(-1e9, 1e9, noise_scale=noise_scale)
  checks.whole(1, 16, num_times=num_times)
  checks.choice((False, True), log_weight=log_weight)
  checks.choice(DTYPES, dtype=dtype)


def check_labels(
  module: nn.Module, cond: Array | None, layer: str, augment: int = 0
) -> int:
  """The number of classes: columns of cond that `layer` has parameters for.

  Raises: ValueError unless cond has that many, or `augment` more.
  """
  width = 0 if cond is None else cond.shape[-1]
  if module.is_initializing():
    return width
  classes = 0
  if module.has_variable('params', layer):
    (kernel,) = (a for a in module.get_variable('params', layer).values() if a.ndim > 1)
    classes = kernel.shape[-2]
  if cond is None and classes:
    raise ValueError('cond is None, but this network was trained with labels')
  if width not in (classes, classes + augment):
    raise ValueError(
      f'cond must have {classes} columns of labels, and may have {augment} more of an '
      f'augmentation, which `augment` of the network sets; got {width}'
    )
  return classes
