"""Feature networks, and the images that they are applied to."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from cmjax.core import Array, Params

INCEPTION = 'inception'  # the name of the 2015 network, and of no other
QUANTISATION = ('round', 'edm', 'truncate', 'float')
# What the field calls the numbers of the 2015 Inception network.
_INCEPTION_NAMES = {
  'frechet': 'fid',
  'spatial_frechet': 'sfid',
  'kernel': 'kid',
  'kernel_std': 'kid_std',
  'score': 'inception_score',
  'score_std': 'inception_score_std',
}


class FeatureNetwork(NamedTuple):
  """A network whose outputs are compared, with its parameters.

  `apply` is pure: (params, images f32[B, H, W, C] in [0, 255]) -> some of pool f32[B,
  D], spatial f32[B, ...] and logits f32[B, K], by name.
  """

  name: str
  params: Params
  apply: Callable[[Params, Array], Mapping[str, Array]]
  shape: tuple[int, int, int]  # [H, W, C] of images that it takes
  limits: tuple[float, float] = (-1.0, 1.0)  # x at 0 and at 255
  conventions: Mapping[str, str] = {}  # shown with the numbers


def value_name(network: str, value: str) -> str:
  """The name under which a value is reported: fid only for Inception."""
  if network == INCEPTION:
    return _INCEPTION_NAMES.get(value, value)
  return f'{network}_{value}'


def quantised(x: Array, limits: tuple[float, float], rule: str) -> Array:
  """x f32[B, ...] in `limits` -> f32[B, ...] in [0, 255], by a rule of QUANTISATION."""
  low, high = limits
  scale = 255 / (high - low)
  # The margin of 'truncate' keeps float32 rounding, below 5e-5 at 255, from truncating
  # the integers of data that was uint8 to the next lower ones.
  margin = {'round': 0.0, 'edm': 0.5, 'truncate': 1e-4, 'float': 0.0}[rule]
  images = x * scale + (margin - low * scale)
  if rule == 'round':
    images = jnp.rint(images)
  elif rule != 'float':
    images = jnp.floor(images)
  return jnp.clip(images, 0.0, 255.0)
