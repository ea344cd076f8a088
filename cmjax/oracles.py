"""Data whose denoiser, score and consistency map are known in closed form (VE process).

An oracle is a mixture of isotropic Gaussians; one component, or components without
width, are its special cases. All work in the dtype of `x`, float64 included.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import fields, process, solvers
from cmjax.core import Array, Field, Key, expand


class Mixture(NamedTuple):
  """sum_k weights_k N(means_k, stds_k^2 I) in D dimensions."""

  weights: np.ndarray  # f[K], sums to 1
  means: np.ndarray  # f[K, D]
  stds: np.ndarray  # f[K]; zero makes the component a point


def gaussian(mean: np.ndarray, std: float) -> Mixture:
  """N(mean f[D], std^2 I)."""
  return Mixture(np.ones(1), np.asarray(mean)[None], np.full(1, std))


def points(data: np.ndarray) -> Mixture:
  """The empirical distribution of data f[N, D]: what a diffusion model memorises."""
  n = len(data)
  return Mixture(np.full(n, 1 / n), np.asarray(data), np.zeros(n))


def ring(modes: int = 6, radius: float = 0.7, std: float = 0.08) -> Mixture:
  """Equal Gaussians on a circle, standard deviation 0.5 by default (cmjax choice)."""
  angle = 2 * np.pi * np.arange(modes) / modes
  means = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
  return Mixture(np.full(modes, 1 / modes), means, np.full(modes, std))


def sample(oracle: Mixture, key: Key, n: int) -> Array:
  """Independent samples f[n, D]."""
  which, noise = jax.random.split(key)
  component = jax.random.choice(
    which, len(oracle.weights), (n,), p=jnp.asarray(oracle.weights)
  )
  means, stds = jnp.asarray(oracle.means), jnp.asarray(oracle.stds)
  z = jax.random.normal(noise, (n, means.shape[1]), means.dtype)
  return means[component] + stds[component, None] * z


def denoiser(oracle: Mixture, x: Array, t: Array) -> Array:
  """E[x0 | x_t = x]: x f[B, D] at t f[B] > 0 -> f[B, D].

  Source: the posterior of a Gaussian mixture; for one component EDM's Wiener filter.
  """
  weights, means, stds = (jnp.asarray(v, x.dtype) for v in oracle)
  variance = stds[None, :] ** 2 + t[:, None] ** 2  # f[B, K]
  offset = x[:, None, :] - means[None]  # f[B, K, D]
  log_density = (
    jnp.log(weights)[None, :]
    - jnp.sum(offset**2, axis=2) / (2 * variance)
    - x.shape[1] / 2 * jnp.log(variance)
  )
  responsibility = jax.nn.softmax(log_density, axis=1)
  shrink = (stds[None, :] ** 2 / variance)[:, :, None]
  return jnp.sum(responsibility[:, :, None] * (means[None] + shrink * offset), axis=1)


def field(oracle: Mixture) -> Field:
  """dx/dt of the exact probability-flow ODE."""
  return fields.probability_flow(process.VE, lambda x, t: denoiser(oracle, x, t))


def score(oracle: Mixture, x: Array, t: Array) -> Array:
  """The gradient of log p_t at x f[B, D], t f[B] > 0 -> f[B, D]."""
  return process.score_of(process.VE, x, denoiser(oracle, x, t), t)


def consistency(
  oracle: Mixture, x: Array, t: Array, s: float = 0.002, steps: int = 1024
) -> Array:
  """The exact consistency map: x f[B, D] at t f[B] -> the same path at s f[B, D].

  In closed form for one Gaussian; else by classical Runge-Kutta in ln t, whose error
  falls as steps^-4 (1e-10 for 512 steps from t = 10, widths near 0.3, float64).
  Differentiable in x and t, as continuous-time objectives need.

  Source: Song et al. 2023, section 3; the Gaussian's map by separation of variables.
  """
  if len(oracle.weights) == 1:
    mean, std = (jnp.asarray(v[0], x.dtype) for v in (oracle.means, oracle.stds))
    shrink = jnp.sqrt((std**2 + s**2) / (std**2 + t**2))
    return mean[None] + expand(shrink, x) * (x - mean[None])

  flow = field(oracle)
  stretch = jnp.log(s / t) / steps  # f[B], one step of ln t

  def slope(x, log_t):
    t = jnp.exp(log_t)
    return expand(t, x) * flow(x, t)

  def step(i, x):
    log_t = jnp.log(t) + i * stretch
    return solvers.runge_kutta4(slope, x, log_t, log_t + stretch)

  return jax.lax.fori_loop(0, steps, step, x)
