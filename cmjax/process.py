"""The forward process x_t = alpha(t) x0 + sigma(t) z, z ~ N(0, I), and its ODE."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Array, expand


class Process(NamedTuple):
  """A forward process: its coefficients, and the time of a noise-to-signal ratio.

  All are f32[B] -> f32[B]. `time_of` inverts t -> sigma(t) / alpha(t), the noise level
  sigma of the VE process with the same signal-to-noise ratio.
  """

  alpha: Callable[[Array], Array]
  sigma: Callable[[Array], Array]
  time_of: Callable[[Array], Array]


# Variance exploding, x_t = x0 + t z: EDM (Karras et al. 2022), sigma(t) = t, s(t) = 1.
VE = Process(alpha=jnp.ones_like, sigma=lambda t: t, time_of=lambda sigma: sigma)

# Flow matching, x_t = (1 - t) x0 + t z, t in [0, 1] (Lipman et al. 2023).
LINEAR = Process(
  alpha=lambda t: 1.0 - t,
  sigma=lambda t: t,
  time_of=lambda sigma: sigma / (1.0 + sigma),
)


def trigflow(sigma_data: float = 0.5) -> Process:
  """x_t = cos t x0 + sigma_data sin t z, t in [0, pi / 2].

  Raises: ValueError unless sigma_data > 0.

  Source: Lu & Song 2024 (sCM), section 3.1, whose z has standard deviation
    sigma_data.
  """
  checks.positive(sigma_data=sigma_data)
  return Process(
    alpha=jnp.cos,
    sigma=lambda t: sigma_data * jnp.sin(t),
    time_of=lambda sigma: jnp.arctan(sigma / sigma_data),
  )


def perturb(process: Process, x0: Array, z: Array, t: Array) -> Array:
  """x_t f32[B, ...] from data x0 and noise z, both f32[B, ...], at times t f32[B]."""
  return expand(process.alpha(t), x0) * x0 + expand(process.sigma(t), z) * z


def conditional_velocity(process: Process, x0: Array, z: Array, t: Array) -> Array:
  """dx_t/dt f32[B, ...] at fixed data and noise: exact, by `jax.jvp`."""
  return jax.jvp(lambda t: perturb(process, x0, z, t), (t,), (jnp.ones_like(t),))[1]


def change_process(
  source: Process, to: Process, x: Array, t: Array
) -> tuple[Array, Array]:
  """x_t of one process -> x_t' of another, at the same signal-to-noise ratio.

  x f32[B, ...] at t f32[B] of `source` -> x' and t' of `to`, with the same data and
  noise; alpha(t) must not be zero.

  Source: Karras et al. 2022 (EDM), section 2; Kingma et al. 2021 (VDM), section 5.1.
  """
  new_t = to.time_of(source.sigma(t) / source.alpha(t))
  return expand(to.alpha(new_t) / source.alpha(t), x) * x, new_t


def noise_of(process: Process, x_t: Array, x0: Array, t: Array) -> Array:
  """z f32[B, ...] from x_t and x0, both f32[B, ...]; sigma(t) must not be zero."""
  alpha, sigma = expand(process.alpha(t), x0), expand(process.sigma(t), x0)
  return (x_t - alpha * x0) / sigma


def score_of(process: Process, x_t: Array, x0: Array, t: Array) -> Array:
  """Score f32[B, ...] from the posterior mean x0 = E[x0 | x_t]: -z / sigma(t).

  Source: Vincent 2011 (denoising score matching); EDM, eq. (3).
  """
  return -noise_of(process, x_t, x0, t) / expand(process.sigma(t), x0)


def marginal_velocity(process: Process, x_t: Array, x0: Array, t: Array) -> Array:
  """dx/dt f32[B, ...] of the probability-flow ODE from the posterior mean x0.

  For VE it is (x_t - x0) / t: Karras et al. 2022 (EDM), eqs. (1) and (3).
  """
  return conditional_velocity(process, x0, noise_of(process, x_t, x0, t), t)


def data_of_noise(process: Process, x_t: Array, z: Array, t: Array) -> Array:
  """x0 from x_t and z, all f32[B, ...]; alpha(t) must not be zero."""
  return (x_t - expand(process.sigma(t), z) * z) / expand(process.alpha(t), z)


def data_of_score(process: Process, x_t: Array, score: Array, t: Array) -> Array:
  """E[x0 | x_t] from the score, all f32[B, ...]; alpha(t) must not be zero.

  Source: Tweedie's formula (Efron 2011).
  """
  return data_of_noise(process, x_t, -expand(process.sigma(t), score) * score, t)


def data_of_velocity(process: Process, x_t: Array, v: Array, t: Array) -> Array:
  """E[x0 | x_t] from dx/dt of the ODE, all f32[B, ...].

  x_t and v give two linear equations in x0 and z, which are independent at every t of
  the VE, TrigFlow and linear processes, endpoints included.
  """
  ones = jnp.ones_like(t)
  alpha, d_alpha = jax.jvp(process.alpha, (t,), (ones,))
  sigma, d_sigma = jax.jvp(process.sigma, (t,), (ones,))
  determinant = alpha * d_sigma - d_alpha * sigma
  return expand(d_sigma / determinant, v) * x_t - expand(sigma / determinant, v) * v
