"""Grids and random draws of times t, and of pairs of times r <= t.

The process is variance exploding, so times are noise levels sigma, except in
`logit_normal_pairs` and `dyadic_pairs`, whose times are those of the linear process.
"""

from collections.abc import Callable, Sequence
import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks
from cmjax.core import Array, Key, Schedule

Times = Callable[[Key, int], Array]  # (key, B) -> t f32[B]
Pairs = Callable[[Key, int, Array], tuple[Array, Array]]  # (key, B, step) -> t, r
Index = TypeVar('Index', Array, np.ndarray)  # NumPy in, NumPy out; JAX in, JAX out


def karras_at(
  index: Index, n: Array | int, *, sigma_min: float, sigma_max: float, rho: float
) -> Index:
  """Points f32[...] of the n-point Karras grid at indices f32[...]; n may be traced.

  Index 0 is sigma_max, n - 1 is sigma_min; fractional indices lie between grid points.

  Source: Karras et al. 2022 (EDM), eq. (5).
  """
  top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
  return (top + index / (n - 1) * (bottom - top)) ** rho


def karras(
  n: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> np.ndarray:
  """The Karras grid as numpy f64[n], descending, with sigma_max and sigma_min exact.

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
  """Raises: ValueError unless the edges are finite, positive and strictly ascending."""
  for edge in edges:
    checks.finite(edges=edge)
  if list(edges) != sorted(set(edges)) or (edges and edges[0] <= 0):
    raise ValueError(f'edges must be positive and ascend, got {tuple(edges)}')


def lognormal(*, mean: float, std: float) -> Times:
  """ln t ~ N(mean, std^2).

  Raises: ValueError unless mean is finite and std > 0.

  Source: Karras et al. 2022 (EDM), table 1, with mean -1.2 and std 1.2.
  """
  checks.finite(mean=mean)
  checks.positive(std=std)
  return lambda key, n: jnp.exp(mean + std * jax.random.normal(key, (n,)))


def karras_time(
  u: Array, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Array:
  """tau(u) f32[...] of u f32[...], with tau(0) = sigma_min and tau(1) = sigma_max.

  The Karras grid of N points is tau(0), tau(1 / (N - 1)), ..., tau(1).

  Source: Song et al. 2023, appendix B; Karras et al. 2022 (EDM), eq. (5).
  """
  return karras_at(1.0 - u, 2, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


def karras_uniform(
  *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Times:
  """t = tau(u), u uniform in [0, 1]: the limit of `karras_pairs` for large num_scales.

  Raises: ValueError unless 0 < sigma_min < sigma_max and rho > 0.

  Source: Song et al. 2023, theorems 3 to 6.
  """
  check_grid(sigma_min, sigma_max, rho)
  grid = dict(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
  return lambda key, n: karras_time(jax.random.uniform(key, (n,)), **grid)


def neighbour(
  t: Array, relative_gap: Array, *, k: float = 8.0, b: float = 1.0
) -> Array:
  """r = max(0, t (1 - n(t) relative_gap)) f32[B], with n(t) = 1 + k sigmoid(-b t).

  Source: Geng et al. 2024 (ECT); locuslab/ect `loss.py`.
  """
  return jnp.maximum(t * (1.0 - (1.0 + k * jax.nn.sigmoid(-b * t)) * relative_gap), 0.0)


def check_pairs(pairs: Pairs, *, equal: bool = False, above: bool = False) -> None:
  """Checks 0 <= r < t on 64 draws; `equal` also allows r = t, `above` requires r > 0.

  Raises: ValueError with the first pair outside this range.
  """
  t, r = pairs(jax.random.key(0), 64, jnp.int32(0))
  low, high = (r <= 0) if above else (r < 0), (r > t) if equal else (r >= t)
  wrong = low | high | ~jnp.isfinite(t - r)
  if bool(jnp.any(wrong)):
    i = int(jnp.argmax(wrong))
    raise ValueError(
      f'needs pairs with 0 {"<" if above else "<="} r {"<=" if equal else "<"} t, got '
      f'r={r[i]:.4g} for t={t[i]:.4g}'
    )


def ect_pairs(
  *, times: Times, relative_gap: Schedule, k: float = 8.0, b: float = 1.0
) -> Pairs:
  """t drawn from `times`, and r = `neighbour` of t at the step's relative gap.

  Raises: ValueError unless k and b are finite.

  Source: Geng et al. 2024 (ECT); locuslab/ect `loss.py`.
  """
  checks.finite(k=k, b=b)

  def pairs(key, n, step):
    t = times(key, n)
    return t, neighbour(t, relative_gap(step), k=k, b=b)

  return pairs


def karras_pairs(
  *,
  num_scales: Schedule,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Pairs:
  """Adjacent points of the Karras grid of num_scales(step) points, drawn uniformly.

  Raises: ValueError unless 0 < sigma_min < sigma_max and rho > 0.

  Source: Song et al. 2023, algorithms 2 and 3.
  """
  check_grid(sigma_min, sigma_max, rho)

  def pairs(key, n, step):
    points = num_scales(step)
    last = points.astype(jnp.int32) - 1
    index = jax.random.randint(key, (n,), 0, last).astype(jnp.float32)
    grid = dict(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    return karras_at(index, points, **grid), karras_at(index + 1, points, **grid)

  return pairs


def lognormal_pairs(
  *,
  num_scales: Schedule,
  mean: float = -1.1,
  std: float = 2.0,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Pairs:
  """Adjacent points of the Karras grid of num_scales(step) points, drawn lognormally.

  A draw of t, ln t ~ N(mean, std^2), truncated to [sigma_min, sigma_max], selects the
  grid interval that it falls into. This gives the probabilities of the paper,
  proportional to erf(upper) - erf(lower), without a table.

  Raises: ValueError unless 0 < sigma_min < sigma_max, rho > 0 and std > 0.

  Source: Song & Dhariwal 2023 (iCT), section 3.5.
  """
  check_grid(sigma_min, sigma_max, rho)
  checks.finite(mean=mean)
  checks.positive(std=std)
  grid = dict(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
  lower = (math.log(sigma_min) - mean) / std
  upper = (math.log(sigma_max) - mean) / std

  def pairs(key, n, step):
    points = num_scales(step)
    z = jax.random.truncated_normal(key, lower, upper, (n,))
    sigma = jnp.exp(mean + std * z)
    bottom, top = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    u = (sigma ** (1 / rho) - bottom) / (top - bottom)
    index = jnp.clip(jnp.floor((1.0 - u) * (points - 1)), 0.0, points - 2)
    return karras_at(index, points, **grid), karras_at(index + 1, points, **grid)

  return pairs


def logit_normal_pairs(
  *, mean: float = -0.4, std: float = 1.0, equal_fraction: float = 0.75
) -> Pairs:
  """Times t >= r of the linear process, both logit-normal.

  In the first `equal_fraction` of the rows r = t; there MeanFlow is flow matching.

  Raises: ValueError unless std > 0 and equal_fraction is in [0, 1].

  Source: Geng et al. 2025 (MeanFlow), section 4.3; Gsunshine/meanflow.
  """
  checks.finite(mean=mean)
  checks.positive(std=std)
  checks.fraction(equal_fraction=equal_fraction)

  def pairs(key, n, step):
    both = jax.nn.sigmoid(mean + std * jax.random.normal(key, (2, n)))
    t, r = jnp.max(both, axis=0), jnp.min(both, axis=0)
    return t, jnp.where(jnp.arange(n) < round(equal_fraction * n), t, r)

  return pairs


def dyadic_pairs(*, num_steps: int = 128, flow_fraction: float = 0.75) -> Pairs:
  """Grid times t and r of the linear process, 1/2^i apart.

  The gaps are 1, 1/2, ..., 2 / num_steps, equally likely; t and r are multiples of the
  gap. In the first `flow_fraction` of the rows the gap is 1 / num_steps; there
  shortcut models are trained by flow matching.

  Raises: ValueError unless num_steps is a power of two from 2 to 65,536 and
    flow_fraction is in [0, 1].

  Source: Frans et al. 2024 (shortcut models), section 3.2; kvfrans/shortcut-models.
  Differs: gaps are drawn at random; theirs are assigned to rows in turn.
  """
  checks.whole(2, 2**16, num_steps=num_steps)
  checks.fraction(flow_fraction=flow_fraction)
  num_gaps = num_steps.bit_length() - 1
  if num_steps != 2**num_gaps:
    raise ValueError(f'num_steps must be a power of two, got {num_steps}')

  def pairs(key, n, step):
    u = jax.random.uniform(key, (2, n))
    flow = jnp.arange(n) < round(flow_fraction * n)
    gap = 2.0 ** -jnp.floor(u[0] * num_gaps)  # 1, 1/2, ..., 2 / num_steps
    gap = jnp.where(flow, 1.0 / num_steps, gap)
    t = gap * (1.0 + jnp.floor(u[1] / gap))
    return t, t - gap

  return pairs
