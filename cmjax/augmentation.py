"""Augmentation of images, whose description is an input of the network.

A model that is given labels of how each image was transformed does not learn to
generate transformed images: it samples with labels of zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks
from cmjax.core import Array, Key, expand

# (key, x0 f32[B, H, W, C]) -> (x0, labels f32[B, K]), zeros where nothing changed
Augmentation = Callable[[Key, Array], tuple[Array, Array]]

# Low-pass filter of the wavelet sym6 (Daubechies 1992, table 6.3).
_SYM6 = np.array(
  [
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057),
    *(-0.048311742585633, 0.4910559419267466, 0.787641141030194),
    *(0.3379294217276218, -0.07263752278646252, -0.021060292512300564),
    *(0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
  ]
)
_MARGIN = len(_SYM6) // 4  # pixels around the result that its filter covers


class Transforms(NamedTuple):
  """How images are transformed; where all is zero or False, they are not."""

  flip_x: Array  # bool[B] mirror left and right
  flip_y: Array  # bool[B] upside down
  scale: Array  # f32[B] log2 of the magnification, divided by 0.2
  angle: Array  # f32[B] of the rotation, anticlockwise, in radians
  stretch: Array  # f32[B] log2 of width / height, divided by 0.4
  direction: Array  # f32[B] of the stretched axis, in radians
  shift: Array  # f32[B, 2] to the right and down, in eighths of the image

  def labels(self) -> Array:
    """f32[B, 9], the inputs of a network."""
    columns = (
      *(self.flip_x, self.flip_y, self.scale),
      *(jnp.cos(self.angle) - 1.0, jnp.sin(self.angle)),
      self.stretch * jnp.cos(self.direction),
      self.stretch * jnp.sin(self.direction),
      *(self.shift[:, 0], self.shift[:, 1]),
    )
    return jnp.stack([jnp.asarray(c, jnp.float32) for c in columns], axis=1)


def draw(key: Key, num_images: int, p: float) -> Transforms:
  """Flips to the side of half the images, and each other transform with probability p.

  Of the flips upside down that are drawn, half are none.
  """
  keys = iter(jax.random.split(key, 13))

  def chosen(probability, value):
    choice = jax.random.bernoulli(next(keys), probability, (num_images,))
    return jnp.where(expand(choice, value), value, jnp.zeros_like(value))

  def coin():
    return jax.random.bernoulli(next(keys), 0.5, (num_images,))

  def normal(*shape):
    return jax.random.normal(next(keys), (num_images, *shape))

  def circle():
    return jax.random.uniform(next(keys), (num_images,), minval=-np.pi, maxval=np.pi)

  return Transforms(
    flip_x=coin() & (p > 0),
    flip_y=chosen(p, coin()),
    scale=chosen(p, normal()),
    angle=chosen(p, circle()),
    stretch=chosen(p, normal()),
    direction=chosen(0.5, circle()),
    shift=chosen(p, normal(2)),
  )


def transform(transforms: Transforms, x0: Array) -> tuple[Array, Array]:
  """Transformed images f32[B, H, W, C], and their labels f32[B, 9].

  Flips are exact, and so is an image that is not transformed otherwise. The others are
  reflected at their border, magnified by two with a wavelet filter, interpolated
  linearly and reduced.

  Source: Karras et al. 2022 (EDM), appendix F.2; Karras et al. 2020 (StyleGAN2-ADA),
    appendix B.
  Differs: every image is reflected over its whole width, whereas NVlabs/edm reflects as
    far as the batch needs.
  """
  t = transforms
  x = jnp.where(expand(t.flip_x, x0), x0[:, :, ::-1], x0)
  x = jnp.where(expand(t.flip_y, x0), x[:, ::-1], x)
  moved = (
    (t.scale != 0) | (t.angle != 0) | (t.stretch != 0) | jnp.any(t.shift != 0, axis=1)
  )
  return jnp.where(expand(moved, x), _moved(t, x).astype(x.dtype), x), t.labels()


def edm(*, p: float) -> Augmentation:
  """EDM's augmentation: flips, scaling, rotation, stretching and translation.

  p: probability of each transform but flips to the side, which half the images have;
  0.12 for CIFAR-10, 0.15 for FFHQ and AFHQ in the paper. The network needs 9 inputs for
  it, as `songunet(augment=9)` has, and the data must not be flipped as well.

  Raises: ValueError unless 0 <= p <= 1; when it is called, unless x0 has four axes.

  Source: Karras et al. 2022 (EDM), appendix F.2 and table 6.
  """
  checks.fraction(p=p)

  def augmentation(key, x0):
    if x0.ndim != 4:
      raise ValueError(f'augmentation needs images [B, H, W, C], not {x0.shape}')
    return transform(draw(key, len(x0), float(p)), x0)

  return augmentation


def _moved(t: Transforms, x: Array) -> Array:
  """Images as seen from the inverse of their transforms, at twice the resolution."""
  height, width = x.shape[1:3]
  fine = _both_axes([_magnify(n) for n in (height, width)], x)
  sizes = [2 * (n + 2 * _MARGIN) for n in (height, width)]
  at = jnp.meshgrid(*(jnp.arange(n) - (n - 1) / 2 for n in sizes), indexing='ij')
  # In the units of `fine`, in which pixel centres of x have odd coordinates.
  v, u = (p[None] + 0.5 for p in at)
  (a, b), (c, d) = expand(_inverse(t), u[None, None])
  du = u - expand(t.shift[:, 0] * width / 4, u)
  dv = v - expand(t.shift[:, 1] * height / 4, v)
  image = _interpolated(fine, c * du + d * dv - 0.5, a * du + b * dv - 0.5)
  return _both_axes([_reduce(n) for n in (height, width)], image)


def _inverse(t: Transforms) -> Array:
  """The matrices f32[2, 2, B] that undo scaling, rotation and stretching."""

  def rotation(angle):
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.array([[c, -s], [s, c]])

  stretch = jnp.exp2(0.2 * t.stretch)
  zero = jnp.zeros_like(stretch)
  unstretch = jnp.array([[1 / stretch, zero], [zero, stretch]])
  matrices = jnp.einsum(
    'ijn,jkn,kln->iln',
    rotation(t.angle - t.direction),
    unstretch,
    rotation(t.direction),
    precision='highest',
  )
  return matrices / jnp.exp2(0.2 * t.scale)[None, None]


def _both_axes(matrices: list[np.ndarray], x: Array) -> Array:
  """A linear map of rows and one of columns: f32[B, H, W, C] -> f32[B, h, w, C]."""
  rows, columns = (jnp.asarray(m, x.dtype) for m in matrices)
  x = jnp.einsum('hi,bijc->bhjc', rows, x, precision='highest')
  return jnp.einsum('wj,bhjc->bhwc', columns, x, precision='highest')


def _magnify(size: int) -> np.ndarray:
  """The matrix [2 n, size] that reflects `size` pixels to n, and doubles them."""
  reflected = np.pad(np.eye(size), [(size - 1, size - 1), (0, 0)], mode='reflect')
  taps = len(_SYM6)
  spread = np.zeros((2 * len(reflected) + taps, size))
  spread[taps // 2 : -taps // 2 : 2] = reflected
  rows = range(2 * len(reflected))
  return np.stack([_SYM6[::-1] @ spread[i : i + taps] for i in rows])


def _reduce(size: int) -> np.ndarray:
  """The matrix [size, 2 (size + 2 margins)] that halves, and cuts the margins."""
  matrix = np.zeros((size, 2 * (size + 2 * _MARGIN)))
  for i in range(size):
    matrix[i, 2 * i + 1 : 2 * i + 1 + len(_SYM6)] = _SYM6
  return matrix


def _interpolated(x: Array, down: Array, right: Array) -> Array:
  """x f32[B, H, W, C] at points f32[B, h, w] relative to its centre; outside it, 0."""
  size, width, channels = x.shape[0], x.shape[2], x.shape[3]
  points = [down + (x.shape[1] - 1) / 2, right + (width - 1) / 2]
  pixels = jnp.reshape(x, (size, -1, channels))
  low = [jnp.floor(p) for p in points]
  total = jnp.zeros((*down.shape, channels), x.dtype)
  for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
    index, weight = jnp.zeros(down.shape, jnp.int32), jnp.ones(down.shape, x.dtype)
    for axis, step in enumerate(corner):
      at, length = low[axis] + step, x.shape[1 + axis]
      inside = (at >= 0) & (at < length)
      weight *= jnp.where(inside, 1 - jnp.abs(points[axis] - at), 0)
      at = jnp.clip(at, 0, length - 1).astype(jnp.int32)
      index = index * length + at
    taken = jnp.take_along_axis(pixels, jnp.reshape(index, (size, -1, 1)), axis=1)
    total += weight[..., None] * jnp.reshape(taken, total.shape)
  return total
