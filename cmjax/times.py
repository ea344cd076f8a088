"""Grids and draws of noise levels: t, and its cleaner neighbour r < t."""

from collections.abc import Callable, Sequence
import math

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks
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
) -> np.ndarray:
  """Descending grid f64[n] on the host, from sigma_max to sigma_min exactly.

  Raises: ValueError unless n >= 2, 0 < sigma_min < sigma_max and rho > 0.

  Source: Karras et al. 2022 (EDM), eq. (5).
  """
  checks.whole(2, n=n)
  check_grid(sigma_min, sigma_max, rho)
  index = np.arange(n, dtype=np.float64)
  grid = karras_at(index, n, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
  grid[0], grid[-1] = sigma_max, sigma_min
  return grid


def check_grid(sigma_min: float, sigma_max: float, rho: float) -> None:
  """Raises: ValueError unless 0 < sigma_min < sigma_max and rho > 0, all finite."""
  checks.positive(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
  if sigma_min >= sigma_max:
    raise ValueError(f'needs sigma_min < sigma_max, got {sigma_min=}, {sigma_max=}')


def check_edges(edges: Sequence[float]) -> None:
  """Raises: ValueError for levels that are not finite or do not ascend above zero."""
  for edge in edges:
    checks.finite(edges=edge)
  if list(edges) != sorted(set(edges)) or (edges and edges[0] <= 0):
    raise ValueError(f'edges must ascend from above zero, got {tuple(edges)}')


def lognormal(*, mean: float, std: float) -> Times:
  """ln t ~ N(mean, std^2), not truncated. Source: EDM, table 1 (-1.2, 1.2).

  Raises: ValueError unless the mean is finite and std > 0.
  """
  checks.finite(mean=mean)
  checks.positive(std=std)
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
  check_grid(sigma_min, sigma_max, rho)
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

  Raises: ValueError unless k and b are finite.

  Source: Geng et al. 2024 (ECT); locuslab/ect `loss.py`.
  """
  checks.finite(k=k, b=b)

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
  check_grid(sigma_min, sigma_max, rho)

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

  Raises: ValueError unless 0 < sigma_min < sigma_max, rho > 0 and std > 0.

  Source: Song & Dhariwal 2023 (iCT), section 3.5.
  """
  check_grid(sigma_min, sigma_max, rho)
  checks.finite(mean=mean)
  checks.positive(std=std)
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

  Raises: ValueError for a share outside [0, 1], or unless std > 0.

  Source: Geng et al. 2025 (MeanFlow), section 4.3; Gsunshine/meanflow.
  """
  checks.finite(mean=mean)
  checks.positive(std=std)
  checks.share(equal_share=equal_share)

  def pairs(key, n, step):
    both = jax.nn.sigmoid(mean + std * jax.random.normal(key, (2, n)))
    t, r = jnp.max(both, axis=0), jnp.min(both, axis=0)
    return t, jnp.where(jnp.arange(n) < round(equal_share * n), t, r)

  return pairs


def dyadic_times(*, finest: int = 128, flow_share: float = 0.75) -> Pairs:
  """t and r of the linear process on a grid of `finest` steps, a power of two apart.

  In the first rows of the batch, `flow_share` of it, r is the next point of the grid:
  there the objective is flow matching.

  Raises: ValueError unless `finest` is a power of two from 2 to 65,536 and the share in
    [0, 1].

  Source: Frans et al. 2024 (shortcut models), section 3.2; kvfrans/shortcut-models.
  Differs: gaps are drawn, each equally often; theirs are dealt to the rows.
  """
  checks.whole(2, 2**16, finest=finest)
  checks.share(flow_share=flow_share)
  levels = finest.bit_length() - 1
  if finest != 2**levels:
    raise ValueError(f'finest must be a power of two, got {finest}')

  def pairs(key, n, step):
    u = jax.random.uniform(key, (2, n))
    flows = jnp.arange(n) < round(flow_share * n)
    gap = 2.0 ** -jnp.floor(u[0] * levels)  # 1, 1/2, ..., 2 / finest
    gap = jnp.where(flows, 1.0 / finest, gap)
    t = gap * (1.0 + jnp.floor(u[1] / gap))
    return t, t - gap

  return pairs
