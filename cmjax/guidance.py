"""Guidance: any sampler with the difference of two models increased.

D_weak + guidance (D - D_weak) takes the place of the model D, at the noise levels of an
interval. It takes two evaluations, and both are counted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks
from cmjax.core import Array, Denoiser, Model, Params
from cmjax.fields import guided
from cmjax.samplers import Sampler, Samples


class GuidedParams(NamedTuple):
  """The parameters of a model and of its worse version."""

  params: Params
  guide: Params


class WithGuide(NamedTuple):
  """A model with a worse version of itself; its parameters are `GuidedParams`."""

  model: Model
  guide: Model

  def __call__(self, params, x, sigma, cond, /, *, key=None) -> Array:
    """The better model at x f32[B, ...] of the VE process and sigma f32[B]."""
    return self.model(params.params, x, sigma, cond, key=key)


def classifier_free(
  *,
  sampler: Sampler,
  guidance: float,
  sigma_low: float = 0.0,
  sigma_high: float = 1e30,
) -> Sampler:
  """Classifier-free guidance where sigma_low < sigma <= sigma_high.

  The weak model is the same one without a label, so it must have been trained with
  label dropout. guidance = 1 is the sampler itself.

  Raises: ValueError unless guidance is finite and 0 <= sigma_low < sigma_high, or when
    it samples without labels.

  Source: Ho & Salimans 2022, eq. (6), in the convention of EDM2; Kynkaanniemi et al.
    2024 for the interval.
  """

  def pair(f: Model, params: Params, cond: Array | None) -> tuple[Denoiser, Denoiser]:
    if cond is None:
      raise ValueError(f'{guidance=} needs labels, and the model has no classes')
    no_label = jnp.zeros_like(cond)
    return (
      lambda x, sigma: f(params, x, sigma, cond, key=None),
      lambda x, sigma: f(params, x, sigma, no_label, key=None),
    )

  return _guided_sampler(sampler, pair, guidance, sigma_low, sigma_high)


def autoguidance(
  *,
  sampler: Sampler,
  guidance: float,
  sigma_low: float = 0.0,
  sigma_high: float = 1e30,
) -> Sampler:
  """Guidance by a worse version of the model where sigma_low < sigma <= sigma_high.

  The worse version, such as an earlier snapshot of its training, is that of a
  `WithGuide`. guidance = 1 is the sampler itself.

  Raises: ValueError unless guidance is finite and 0 <= sigma_low < sigma_high, or when
    it samples a model without a worse version.

  Source: Karras et al. 2024 (autoguidance), eq. (4); Wang et al. 2024 (Stable
    Consistency Tuning), section 4.4, for consistency models.
  """

  def pair(f: Model, params: Params, cond: Array | None) -> tuple[Denoiser, Denoiser]:
    if not isinstance(f, WithGuide):
      raise ValueError(
        'autoguidance needs a model with a guide, a worse version of it; only weights '
        'that are opened for sampling can have one, not those of a run in training'
      )
    return (
      lambda x, sigma: f(params, x, sigma, cond, key=None),
      lambda x, sigma: f.guide(params.guide, x, sigma, cond, key=None),
    )

  return _guided_sampler(sampler, pair, guidance, sigma_low, sigma_high)


def _guided_sampler(
  sampler: Sampler,
  pair: Callable[[Model, Params, Array | None], tuple[Denoiser, Denoiser]],
  guidance: float,
  sigma_low: float,
  sigma_high: float,
) -> Sampler:
  checks.finite(guidance=guidance, sigma_high=sigma_high)
  checks.not_negative(sigma_low=sigma_low)
  if sigma_low >= sigma_high:
    raise ValueError(f'needs sigma_low < sigma_high, got {sigma_low=}, {sigma_high=}')

  low, high = np.float32(sigma_low), np.float32(sigma_high)

  def inside(sigma: Any) -> Any:
    # In float32, so that a bound that is a noise level of the sampler counts as equal
    # to it, both where it is counted (a float) and in the program (an array).
    sigma = sigma.astype(np.float32)
    return (low < sigma) & (sigma <= high)

  def guided_sampler(f, params, keys, cond, shape):
    strong, weak = pair(f, params, cond)
    if guidance == 1:
      return sampler(f, params, keys, cond, shape)
    both = guided(strong, weak, guidance)

    def model(params, x, sigma, cond, /, *, key=None):
      return jax.lax.cond(jnp.all(inside(sigma)), both, strong, x, sigma)

    samples = sampler(model, params, keys, cond, shape)
    twice = [(s,) * (1 + bool(inside(np.asarray(s)))) for s in samples.sigmas]
    return Samples(samples.x, tuple(s for pair in twice for s in pair))

  return guided_sampler
