"""From noise to data: samplers are pure functions of (f, params, keys, cond, shape).

Each sample has its own key, so that a sample does not depend on the batch it is in.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from cmjax import checks, solvers
from cmjax.core import Array, Key, Model, Params
from cmjax.fields import probability_flow
from cmjax.precond import TwoTime
from cmjax.process import VE
from cmjax.times import check_edges, karras


class Samples(NamedTuple):
  """What a sampler made, and how many network evaluations a sample took."""

  x: Array  # f32[B, ...]
  evaluations: int


class Sampler(Protocol):
  """A way from noise to data."""

  def __call__(
    self,
    f: Model,
    params: Params,
    keys: Key,
    cond: Array | None,
    shape: tuple[int, ...],
  ) -> Samples:
    """Keys key[B], cond f32[B, K], shape of one sample -> B samples, not clipped."""


def _normal(keys: Key, index: int, shape: tuple[int, ...]) -> Array:
  """Standard normals f32[B, *shape], the `index`-th draw of each sample's key."""
  return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(
    keys
  )


def _prior(
  sigma: float, keys: Key, cond: Array | None, shape: tuple[int, ...]
) -> Array:
  """What every sampler starts from: sigma z, f32[B, *shape], once cond is checked."""
  if cond is not None:
    one_hot = jnp.ndim(cond) == 2 and jnp.issubdtype(cond.dtype, jnp.floating)
    if not one_hot or len(cond) != len(keys):
      raise ValueError(
        f'cond must be one-hot f32[{len(keys)}, K], as jax.nn.one_hot(labels, K) '
        f'gives, got {cond.dtype}{list(jnp.shape(cond))}'
      )
  return sigma * _normal(keys, 0, shape)


def _check_descending(where: str, times: Sequence[float], above: float) -> None:
  for time in times:
    checks.finite(times=time)
  if not times or list(times) != sorted(set(times), reverse=True):
    raise ValueError(f'{where}: times must descend, and be at least one, got {times}')
  if times[-1] <= above:
    raise ValueError(f'{where}: times end at {times[-1]}, not above {above}')


def multistep(*, times: Sequence[float], sigma_min: float = 0.0) -> Sampler:
  """Alternates f with fresh noise: f at times[0], noise to times[1], f, and so on.

  `times` are noise levels, descending, not indices; one evaluation each. Noise is added
  with standard deviation sqrt(t^2 - sigma_min^2).

  Raises: ValueError if times are empty, do not descend, or end below sigma_min, or for
    a negative sigma_min.

  Source: Song et al. 2023, algorithm 1; with sigma_min = 0 as locuslab/ect samples.
  """
  checks.not_negative(sigma_min=sigma_min)
  _check_descending('multistep', times, sigma_min)

  def sampler(f, params, keys, cond, shape):
    x = _prior(times[0], keys, cond, shape)
    for i, t in enumerate(times):
      if i > 0:
        x += (t**2 - sigma_min**2) ** 0.5 * _normal(keys, i, shape)
      x = f(params, x, jnp.full(len(x), t, x.dtype), cond, key=None)
    return Samples(x, evaluations=len(times))

  return sampler


def one_step(*, sigma_max: float = 80.0) -> Sampler:
  """f(sigma_max z, sigma_max): one evaluation. Source: Song et al. 2023, section 3.

  Raises: ValueError unless sigma_max > 0.
  """
  checks.positive(sigma_max=sigma_max)
  return multistep(times=(sigma_max,))


def ode(
  *,
  steps: int = 18,
  solver: str = 'heun',
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Sampler:
  """Follows the model's own ODE over a Karras grid, then from sigma_min to 0 by Euler.

  `solver` is 'heun' (2 steps - 1 evaluations: 35 for 18) or 'euler' (as many as steps).

  Raises: ValueError for another solver, fewer than 2 steps or more than 100,000, or
    unless 0 < sigma_min < sigma_max and rho > 0.

  Source: Karras et al. 2022 (EDM), algorithm 1.
  Differs: the state is float32; NVlabs/edm keeps float64.
  """
  checks.whole(2, 100_000, steps=steps)
  advance = solvers.by_name(solver)
  grid = karras(steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
  evaluations = steps + (steps - 1 if solver == 'heun' else 0)

  def sampler(f, params, keys, cond, shape):
    flow = probability_flow(VE, lambda x, t: f(params, x, t, cond, key=None))

    def step(x, pair):
      t, r = (jnp.full(len(x), level) for level in pair)
      return advance(flow, x, t, r), None

    x = _prior(sigma_max, keys, cond, shape)
    x, _ = jax.lax.scan(step, x, (grid[:-1], grid[1:]))
    last = jnp.full(len(x), grid[-1])
    return Samples(solvers.euler(flow, x, last, jnp.zeros_like(last)), evaluations)

  return sampler


def phased(
  *, edges: Sequence[float], sigma_max: float = 80.0, skip: float = 1.0
) -> Sampler:
  """Deterministic: from edge to edge, one evaluation each, then to zero.

  Each step jumps to `skip` times the next edge below; a skip a little under 1 lands
  past the edge, where the target of training does not jump. Without edges it is
  `one_step`.

  Raises: ValueError for edges that do not ascend between zero and sigma_max, or a skip
    outside (0, 1].

  Source: Wang et al. 2024 (Stable Consistency Tuning), sections 4.3 and 4.4.
  """
  checks.positive(sigma_max=sigma_max)
  check_edges(edges)
  if edges and edges[-1] >= sigma_max:
    raise ValueError(f'edges must be below {sigma_max=}, got {tuple(edges)}')
  if not 0 < skip <= 1:
    raise ValueError(f'skip must be in (0, 1], got {skip}')
  levels = [0.0, *edges, sigma_max]

  def sampler(f, params, keys, cond, shape):
    x, t = _prior(sigma_max, keys, cond, shape), sigma_max
    for edge in reversed(levels[:-1]):
      s = skip * edge
      denoised = f(params, x, jnp.full(len(x), t, x.dtype), cond, key=None)
      x, t = denoised + s / t * (x - denoised), s
    return Samples(x, evaluations=len(levels) - 1)

  return sampler


def flow_map(*, times: Sequence[float] = (80.0,)) -> Sampler:
  """Deterministic: a two-time model moves from noise level to noise level, then to 0.

  Raises: ValueError if times are empty or do not descend above zero, or for a model of
    one time.

  Source: Geng et al. 2025 (MeanFlow), algorithm 2.
  """
  _check_descending('flow_map', times, 0.0)

  def sampler(f, params, keys, cond, shape):
    if not isinstance(f, TwoTime):
      raise ValueError('flow_map needs config.precond.fn=cmjax.precond:two_time')
    x = _prior(times[0], keys, cond, shape)
    for t, s in zip(times, (*times[1:], 0.0)):
      t, s = (jnp.full(len(x), level, x.dtype) for level in (t, s))
      x = f.move(params, x, t, s, cond)
    return Samples(x, evaluations=len(times))

  return sampler
