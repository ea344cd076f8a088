"""Samplers: pure functions of a model, its parameters, random keys and labels.

Models are on the VE process, and all times are noise levels sigma. Every sample has its
own random key, so that it does not depend on the rest of the batch.
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
  """Samples, and the number of network evaluations (NFE)."""

  x: Array  # f32[B, ...], not clipped
  evaluations: int  # of the network, per sample


class Sampler(Protocol):
  """Draws samples of a model."""

  def __call__(
    self,
    f: Model,
    params: Params,
    keys: Key,
    cond: Array | None,
    shape: tuple[int, ...],
    /,
  ) -> Samples:
    """Samples f32[B, *shape] from keys key[B] and one-hot labels f32[B, K]."""
    ...


def normal(keys: Key, index: int, shape: tuple[int, ...]) -> Array:
  """Standard normals f32[B, *shape], the `index`-th draw of each sample's key."""

  def one(key):
    return jax.random.normal(jax.random.fold_in(key, index), shape)

  return jax.vmap(one)(keys)


def prior(sigma: float, keys: Key, cond: Array | None, shape: tuple[int, ...]) -> Array:
  """Checks `cond` and draws the initial noise sigma z, f32[B, *shape]."""
  if cond is not None:
    one_hot = jnp.ndim(cond) == 2 and jnp.issubdtype(cond.dtype, jnp.floating)
    if not one_hot or len(cond) != len(keys):
      raise ValueError(
        f'cond must be one-hot f32[{len(keys)}, K], as jax.nn.one_hot(labels, K) '
        f'gives, got {cond.dtype}{list(jnp.shape(cond))}'
      )
  return sigma * normal(keys, 0, shape)


def check_descending(sigmas: Sequence[float], above: float) -> None:
  """Raises: ValueError if sigmas are empty, do not descend or are not above `above`."""
  for sigma in sigmas:
    checks.finite(sigmas=sigma)
  if not sigmas:
    raise ValueError('sigmas must not be empty')
  if list(sigmas) != sorted(set(sigmas), reverse=True):
    raise ValueError(f'sigmas must descend, got {tuple(sigmas)}')
  if sigmas[-1] <= above:
    raise ValueError(f'sigmas must be above {above}, got {tuple(sigmas)}')


def multistep(*, sigmas: Sequence[float], sigma_min: float = 0.0) -> Sampler:
  """Multistep consistency sampling: f at sigmas[0], noise to sigmas[1], f, and so on.

  `sigmas` are descending noise levels, with one evaluation each. The added noise has
  standard deviation sqrt(sigma^2 - sigma_min^2).

  Raises: ValueError if sigmas are empty, do not descend or are not all above sigma_min,
    or if sigma_min < 0.

  Source: Song et al. 2023, algorithm 1; locuslab/ect for sigma_min = 0.
  """
  checks.not_negative(sigma_min=sigma_min)
  check_descending(sigmas, sigma_min)

  def sampler(f, params, keys, cond, shape):
    x = prior(sigmas[0], keys, cond, shape)
    for i, sigma in enumerate(sigmas):
      if i > 0:
        x += (sigma**2 - sigma_min**2) ** 0.5 * normal(keys, i, shape)
      x = f(params, x, jnp.full(len(x), sigma, x.dtype), cond, key=None)
    return Samples(x, evaluations=len(sigmas))

  return sampler


def one_step(*, sigma_max: float = 80.0) -> Sampler:
  """One-step sampling: f(sigma_max z, sigma_max), one evaluation.

  Raises: ValueError unless sigma_max > 0.

  Source: Song et al. 2023, section 3.
  """
  checks.positive(sigma_max=sigma_max)
  return multistep(sigmas=(sigma_max,))


def ode(
  *,
  num_steps: int = 18,
  solver: str = 'heun',
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Sampler:
  """Solves the model's probability-flow ODE from sigma_max to 0.

  The grid is a Karras grid of num_steps points; the last step, to 0, is Euler's.
  `solver` is 'heun' (2 num_steps - 1 evaluations) or 'euler' (num_steps evaluations).

  Raises: ValueError for any other solver, or unless 2 <= num_steps <= 100,000,
    0 < sigma_min < sigma_max and rho > 0.

  Source: Karras et al. 2022 (EDM), algorithm 1.
  Differs: the state is float32; NVlabs/edm keeps float64.
  """
  checks.whole(2, 100_000, num_steps=num_steps)
  advance = solvers.by_name(solver)
  grid = karras(num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
  evaluations = num_steps + (num_steps - 1 if solver == 'heun' else 0)

  def sampler(f, params, keys, cond, shape):
    flow = probability_flow(VE, lambda x, sigma: f(params, x, sigma, cond, key=None))

    def step(x, pair):
      sigma, next_sigma = (jnp.full(len(x), s) for s in pair)
      return advance(flow, x, sigma, next_sigma), None

    x = prior(sigma_max, keys, cond, shape)
    x, _ = jax.lax.scan(step, x, (grid[:-1], grid[1:]))
    last = jnp.full(len(x), grid[-1])
    return Samples(solvers.euler(flow, x, last, jnp.zeros_like(last)), evaluations)

  return sampler


def phased(
  *, edges: Sequence[float], sigma_max: float = 80.0, skip: float = 1.0
) -> Sampler:
  """Deterministic sampling of a phased model: one evaluation per segment between edges.

  From sigma_max, each step moves to `skip` times the next lower edge, and the last step
  to 0. A skip slightly below 1 lands inside the next segment; at the edge itself the
  training target is discontinuous. Without edges this is `one_step`.

  Raises: ValueError unless the edges ascend between 0 and sigma_max and 0 < skip <= 1.

  Source: Wang et al. 2024 (Stable Consistency Tuning), sections 4.3 and 4.4.
  """
  checks.positive(sigma_max=sigma_max)
  check_edges(edges)
  if edges and edges[-1] >= sigma_max:
    raise ValueError(f'edges must be below {sigma_max=}, got {tuple(edges)}')
  if not 0 < skip <= 1:
    raise ValueError(f'skip must be in (0, 1], got {skip}')
  lower_edges = [*reversed(edges), 0.0]

  def sampler(f, params, keys, cond, shape):
    x, sigma = prior(sigma_max, keys, cond, shape), sigma_max
    for edge in lower_edges:
      next_sigma = skip * edge
      denoised = f(params, x, jnp.full(len(x), sigma, x.dtype), cond, key=None)
      x, sigma = denoised + next_sigma / sigma * (x - denoised), next_sigma
    return Samples(x, evaluations=len(lower_edges))

  return sampler


def flow_map(*, sigmas: Sequence[float] = (80.0,)) -> Sampler:
  """Deterministic sampling of a two-time model: from one sigma to the next, then to 0.

  `sigmas` are descending noise levels, with one evaluation each.

  Raises: ValueError if sigmas are empty, do not descend or are not positive, or if the
    model is not one of `precond.two_time`.

  Source: Geng et al. 2025 (MeanFlow), algorithm 2.
  """
  check_descending(sigmas, 0.0)

  def sampler(f, params, keys, cond, shape):
    if not isinstance(f, TwoTime):
      raise ValueError(
        f'samplers.flow_map needs a model of precond.two_time, got {type(f).__name__}'
      )
    x = prior(sigmas[0], keys, cond, shape)
    for pair in zip(sigmas, (*sigmas[1:], 0.0)):
      sigma, sigma_end = (jnp.full(len(x), s, x.dtype) for s in pair)
      x = f.move(params, x, sigma, sigma_end, cond)
    return Samples(x, evaluations=len(sigmas))

  return sampler
