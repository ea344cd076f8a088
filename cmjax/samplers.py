"""Samplers of consistency functions and flow maps, with few evaluations.

A sampler is a pure function of a model, its parameters, random keys and labels. Models
are on the VE process, and all times are noise levels sigma. Every sample has its own
random key, so that it does not depend on the rest of the batch.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Array, Key, Model, Params
from cmjax.precond import TwoTime
from cmjax.times import check_edges, karras


class Samples(NamedTuple):
  """Samples, and the noise level of each network evaluation."""

  x: Array  # f32[B, ...], not clipped
  sigmas: Sequence[float]  # one per evaluation of a network for a sample

  @property
  def evaluations(self) -> int:
    """The number of network evaluations per sample (NFE)."""
    return len(self.sigmas)


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
  """Checks `cond` and draws the initial noise sigma z, f32[B, *shape].

  Raises: ValueError unless `cond` is None or one-hot f32[B, K].
  """
  if cond is not None:
    one_hot = jnp.ndim(cond) == 2 and jnp.issubdtype(cond.dtype, jnp.floating)
    if not one_hot or len(cond) != len(keys):
      raise ValueError(
        f'cond must be one-hot f32[{len(keys)}, K], as jax.nn.one_hot(labels, K) '
        f'gives, got {cond.dtype}{list(jnp.shape(cond))}'
      )
  return sigma * normal(keys, 0, shape)


def check_descending(sigmas: Sequence[float], above: float) -> None:
  """Raises: ValueError unless the sigmas are finite and descend, all above `above`."""
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
    return Samples(x, tuple(sigmas))

  return sampler


def one_step(*, sigma_max: float = 80.0) -> Sampler:
  """One-step sampling: f(sigma_max z, sigma_max), one evaluation.

  Raises: ValueError unless sigma_max > 0.

  Source: Song et al. 2023, section 3.
  """
  checks.positive(sigma_max=sigma_max)
  return multistep(sigmas=(sigma_max,))


def trigflow(
  *, angles: Sequence[float] = (1.1,), sigma_data: float = 0.5, sigma_max: float = 80.0
) -> Sampler:
  """sCM's sampling: one step from sigma_max, and one more from each angle t.

  x_t = cos t f + sigma_data sin t z is f + sigma z on the VE process, with
  sigma = sigma_data tan t, so this is `multistep`. By default two steps.

  Raises: ValueError unless angles descend in (0, arctan(sigma_max / sigma_data)), and
    sigma_data > 0.

  Source: Lu & Song 2024 (sCM), sections 2.1 and 5, with t = 1.1 for two steps.
  """
  checks.positive(sigma_data=sigma_data, sigma_max=sigma_max)
  highest = math.atan(sigma_max / sigma_data)
  if list(angles) != sorted(set(angles), reverse=True):
    raise ValueError(f'angles must descend, got {tuple(angles)}')
  for angle in angles:
    if not 0 < angle < highest:
      raise ValueError(f'angles must be in (0, {highest:.4g}), got {tuple(angles)}')
  sigmas = (sigma_data * math.tan(angle) for angle in angles)
  return multistep(sigmas=(sigma_max, *sigmas))


def _of_grid(n: int, index: int) -> tuple[tuple[float, ...], float]:
  return (80.0, float(karras(n)[index])), 0.002


# Published noise levels of two-step sampling, and the sigma_min of the added noise.
PUBLISHED: dict[str, tuple[tuple[float, ...], float]] = {
  # openai/consistency_models and consistency_models_cifar10: indices of the grids of
  # N points on which the models were trained.
  'cd_cifar10': _of_grid(18, 11),
  'cd_imagenet64': _of_grid(40, 22),
  'ct_imagenet64': _of_grid(201, 106),
  'cd_lpips_bedroom256': _of_grid(40, 17),
  'cd_l2_bedroom256': _of_grid(40, 18),
  'ct_bedroom256': _of_grid(151, 67),
  'ct_cat256': _of_grid(151, 62),
  # Song & Dhariwal 2023 (iCT), section 4; the same for ECT (Geng et al. 2024).
  'ict_cifar10': ((80.0, 0.821), 0.0),
  'ict_imagenet64': ((80.0, 1.526), 0.0),
  # Lu & Song 2024 (sCM): t = 1.1 in TrigFlow.
  'scm': ((80.0, 0.5 * math.tan(1.1)), 0.0),
}


def published(*, name: str) -> Sampler:
  """`multistep` with the noise levels of a publication, by their name in PUBLISHED.

  Raises: ValueError if there is no such name.
  """
  checks.choice(tuple(PUBLISHED), name=name)
  sigmas, sigma_min = PUBLISHED[name]
  return multistep(sigmas=sigmas, sigma_min=sigma_min)


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
  sigmas = (sigma_max, *(skip * edge for edge in reversed(edges)))

  def sampler(f, params, keys, cond, shape):
    x = prior(sigma_max, keys, cond, shape)
    for sigma, next_sigma in zip(sigmas, (*sigmas[1:], 0.0)):
      denoised = f(params, x, jnp.full(len(x), sigma, x.dtype), cond, key=None)
      x = denoised + next_sigma / sigma * (x - denoised)
    return Samples(x, sigmas)

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
    return Samples(x, tuple(sigmas))

  return sampler
