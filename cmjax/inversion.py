"""Noise from images by the probability-flow ODE, and images between two others.

Pure functions on the VE process; all times are noise levels sigma. The noise z is
standard normal: x = sigma_max z at sigma_max. Results have the dtype of the arguments,
float64 included.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from cmjax import checks, solvers
from cmjax.core import Array, Denoiser, Model, Params, expand, sum_features
from cmjax.fields import probability_flow
from cmjax.process import VE
from cmjax.samplers import check_descending
from cmjax.times import karras


def generate(
  f: Model, params: Params, z: Array, *, sigma_max: float, cond: Array | None = None
) -> Array:
  """f(sigma_max z, sigma_max): images f32[B, ...] of noise z f32[B, ...]."""
  return f(params, sigma_max * z, jnp.full(len(z), sigma_max, z.dtype), cond, key=None)


def solve(denoiser: Denoiser, z: Array, sigmas: Sequence[float]) -> Array:
  """Images f32[B, ...] of noise z f32[B, ...], by the probability-flow ODE.

  Heun's method along descending sigmas, then Euler's to 0: 2 len(sigmas) - 1
  evaluations.

  Raises: ValueError if sigmas are empty, do not descend or are not positive.

  Source: Karras et al. 2022 (EDM), algorithm 1.
  """
  check_descending(sigmas, 0.0)
  x = _follow(denoiser, sigmas[0] * z, sigmas)
  return denoiser(x, jnp.full(len(x), sigmas[-1], x.dtype))


def invert(
  denoiser: Denoiser,
  x: Array,
  *,
  num_steps: int = 40,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Array:
  """The noise z f32[B, ...] of images x f32[B, ...], by the probability-flow ODE.

  x is at sigma_min and sigma_max z at sigma_max. Heun's method along an ascending
  Karras grid of num_steps points, 2 (num_steps - 1) evaluations of E[x0 | x]; a
  consistency function is no such denoiser.

  Raises: ValueError unless num_steps >= 2, 0 < sigma_min < sigma_max and rho > 0.

  Source: Song et al. 2021 (score SDE), section 4.3; the solver of Karras et al. 2022.
  """
  grid = karras(num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
  return _follow(denoiser, x, grid[::-1].tolist()) / sigma_max


def _follow(denoiser: Denoiser, x: Array, sigmas: Sequence[float]) -> Array:
  flow = probability_flow(VE, denoiser)

  def step(x, pair):
    return solvers.heun(flow, x, *(jnp.full(len(x), s, x.dtype) for s in pair)), None

  grid = jnp.asarray(sigmas, x.dtype)
  return jax.lax.scan(step, x, (grid[:-1], grid[1:]))[0]


def slerp(a: Array, b: Array, alpha: Array | float) -> Array:
  """Spherical interpolation f32[B, ...] from a (alpha = 0) to b (alpha = 1).

  a and b f32[B, ...] are noise of each image; undefined where they are opposite.

  Source: Song et al. 2023, appendix D; the angle is that between a and b.
  """
  u, v = (x / expand(jnp.sqrt(sum_features(x**2)), x) for x in (a, b))
  angle = 2.0 * jnp.arctan2(*(jnp.sqrt(sum_features(w**2)) for w in (u - v, u + v)))
  close = angle < 1e-4  # there the weights are linear
  safe = jnp.where(close, 1.0, angle)

  def weight(share):
    return expand(jnp.where(close, share, jnp.sin(share * safe) / jnp.sin(safe)), a)

  return weight(1.0 - alpha) * a + weight(alpha) * b


def interpolate(
  images_of: Callable[[Array, Array], Array], a: Array, b: Array, num_images: int
) -> Array:
  """Images f32[N, B, ...] between those of noise a and b, both f32[B, ...].

  `images_of` maps noise f32[B, ...] and alpha f32[], from 0 to 1, to images; the noise
  is interpolated by `slerp` in num_images equal steps of the angle.

  Raises: ValueError unless num_images is a whole number in [2, 1000].

  Source: Song et al. 2023, appendix D.
  """
  checks.whole(2, 1000, num_images=num_images)
  alphas = jnp.linspace(0.0, 1.0, num_images, dtype=a.dtype)
  return jax.lax.map(lambda alpha: images_of(slerp(a, b, alpha), alpha), alphas)
