"""LPIPS, a perceptual distance from VGG16 features. No weights are included."""

from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks
from cmjax.core import Array, Key, Params
from cmjax.distances import Distance
from cmjax.networks import resizing

VGG16 = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # (convolutions, channels)
POOLING = {'max': jnp.max, 'average': jnp.mean}

# ImageNet's mean and standard deviation on the scale [-1, 1], to three digits.
# Source: richzhang/PerceptualSimilarity, `ScalingLayer`.
_MEAN = np.array([-0.030, -0.088, -0.188])
_STD = np.array([0.458, 0.448, 0.450])


class _Vgg16(nn.Module):
  """f32[B, H, W, 3] -> the last features of each stage, f32[B, H / 2^i, W / 2^i, C].

  i is 0 for stage 1.
  """

  pooling: str

  @nn.compact
  def __call__(self, x):
    features = []
    for stage, (depth, channels) in enumerate(VGG16, start=1):
      if features:
        x = _halve(x, POOLING[self.pooling])
      for i in range(1, depth + 1):
        x = nn.relu(nn.Conv(channels, (3, 3), name=f'conv{stage}_{i}')(x))
      features.append(x)
    return features


def _halve(x: Array, reduce: Callable[..., Array]) -> Array:
  # `reduce_window` has no second derivatives; a reduction of a reshaped array has. The
  # last row or column is dropped if odd.
  b, h, w, c = x.shape
  x = x[:, : h // 2 * 2, : w // 2 * 2]
  return reduce(jnp.reshape(x, (b, h // 2, 2, w // 2, 2, c)), axis=(2, 4))


def _unit_norm(x: Array) -> Array:
  """x / (|x| + 1e-10) over the channels; derivatives are finite at x = 0."""
  squared = jnp.sum(x**2, axis=-1, keepdims=True)
  positive = squared > 1e-25  # |x|^3 in second derivatives underflows below
  root = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
  return x / (root + 1e-10)


def lpips(*, pooling: str = 'max', resize: int = 224) -> Distance:
  """LPIPS with VGG16: measure(params, f32[B, H, W, 3] twice, in [-1, 1]) -> f32[B].

  The squared difference of unit-norm features after relu1_2, 2_2, 3_3, 4_3 and 5_3,
  weighted by the heads, averaged over pixels, and summed over the five. Images with a
  side smaller than `resize` are first resized to that height and width; 0 disables it.
  `params` has the structure of `init`. Float64 images stay float64. Twice
  differentiable in forward and reverse mode, also at zero features and at a = b.

  Raises: ValueError if pooling is not 'max' or 'average', or resize is negative;
    `measure` if images are integers, not [B, H, W, 3], or smaller than 16 x 16.

  Source: Zhang et al. 2018, eq. (1); richzhang/PerceptualSimilarity `LPIPS`, v0.1.
  Differs: that code does not resize. Song et al. 2023 (CIFAR-10) resize all images to
    224, also larger ones; their ImageNet and LSUN runs resize if the width is below 256
    and use pooling='average'. Both normalise (x + 1) / 2 by ImageNet's mean and
    standard deviation, which agrees with these constants to three digits. Features
    with norm below 3e-13 are divided by 1e-10. Equal maxima in a pooling window share
    the gradient; in torch the first one gets it.
  """
  checks.choice(tuple(POOLING), pooling=pooling)
  checks.whole(0, 2**14, resize=resize)
  vgg16 = _Vgg16(pooling)

  def features(params, x) -> list[Array]:
    if min(x.shape[1:3]) < resize:
      x = resizing.bilinear(x, resize)
    if min(x.shape[1:3]) < 16:
      raise ValueError(
        f'lpips: images must be at least 16 x 16, got {x.shape}; set resize'
      )
    mean, std = (jnp.asarray(c[None, None, None], x.dtype) for c in (_MEAN, _STD))
    by_stage = vgg16.apply({'params': params['vgg16']}, (x - mean) / std)
    return cast(list[Array], by_stage)

  def measure(params, a, b):
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3:
      raise ValueError(
        'lpips: images must be two arrays [B, H, W, 3] of the same shape, got '
        f'{a.shape} and {b.shape}'
      )
    if not jnp.issubdtype(jnp.result_type(a, b), jnp.floating):
      raise ValueError(
        f'lpips: images must be floats in [-1, 1], got {a.dtype} and {b.dtype}'
      )
    distance = jnp.zeros(len(a), jnp.result_type(a, b))
    for stage, pair in enumerate(zip(features(params, a), features(params, b)), 1):
      squared = (_unit_norm(pair[0]) - _unit_norm(pair[1])) ** 2
      head = params['heads'][f'stage{stage}'][0, 0]
      distance += jnp.mean(jnp.matmul(squared, head), axis=(1, 2, 3))
    return distance

  return Distance(measure, degree=2, perceptual=True)


def init(key: Key) -> Params:
  """Random parameters with the shapes of the released ones.

  {'vgg16': {'conv1_1': {'kernel', 'bias'}, ...},
  'heads': {'stage1': f32[1, 1, C, 1], ...}}
  """
  trunk, *heads = jax.random.split(key, 1 + len(VGG16))
  return {
    'vgg16': _Vgg16('max').init(trunk, jnp.zeros((1, 16, 16, 3)))['params'],
    'heads': {
      f'stage{stage}': jax.random.uniform(head, (1, 1, channels, 1))
      for stage, (head, (_, channels)) in enumerate(zip(heads, VGG16), start=1)
    },
  }
