"""Zero-shot editing: images that agree with what is known of a given image.

Pure functions of a model on the VE process, its parameters and images; all times are
noise levels sigma. Every image has its own random key, so that it does not depend on
the rest of the batch. Results have the dtype of the images, float64 included.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks
from cmjax.core import Array, Key, Model, Params
from cmjax.samplers import check_descending, normal

GREY = (0.2989, 0.5870, 0.1140)  # weights of red, green and blue in the grey value


class Edit(NamedTuple):
  """What is known of an image y: the coordinates of A y where `known` is 1."""

  transform: Callable[[Array], Array]  # A, orthogonal: f32[B, ...] -> f32[B, ...]
  inverse: Callable[[Array], Array]  # A^-1
  known: Array  # f32, of the rank of A y, broadcasts over it: 1 known, 0 generated


class Edited(NamedTuple):
  """Edited images, and the images after each step of the edit."""

  x: Array  # f32[B, ...], not clipped
  steps: Array  # f32[N, B, ...]; the last is x


def merge(edit: Edit, y: Array, x: Array) -> Array:
  """A^-1[(A y) known + (A x) (1 - known)]: x f32[B, ...] with what is known of y."""
  known = edit.known.astype(x.dtype)
  return edit.inverse(edit.transform(y) * known + edit.transform(x) * (1.0 - known))


def known_error(edit: Edit, y: Array, x: Array) -> Array:
  """f32[B]: the largest |A x - A y| over the known coordinates."""
  errors = jnp.abs(edit.transform(x - y)) * edit.known.astype(x.dtype)
  return jnp.max(errors, axis=tuple(range(1, errors.ndim)))


# Edits: their maps A are orthogonal.


def inpaint(mask: Array) -> Edit:
  """Pixels are known where mask f32[H, W] is 1, generated where it is 0.

  Source: Song et al. 2023, appendix D.
  """
  return Edit(lambda x: x, lambda x: x, jnp.asarray(mask)[None, :, :, None])


def colourise() -> Edit:
  """The grey value of each pixel of images f32[B, H, W, 3] is known.

  It is the sum of red, green and blue with the weights `GREY`; A maps the colours such
  that the first coordinate is proportional to it.

  Source: Song et al. 2023, appendix D.
  Differs: the other two coordinates are of another basis, which changes no image.
  """
  reflect = _reflection(np.array(GREY))
  return Edit(reflect, reflect, _first(3)[None, None, None])


def grey(x: Array) -> Array:
  """Images f32[B, H, W, 3] -> images without colour, of the same grey values."""
  weights = jnp.asarray(np.array(GREY) / np.sum(GREY), x.dtype)[None, None, None]
  return jnp.broadcast_to(jnp.sum(x * weights, axis=-1, keepdims=True), x.shape)


def super_resolution(factor: int, shape: tuple[int, ...]) -> Edit:
  """The mean of each patch of factor x factor pixels is known, the details are not.

  `shape` is that of one image, (H, W, C). Applied to each channel.

  Raises: ValueError unless factor is a whole number from 2 that divides H and W.

  Source: Song et al. 2023, appendix D.
  Differs: the coordinates of details are of another basis, which changes no image.
  """
  height, width, channels = shape
  checks.whole(2, min(height, width), factor=factor)
  if height % factor or width % factor:
    raise ValueError(f'factor must divide {height} and {width}, got {factor}')
  rows, columns = height // factor, width // factor
  reflect = _reflection(np.ones(factor**2))

  def transform(x):
    x = jnp.reshape(x, (len(x), rows, factor, columns, factor, channels))
    x = jnp.transpose(x, (0, 1, 3, 5, 2, 4))
    return reflect(jnp.reshape(x, (len(x), rows, columns, channels, factor**2)))

  def inverse(a):
    a = jnp.reshape(reflect(a), (len(a), rows, columns, channels, factor, factor))
    return jnp.reshape(jnp.transpose(a, (0, 1, 4, 2, 5, 3)), (len(a), *shape))

  return Edit(transform, inverse, _first(factor**2)[None, None, None, None])


def _first(size: int) -> Array:
  return jnp.zeros(size).at[0].set(1.0)


def _reflection(v: np.ndarray) -> Callable[[Array], Array]:
  """The Householder reflection of the last axis, with <v, x> / |v| as coordinate 0.

  Orthogonal and its own inverse. Sums instead of a matrix product, which accelerators
  compute with fewer digits by default.
  """
  u = v / np.linalg.norm(v)
  u[0] -= 1.0
  u /= np.linalg.norm(u)

  def reflect(x):
    axis = jnp.reshape(jnp.asarray(u, x.dtype), (1,) * (x.ndim - 1) + u.shape)
    return x - 2.0 * jnp.sum(x * axis, axis=-1, keepdims=True) * axis

  return reflect


# Images from images.


def edit_images(
  f: Model,
  params: Params,
  y: Array,
  edit: Edit,
  *,
  sigmas: Sequence[float],
  keys: Key,
  cond: Array | None = None,
  sigma_min: float = 0.0,
) -> Edited:
  """Images f32[B, ...] that agree with y f32[B, ...] in what the edit knows.

  Multistep sampling that starts from the known part of y plus noise of sigmas[0], and
  replaces the known coordinates by those of y after each of the len(sigmas)
  evaluations. The samples approach the model's conditional distribution as the grid of
  sigmas becomes finer.

  Args:
    f: a consistency function.
    params: its parameters.
    y: the images; their unknown coordinates are not used.
    edit: what is known of them.
    sigmas: descending noise levels, as of `times.karras`.
    keys: key[B], one per image.
    cond: one-hot labels f32[B, K], or None.
    sigma_min: the sigma at which f is the identity; the noise added after the first
      evaluation has standard deviation sqrt(sigma^2 - sigma_min^2).

  Raises: ValueError if sigmas are empty, do not descend or are not all above sigma_min.

  Source: Song et al. 2023, algorithm 4.
  """
  check_descending(sigmas, sigma_min)

  def step(x, sigma, noise):
    sigma = jnp.full(len(x), sigma, x.dtype)
    return merge(edit, y, f(params, x + noise, sigma, cond, key=None))

  return _multistep(step, merge(edit, y, jnp.zeros_like(y)), sigmas, keys, sigma_min)


def stroke(
  f: Model,
  params: Params,
  y: Array,
  *,
  sigmas: Sequence[float] = (5.38, 2.24),
  keys: Key,
  cond: Array | None = None,
  sigma_min: float = 0.0,
) -> Edited:
  """Images f32[B, ...] that resemble y f32[B, ...], such as realistic ones of strokes.

  Multistep sampling that starts from y plus noise of sigmas[0]; the larger it is, the
  less of y remains. Arguments are those of `edit_images`.

  Raises: ValueError if sigmas are empty, do not descend or are not all above sigma_min.

  Source: Meng et al. 2021 (SDEdit); Song et al. 2023, appendix D.
  """
  check_descending(sigmas, sigma_min)

  def step(x, sigma, noise):
    return f(params, x + noise, jnp.full(len(x), sigma, x.dtype), cond, key=None)

  return _multistep(step, y, sigmas, keys, sigma_min)


def _multistep(
  step: Callable[[Array, Array, Array], Array],
  x: Array,
  sigmas: Sequence[float],
  keys: Key,
  sigma_min: float,
) -> Edited:
  """x after step(x, sigma, noise) at each sigma; a scan, which compiles one step."""
  spreads = [sigmas[0], *((sigma**2 - sigma_min**2) ** 0.5 for sigma in sigmas[1:])]

  def body(x, at):
    index, sigma, spread = at
    x = step(x, sigma, spread * normal(keys, index, x.shape[1:]).astype(x.dtype))
    return x, x

  on_grid = (jnp.asarray(values, x.dtype) for values in (sigmas, spreads))
  x, steps = jax.lax.scan(body, x, (jnp.arange(len(sigmas)), *on_grid))
  return Edited(x, steps)


def denoise(
  f: Model, params: Params, y: Array, *, sigma: float, cond: Array | None = None
) -> Array:
  """f(y, sigma): y f32[B, ...] without its noise of standard deviation sigma.

  Raises: ValueError unless sigma > 0.

  Source: Song et al. 2023, appendix D.
  """
  checks.positive(sigma=sigma)
  return f(params, y, jnp.full(len(y), sigma, y.dtype), cond, key=None)
