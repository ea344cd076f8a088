"""Grids and draws of noise levels: t, and its cleaner neighbour r < t."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cmjax.core import Array, Key, Schedule

Times = Callable[[Key, int], Array]  # (key, B) -> t f32[B]
Pairs = Callable[[Key, int, Array], tuple[Array, Array]]  # (key, B, step) -> t, r


def karras_at(
  index: Array, n: Array | int, *, sigma_min: float, sigma_max: float, rho: float
) -> Array:
  """The point `index` (0 is sigma_max, n - 1 is sigma_min) of an n-point grid.

  f32[...] -> f32[...]; n may be traced. Source: Karras et al. 2022 (EDM), eq. (5).
  """
  top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
  return (top + index / (n - 1) * (bottom - top)) ** rho


def karras(
  n: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Array:
  """Descending grid f32[n], from sigma_max to sigma_min exactly.

  Raises: ValueError unless 0 < sigma_min < sigma_max and rho > 0.

  Source: Karras et al. 2022 (EDM), eq. (5).
  """
  _check_grid(sigma_min, sigma_max, rho)
  index = jnp.arange(n, dtype=float)
  grid = karras_at(index, n, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
  return grid.at[0].set(sigma_max).at[-1].set(sigma_min)


def _check_grid(sigma_min: float, sigma_max: float, rho: float) -> None:
  if not 0 < sigma_min < sigma_max or rho <= 0:
    raise ValueError(
      f'needs 0 < sigma_min < sigma_max and rho > 0, got {sigma_min=}, {sigma_max=}, '
      f'{rho=}'
    )


def lognormal(*, mean: float, std: float) -> Times:
  """ln t ~ N(mean, std^2), not truncated. Source: EDM, table 1 (-1.2, 1.2)."""
  return lambda key, n: jnp.exp(mean + std * jax.random.normal(key, (n,)))


def neighbour(t: Array, gap: Array, *, k: float = 8.0, b: float = 1.0) -> Array:
  """r = max(0, t (1 - n(t) gap)), n(t) = 1 + k sigmoid(-b t): f32[B] -> f32[B].

  Source: Geng et al. 2024 (ECT); locuslab/ect `loss.py`.
  """
  return jnp.maximum(t * (1.0 - (1.0 + k * jax.nn.sigmoid(-b * t)) * gap), 0.0)


def ect_pairs(*, times: Times, gap: Schedule, k: float = 8.0, b: float = 1.0) -> Pairs:
  """t from `times`, r at the relative gap of the step; r = 0 where the gap is wide.

  Source: Geng et al. 2024 (ECT); locuslab/ect `loss.py`.
  """

  def pairs(key, n, step):
    t = times(key, n)
    return t, neighbour(t, gap(step), k=k, b=b)

  return pairs


def karras_pairs(
  *,
  bins: Schedule,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Pairs:
  """Uniformly drawn neighbours of a Karras grid of bins(step) points.

  Raises: ValueError unless 0 < sigma_min < sigma_max and rho > 0.

  Source: Song et al. 2023, algorithms 2 and 3.
  """
  _check_grid(sigma_min, sigma_max, rho)

  def pairs(key, n, step):
    points = bins(step)
    last = points.astype(jnp.int32) - 1
    index = jax.random.randint(key, (n,), 0, last).astype(jnp.float32)
    grid = dict(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    return karras_at(index, points, **grid), karras_at(index + 1, points, **grid)

  return pairs
