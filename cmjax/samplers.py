"""From noise to data: samplers are pure functions of (f, params, keys, cond, shape).

Each sample has its own key, so that a sample does not depend on the batch it is in.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import solvers
from cmjax.core import Array, Key, Model, Params
from cmjax.fields import probability_flow
from cmjax.process import VE
from cmjax.times import karras


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


def multistep(*, times: Sequence[float], sigma_min: float = 0.0) -> Sampler:
  """Alternates f with fresh noise: f at times[0], noise to times[1], f, and so on.

  `times` are noise levels, descending, not indices; one evaluation each. Noise is added
  with standard deviation sqrt(t^2 - sigma_min^2).

  Raises: ValueError if times are empty, do not descend, or end below sigma_min.

  Source: Song et al. 2023, algorithm 1; with sigma_min = 0 as locuslab/ect samples.
  """
  if not times or list(times) != sorted(set(times), reverse=True):
    raise ValueError(f'multistep: times must descend, and be at least one, got {times}')
  if times[-1] <= sigma_min:
    raise ValueError(f'multistep: times end at {times[-1]}, not above {sigma_min=}')

  def sampler(f, params, keys, cond, shape):
    x = times[0] * _normal(keys, 0, shape)
    for i, t in enumerate(times):
      if i > 0:
        x += (t**2 - sigma_min**2) ** 0.5 * _normal(keys, i, shape)
      x = f(params, x, jnp.full(len(x), t, x.dtype), cond, key=None)
    return Samples(x, evaluations=len(times))

  return sampler


def one_step(*, sigma_max: float = 80.0) -> Sampler:
  """f(sigma_max z, sigma_max): one evaluation. Source: Song et al. 2023, section 3."""
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

  Raises: ValueError for another solver, fewer than two steps, or a grid that is none.

  Source: Karras et al. 2022 (EDM), algorithm 1.
  Differs: the state is float32; NVlabs/edm keeps float64.
  """
  if solver not in ('heun', 'euler') or steps < 2:
    raise ValueError(f"ode: needs solver 'heun' or 'euler', got {solver=}, {steps=}")
  advance = {'heun': solvers.heun, 'euler': solvers.euler}[solver]
  grid = np.asarray(karras(steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho))
  evaluations = steps + (steps - 1 if solver == 'heun' else 0)

  def sampler(f, params, keys, cond, shape):
    flow = probability_flow(VE, lambda x, t: f(params, x, t, cond, key=None))

    def step(x, pair):
      t, r = (jnp.full(len(x), level) for level in pair)
      return advance(flow, x, t, r), None

    x = sigma_max * _normal(keys, 0, shape)
    x, _ = jax.lax.scan(step, x, (grid[:-1], grid[1:]))
    last = jnp.full(len(x), grid[-1])
    return Samples(solvers.euler(flow, x, last, jnp.zeros_like(last)), evaluations)

  return sampler
