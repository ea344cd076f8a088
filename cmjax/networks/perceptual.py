"""Networks that look at images: LPIPS as a distance, and the features of the FID.

No weights are shipped; `cmjax.port.vision` reads the released files.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmjax.core import Array, Key, Params
from cmjax.distances import Distance


def resize_bilinear(x: Array, size: int, *, half_pixel: bool = True) -> Array:
  """[B, H, W, C] -> [B, size, size, C], with no filter against aliasing.

  Pixel i lies at i + 1/2, or at i without `half_pixel`, as in TensorFlow 1.
  """
  rows, columns = (
    jnp.asarray(_bilinear_weights(old, size, half_pixel), x.dtype)
    for old in x.shape[1:3]
  )
  return jnp.einsum('yh,xw,bhwc->byxc', rows, columns, x, precision='highest')


def _bilinear_weights(old: int, new: int, half_pixel: bool) -> np.ndarray:
  at = (np.arange(new) + half_pixel / 2) * old / new - half_pixel / 2
  gap = np.clip(at, 0, old - 1)[:, None] - np.arange(old)[None, :]
  return np.maximum(1 - np.abs(gap), 0)


# LPIPS ----------------------------------------------------------------------------

VGG16 = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # (convolutions, channels)
POOLING = {'max': jnp.max, 'average': jnp.mean}

# Source: richzhang/PerceptualSimilarity, `ScalingLayer`: what ImageNet's mean and
# standard deviation are for images in [-1, 1], to three digits.
_SHIFT = np.array([-0.030, -0.088, -0.188])
_SCALE = np.array([0.458, 0.448, 0.450])


class _Vgg16(nn.Module):
  """f32[B, H, W, 3] -> the last features of each stage, f32[B, H / 2^i, W / 2^i, C]."""

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
  # A reduction of a reshaped array, as it can be differentiated in any order; that of
  # a window cannot. An odd last row or column is left out.
  b, h, w, c = x.shape
  x = x[:, : h // 2 * 2, : w // 2 * 2]
  return reduce(jnp.reshape(x, (b, h // 2, 2, w // 2, 2, c)), axis=(2, 4))


def _normalised(x: Array) -> Array:
  """x / (|x| + 1e-10) over the channels, with finite derivatives at x = 0."""
  squared = jnp.sum(x**2, axis=-1, keepdims=True)
  positive = squared > 1e-25  # below, |x|^3 in second derivatives leaves float32
  root = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
  return x / (root + 1e-10)


def lpips(*, pooling: str = 'max', resize: int = 224) -> Distance:
  """LPIPS with VGG16: measure(params, f32[B, H, W, 3] twice, in [-1, 1]) -> f32[B].

  The squared difference of unit features after relu1_2, 2_2, 3_3, 4_3 and 5_3, weighted
  by the heads, averaged over pixels, and summed over the five. Images of which a side
  is smaller than `resize` are first brought to that height and width; 0: none are.
  `params` is a tree as `lpips_init` makes it. Float64 images stay float64. Twice
  differentiable in any mode, also where features are zero and where a = b.

  Raises: ValueError for another pooling than 'max' and 'average', a negative `resize`,
    and images that are integers, not [B, H, W, 3], or too small for four halvings.

  Source: Zhang et al. 2018, eq. (1); richzhang/PerceptualSimilarity `LPIPS`, v0.1.
  Differs: that code does not resize. Song et al. 2023 (CIFAR-10) bring all images to
    224, larger ones too; their ImageNet and LSUN runs resize below a width of 256 and
    use pooling='average'. Both normalise (x + 1) / 2 by ImageNet's mean and standard
    deviation, which agrees with the constants here to three digits. Features shorter
    than 3e-13 are divided by 1e-10. Equal maxima share the gradient; torch gives it to
    the first.
  """
  if pooling not in POOLING or resize < 0:
    raise ValueError(
      f'lpips: pooling is one of {", ".join(POOLING)}, and resize not negative; got '
      f'{pooling=}, {resize=}'
    )
  vgg16 = _Vgg16(pooling)

  def features(params, x):
    if min(x.shape[1:3]) < resize:
      x = resize_bilinear(x, resize)
    if min(x.shape[1:3]) < 16:
      raise ValueError(f'lpips: needs 16 x 16 pixels or resize, got {x.shape}')
    shift, scale = (jnp.asarray(c[None, None, None], x.dtype) for c in (_SHIFT, _SCALE))
    return vgg16.apply({'params': params['vgg16']}, (x - shift) / scale)

  def measure(params, a, b):
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3:
      raise ValueError(f'lpips: needs [B, H, W, 3] twice, got {a.shape} and {b.shape}')
    if not jnp.issubdtype(jnp.result_type(a, b), jnp.floating):
      raise ValueError(f'lpips: needs images in [-1, 1], got {a.dtype} and {b.dtype}')
    distance = 0.0
    for stage, pair in enumerate(zip(features(params, a), features(params, b)), 1):
      squared = (_normalised(pair[0]) - _normalised(pair[1])) ** 2
      head = params['heads'][f'stage{stage}'][0, 0]
      distance += jnp.mean(jnp.matmul(squared, head), axis=(1, 2, 3))
    return distance

  return Distance(measure, degree=2, perceptual=True)


def lpips_init(key: Key) -> Params:
  """Random parameters of `lpips`: of the right shapes, but nobody's perception.

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


# Inception ------------------------------------------------------------------------

RESIZE = ('half_pixel', 'tensorflow1')


class Features(NamedTuple):
  """What statistics of images are computed from."""

  pool: Array  # f32[B, 2048]: FID, KID, precision and recall
  spatial: Array  # f32[B, 17, 17, 7]: sFID
  logits: Array  # f32[B, 1008] without the bias: Inception Score


class _Unit(nn.Module):
  """Convolution, normalisation by running statistics, ReLU."""

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
      precision='highest',  # statistics are compared between machines
      name='conv',
    )(x)
    ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
    mean, bias = (self.param(k, zeros, (self.channels,)) for k in ('mean', 'bias'))
    var, scale = (self.param(k, ones, (self.channels,)) for k in ('var', 'scale'))
    gain = scale / jnp.sqrt(var + 1e-3)
    shift = bias - mean * gain
    return nn.relu(x * gain[None, None, None] + shift[None, None, None])


def _units(x, name, *sizes, down=False):
  """Units (channels, kernel height, width) in turn; `down`: the last has stride 2."""
  for i, (channels, *kernel) in enumerate(sizes, start=1):
    how = (2, 'VALID') if down and i == len(sizes) else (1, 'SAME')
    numbered = f'{name}_{i}' if len(sizes) > 1 else name
    x = _Unit(channels, tuple(kernel), *how, name=numbered)(x)
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
  """Branches side by side."""

  branches: Callable[..., list[Array]]
  args: tuple = ()

  @nn.compact
  def __call__(self, x):
    return jnp.concatenate(self.branches(x, *self.args), axis=-1)


class _Inception(nn.Module):
  """f32[B, 299, 299, 3] in [-1, 1] -> Features; names as in torchvision."""

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
    # A slip of the 2015 graph that its weights have learnt to live with.
    x = _Mixed(_mixed_e, (lambda x: _max_pool(x, 1, 'SAME'),), name='Mixed_7c')(x)
    pool = jnp.mean(x, axis=(1, 2))
    logits = nn.Dense(1008, use_bias=False, precision='highest', name='fc')(pool)
    return Features(pool, spatial, logits)


def inception(params: Params, images: Array, *, resize: str = 'half_pixel') -> Features:
  """The Inception network of 2015-12-05: u8 or f32[B, H, W, 3] in [0, 255] -> Features.

  Images become 299 x 299 by bilinear interpolation, without a filter against aliasing:
  with resize='half_pixel' as the usual PyTorch port does it, in [-1, 1]; with
  'tensorflow1' as the graph itself does it, with pixel i at i and not at i + 1/2, and
  (x - 128) / 128. Numbers of the two kinds do not compare. `params` is a tree as
  `inception_init` makes it. Convolutions have full precision on every device.

  Raises: ValueError for another `resize`, or images that are not [B, H, W, 3].

  Source: Szegedy et al. 2015 (Rethinking the Inception architecture), as released on
    2015-12-05; Heusel et al. 2017 (FID); mseitzer/pytorch-fid `InceptionV3`.
    `spatial` and `logits`: openai/consistency_models `evaluations/evaluator.py`, which
    resizes as 'tensorflow1'.
  Differs: float64 images are computed in float64.
  """
  if resize not in RESIZE:
    raise ValueError(f'resize must be one of {", ".join(RESIZE)}, got {resize!r}')
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f'inception: needs images [B, H, W, 3], got {images.shape}')
  x = jnp.asarray(images, jnp.promote_types(images.dtype, jnp.float32))
  if resize == 'half_pixel':
    x = 2 * resize_bilinear(x / 255, 299) - 1
  else:
    x = (resize_bilinear(x, 299, half_pixel=False) - 128) / 128
  return _Inception().apply({'params': params}, x)


def inception_init(key: Key) -> Params:
  """Random parameters of `inception`: of the right shapes, but no FID.

  {'Conv2d_1a_3x3': {'conv': {'kernel'}, 'mean', 'var', 'scale', 'bias'}, ...,
  'Mixed_5b': {'branch1x1': ..., ...}, ..., 'fc': {'kernel'}}
  """
  return _Inception().init(key, jnp.zeros((1, 299, 299, 3)))['params']
