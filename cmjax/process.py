"""The forward process x_t = alpha(t) x0 + sigma(t) z, z ~ N(0, I), and its ODE."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmjax.core import Array, expand


class Process(NamedTuple):
  """The two coefficients of a Gaussian process, each f32[B] -> f32[B]."""

  alpha: Callable[[Array], Array]
  sigma: Callable[[Array], Array]


# Variance exploding, x_t = x0 + t z: EDM (Karras et al. 2022), sigma(t) = t, s(t) = 1.
VE = Process(alpha=jnp.ones_like, sigma=lambda t: t)


def point(process: Process, x0: Array, z: Array, t: Array) -> Array:
  """x_t f32[B, ...] from data and noise f32[B, ...] at times f32[B]."""
  return expand(process.alpha(t), x0) * x0 + expand(process.sigma(t), z) * z


def rate(process: Process, x0: Array, z: Array, t: Array) -> Array:
  """dx_t/dt f32[B, ...] at fixed data and noise: exact, by `jax.jvp`."""
  return jax.jvp(lambda t: point(process, x0, z, t), (t,), (jnp.ones_like(t),))[1]


def noise_of(process: Process, x_t: Array, x0: Array, t: Array) -> Array:
  """The z that carries x0 to x_t, both f32[B, ...]; sigma(t) must not be zero."""
  alpha, sigma = expand(process.alpha(t), x0), expand(process.sigma(t), x0)
  return (x_t - alpha * x0) / sigma


def score_of(process: Process, x_t: Array, x0: Array, t: Array) -> Array:
  """Score f32[B, ...] from the posterior mean x0 = E[x0 | x_t]: -z / sigma(t).

  Source: Vincent 2011 (denoising score matching); EDM, eq. (3).
  """
  return -noise_of(process, x_t, x0, t) / expand(process.sigma(t), x0)


def velocity(process: Process, x_t: Array, x0: Array, t: Array) -> Array:
  """dx/dt f32[B, ...] of the probability-flow ODE from the posterior mean x0.

  For VE it is (x_t - x0) / t: Karras et al. 2022 (EDM), eqs. (1) and (3).
  """
  return rate(process, x0, noise_of(process, x_t, x0, t), t)
