"""The Inception network whose features FID compares. No weights are included."""

from collections.abc import Callable
from typing import NamedTuple, cast

import flax.linen as nn
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Array, Key, Params
from cmjax.networks import resizing

RESIZE = ('half_pixel', 'tensorflow1')


class Features(NamedTuple):
  """The outputs that FID and related metrics are computed from."""

  pool: Array  # f32[B, 2048]: FID, KID, precision and recall
  spatial: Array  # f32[B, 17, 17, 7]: sFID
  logits: Array  # f32[B, 1008] without the bias: Inception Score


class _Unit(nn.Module):
  """Convolution, batch normalisation with stored statistics, ReLU."""

  channels: int
  kernel: tuple[int, int]
  stride: int = 1
  padding: str = 'SAME'

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(
      self.channels,
      self.kernel,
      self.stride,
      self.padding,
      use_bias=False,
      precision='highest',  # comparable between devices
      name='conv',
    )(x)
    ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
    mean, bias = (self.param(k, zeros, (self.channels,)) for k in ('mean', 'bias'))
    var, scale = (self.param(k, ones, (self.channels,)) for k in ('var', 'scale'))
    gain = scale / jnp.sqrt(var + 1e-3)
    shift = bias - mean * gain
    return nn.relu(x * gain[None, None, None] + shift[None, None, None])


def _units(x, name, *sizes, down=False):
  """Units of (channels, kernel height, width); with `down` the last has stride 2."""
  for i, (channels, *kernel) in enumerate(sizes, start=1):
    stride, padding = (2, 'VALID') if down and i == len(sizes) else (1, 'SAME')
    unit = f'{name}_{i}' if len(sizes) > 1 else name
    x = _Unit(channels, tuple(kernel), stride, padding, name=unit)(x)
  return x


def _max_pool(x, stride=2, padding='VALID'):
  return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _mean_pool(x):
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def _mixed_a(x, pooled):
  return [
    _units(x, 'branch1x1', (64, 1, 1)),
    _units(x, 'branch5x5', (48, 1, 1), (64, 5, 5)),
    _units(x, 'branch3x3dbl', (64, 1, 1), (96, 3, 3), (96, 3, 3)),
    _units(_mean_pool(x), 'branch_pool', (pooled, 1, 1)),
  ]


def _mixed_b(x):
  return [
    _units(x, 'branch3x3', (384, 3, 3), down=True),
    _units(x, 'branch3x3dbl', (64, 1, 1), (96, 3, 3), (96, 3, 3), down=True),
    _max_pool(x),
  ]


def _mixed_c(x, inner):
  wide, high = (inner, 1, 7), (inner, 7, 1)
  return [
    _units(x, 'branch1x1', (192, 1, 1)),
    _units(x, 'branch7x7', (inner, 1, 1), wide, (192, 7, 1)),
    _units(x, 'branch7x7dbl', (inner, 1, 1), high, wide, high, (192, 1, 7)),
    _units(_mean_pool(x), 'branch_pool', (192, 1, 1)),
  ]


def _mixed_d(x):
  wide, high = (192, 1, 7), (192, 7, 1)
  return [
    _units(x, 'branch3x3', (192, 1, 1), (320, 3, 3), down=True),
    _units(x, 'branch7x7x3', (192, 1, 1), wide, high, (192, 3, 3), down=True),
    _max_pool(x),
  ]


def _mixed_e(x, pool):
  short = _units(x, 'branch3x3_1', (384, 1, 1))
  long = _units(_units(x, 'branch3x3dbl_1', (448, 1, 1)), 'branch3x3dbl_2', (384, 3, 3))
  return [
    _units(x, 'branch1x1', (320, 1, 1)),
    _units(short, 'branch3x3_2a', (384, 1, 3)),
    _units(short, 'branch3x3_2b', (384, 3, 1)),
    _units(long, 'branch3x3dbl_3a', (384, 1, 3)),
    _units(long, 'branch3x3dbl_3b', (384, 3, 1)),
    _units(pool(x), 'branch_pool', (192, 1, 1)),
  ]


class _Mixed(nn.Module):
  """Parallel branches, concatenated along the channels."""

  branches: Callable[..., list[Array]]
  args: tuple = ()

  @nn.compact
  def __call__(self, x):
    return jnp.concatenate(self.branches(x, *self.args), axis=-1)


class _Inception(nn.Module):
  """f32[B, 299, 299, 3] in [-1, 1] -> Features; layer names as in torchvision."""

  @nn.compact
  def __call__(self, x):
    x = _Unit(32, (3, 3), 2, 'VALID', name='Conv2d_1a_3x3')(x)
    x = _Unit(32, (3, 3), 1, 'VALID', name='Conv2d_2a_3x3')(x)
    x = _max_pool(_Unit(64, (3, 3), name='Conv2d_2b_3x3')(x))
    x = _Unit(80, (1, 1), name='Conv2d_3b_1x1')(x)
    x = _max_pool(_Unit(192, (3, 3), 1, 'VALID', name='Conv2d_4a_3x3')(x))
    x = _Mixed(_mixed_a, (32,), name='Mixed_5b')(x)
    x = _Mixed(_mixed_a, (64,), name='Mixed_5c')(x)
    x = _Mixed(_mixed_a, (64,), name='Mixed_5d')(x)
    x = _Mixed(_mixed_b, name='Mixed_6a')(x)
    x = _Mixed(_mixed_c, (128,), name='Mixed_6b')(x)
    x = _Mixed(_mixed_c, (160,), name='Mixed_6c')(x)
    x = _Mixed(_mixed_c, (160,), name='Mixed_6d')(x)
    spatial = x[..., :7]
    x = _Mixed(_mixed_c, (192,), name='Mixed_6e')(x)
    x = _Mixed(_mixed_d, name='Mixed_7a')(x)
    x = _Mixed(_mixed_e, (_mean_pool,), name='Mixed_7b')(x)
    # Max pooling is a quirk of the 2015 graph, which its weights were trained with.
    x = _Mixed(_mixed_e, (lambda x: _max_pool(x, 1, 'SAME'),), name='Mixed_7c')(x)
    pool = jnp.mean(x, axis=(1, 2))
    logits = nn.Dense(1008, use_bias=False, precision='highest', name='fc')(pool)
    return Features(pool, spatial, logits)


def inception(params: Params, images: Array, *, resize: str = 'half_pixel') -> Features:
  """The Inception network of 2015-12-05: u8 or f32[B, H, W, 3] in [0, 255] -> Features.

  Images are resized to 299 x 299 by bilinear interpolation without antialiasing: with
  resize='half_pixel' as in the usual PyTorch port, then scaled to [-1, 1]; with
  'tensorflow1' as in the graph itself, with pixel i at i instead of i + 1/2, then
  (x - 128) / 128. Results of the two are not comparable. `params` has the structure of
  `init`. Convolutions have full precision on every device.

  Raises: ValueError if `resize` is unknown or images are not [B, H, W, 3].

  Source: Szegedy et al. 2015 (Rethinking the Inception architecture), as released on
    2015-12-05; Heusel et al. 2017 (FID); mseitzer/pytorch-fid `InceptionV3`.
    `spatial` and `logits`: openai/consistency_models `evaluations/evaluator.py`, which
    resizes as with 'tensorflow1'.
  Differs: float64 images are computed in float64.
  """
  checks.choice(RESIZE, resize=resize)
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f'images must be [B, H, W, 3], got {images.shape}')
  x = jnp.asarray(images, jnp.promote_types(images.dtype, jnp.float32))
  if resize == 'half_pixel':
    x = 2 * resizing.bilinear(x / 255, 299) - 1
  else:
    x = (resizing.bilinear(x, 299, half_pixel=False) - 128) / 128
  return cast(Features, _Inception().apply({'params': params}, x))


def init(key: Key) -> Params:
  """Random parameters with the shapes of the released ones.

  {'Conv2d_1a_3x3': {'conv': {'kernel'}, 'mean', 'var', 'scale', 'bias'}, ...,
  'Mixed_5b': {'branch1x1': ..., ...}, ..., 'fc': {'kernel'}}
  """
  return _Inception().init(key, jnp.zeros((1, 299, 299, 3)))['params']
