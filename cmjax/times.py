"""Grids and draws of noise levels: t, and its cleaner neighbour r < t."""

from collections.abc import Callable
import math

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


def karras_clock(
  u: Array, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Array:
  """tau(u) from tau(0) = sigma_min to tau(1) = sigma_max: f32[...] -> f32[...].

  The grid of N points is tau(0), tau(1 / (N - 1)), ..., tau(1).

  Source: Song et al. 2023, appendix B; Karras et al. 2022 (EDM), eq. (5).
  """
  return karras_at(1.0 - u, 2, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


def karras_uniform(
  *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Times:
  """t = tau(u), u uniform in [0, 1]: where the pairs of an endless Karras grid lie.

  Raises: ValueError unless 0 < sigma_min < sigma_max and rho > 0.

  Source: Song et al. 2023, theorems 3 to 6.
  """
  _check_grid(sigma_min, sigma_max, rho)
  grid = dict(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
  return lambda key, n: karras_clock(jax.random.uniform(key, (n,)), **grid)


def neighbour(t: Array, gap: Array, *, k: float = 8.0, b: float = 1.0) -> Array:
  """r = max(0, t (1 - n(t) gap)), n(t) = 1 + k sigmoid(-b t): f32[B] -> f32[B].

  Source: Geng et al. 2024 (ECT); locuslab/ect `loss.py`.
  """
  return jnp.maximum(t * (1.0 - (1.0 + k * jax.nn.sigmoid(-b * t)) * gap), 0.0)


def check_pairs(pairs: Pairs, *, equal: bool = False, above: bool = False) -> None:
  """Refuses pairs whose first draws break 0 <= r < t.

  r = t is let through where they may be `equal`; r = 0 is not where it must be `above`.

  Raises: ValueError with the first pair that does.
  """
  t, r = pairs(jax.random.key(0), 64, jnp.int32(0))
  low, high = (r <= 0) if above else (r < 0), (r > t) if equal else (r >= t)
  wrong = low | high | ~jnp.isfinite(t - r)
  if bool(jnp.any(wrong)):
    i = int(jnp.argmax(wrong))
    raise ValueError(
      f'needs pairs with 0 {"<" if above else "<="} r {"<=" if equal else "<"} t, and '
      f'draws r={r[i]:.4g} for t={t[i]:.4g}'
    )


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


def lognormal_pairs(
  *,
  bins: Schedule,
  mean: float = -1.1,
  std: float = 2.0,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Pairs:
  """Neighbours of a Karras grid of bins(step) points, their bin drawn lognormally.

  The bin is the one that a lognormal draw between sigma_min and sigma_max falls into,
  which gives each bin its share erf(upper) - erf(lower) without a table.

  Raises: ValueError unless 0 < sigma_min < sigma_max and rho > 0.

  Source: Song & Dhariwal 2023 (iCT), section 3.5.
  """
  _check_grid(sigma_min, sigma_max, rho)
  grid = dict(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
  ends = [(math.log(sigma) - mean) / std for sigma in (sigma_min, sigma_max)]

  def pairs(key, n, step):
    points = bins(step)
    z = jax.random.truncated_normal(key, *ends, (n,))
    drawn = jnp.exp(mean + std * z)
    bottom, top = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    u = (drawn ** (1 / rho) - bottom) / (top - bottom)
    index = jnp.clip(jnp.floor((1.0 - u) * (points - 1)), 0.0, points - 2)
    return karras_at(index, points, **grid), karras_at(index + 1, points, **grid)

  return pairs


def two_times(
  *, mean: float = -0.4, std: float = 1.0, equal_share: float = 0.75
) -> Pairs:
  """Times t >= r of the linear process, both logit-normal, and r = t in some rows.

  r = t in the first rows of the batch, `equal_share` of it: there the objective is
  flow matching.

  Raises: ValueError for a share outside [0, 1].

  Source: Geng et al. 2025 (MeanFlow), section 4.3; Gsunshine/meanflow.
  """
  if not 0 <= equal_share <= 1:
    raise ValueError(f'needs a share in [0, 1], got {equal_share=}')

  def pairs(key, n, step):
    both = jax.nn.sigmoid(mean + std * jax.random.normal(key, (2, n)))
    t, r = jnp.max(both, axis=0), jnp.min(both, axis=0)
    return t, jnp.where(jnp.arange(n) < round(equal_share * n), t, r)

  return pairs


def dyadic_times(*, finest: int = 128, equal_share: float = 0.75) -> Pairs:
  """t and r of the linear process on a grid of `finest` steps, a power of two apart.

  r = t in the first rows of the batch, `equal_share` of it: there the objective is
  flow matching, and t is uniform.

  Raises: ValueError unless `finest` is a power of two above 1 and the share in [0, 1].

  Source: Frans et al. 2024 (shortcut models), section 3.2.
  """
  levels = finest.bit_length() - 1
  if finest != 2**levels or levels < 1 or not 0 <= equal_share <= 1:
    raise ValueError(
      f'needs a power of two above 1 and a share in [0, 1], got {finest=}, '
      f'{equal_share=}'
    )

  def pairs(key, n, step):
    u = jax.random.uniform(key, (3, n))
    gap = 2.0 ** -jnp.floor(u[0] * levels)  # 1, 1/2, ..., 2 / finest
    t = gap * (1.0 + jnp.floor(u[1] / gap))
    equal = jnp.arange(n) < round(equal_share * n)
    return jnp.where(equal, u[2], t), jnp.where(equal, u[2], t - gap)

  return pairs
