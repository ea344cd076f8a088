"""EDM's objective at the exact denoiser of a Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import core, oracles, precond, times, weightings
from cmjax.objectives import denoise

STD = 0.4
ORACLE = oracles.gaussian(np.array([0.3, -0.2]), STD)


def moved(offset, x, t, cond, *, key=None):
  """The exact denoiser, off by a constant."""
  return oracles.denoiser(ORACLE, x, t) + offset


def test_the_loss_is_written_out():
  draw = np.random.default_rng(0)
  x0, z = (jnp.asarray(draw.normal(size=(5, 2)), jnp.float32) for _ in range(2))
  t = jnp.array([0.01, 0.1, 0.5, 2.0, 30.0])
  weighting = weightings.edm(sigma_data=0.5)
  nets = core.Nets(0.1)
  noisy = core.Noisy(x0 + t[:, None] * z, t, None, None)
  out = denoise.denoising_loss(moved, nets, noisy, x0, weighting=weighting)
  error = moved(0.1, x0 + t[:, None] * z, t, None) - x0
  expected = (1 / t**2 + 4) * jnp.sum(error**2, axis=1)
  np.testing.assert_allclose(out.loss, expected, rtol=1e-5)
  np.testing.assert_array_equal(out.aux['sigma'], t)


def test_its_least_value_is_the_posterior_variance():
  level = 0.7
  loss = denoise.edm(moved, times=lambda key, n: jnp.full(n, level), sigma_data=0.5)
  x0 = oracles.sample(ORACLE, jax.random.key(1), 100_000).astype(jnp.float32)

  def mean(offset):
    keys = core.streams(jax.random.key(2), 0)
    return jnp.mean(loss(core.Nets(offset), core.Batch(x0, None), 0, keys).loss)

  weight = 1 / level**2 + 4
  variance = 2 * STD**2 * level**2 / (STD**2 + level**2)
  # Of 100,000 squares of two normals: standard error 0.3 %.
  np.testing.assert_allclose(mean(0.0), weight * variance, rtol=0.015)
  for offset in (-0.1, 0.1):  # each feature adds offset^2
    extra = weight * 2 * offset**2
    np.testing.assert_allclose(mean(offset) - mean(0.0), extra, rtol=0.1)


def test_times_are_lognormal():
  loss = denoise.edm(moved, times=times.lognormal(mean=-1.2, std=1.2))
  x0 = jnp.zeros((20_000, 2))
  keys = core.streams(jax.random.key(0), 0)
  log_t = np.log(loss(core.Nets(0.0), core.Batch(x0, None), 0, keys).aux['sigma'])
  np.testing.assert_allclose([log_t.mean(), log_t.std()], [-1.2, 1.2], atol=0.04)


def test_a_learned_weighting_divides_the_loss_by_its_mean():
  """Karras et al. 2024, eqs. (15) and (21): the best e^-u is the mean loss."""

  def apply(params, x, c_noise, cond, *, key=None):
    return jnp.zeros_like(x)

  def log_weight(u, c_noise):
    return u + 0.0 * c_noise

  plain = precond.edm(core.Network(None, apply))
  learned = precond.edm(core.Network(None, apply, 1, log_weight))
  draw = np.random.default_rng(0)
  x0 = jnp.asarray(draw.normal(size=(64, 3)), jnp.float32)
  noisy = core.Noisy(1.1 * x0, jnp.full(64, 0.5), None, None)
  weighting = weightings.edm(sigma_data=0.5)

  def losses(f, u):
    nets = core.Nets(jnp.float32(u))
    return denoise.denoising_loss(f, nets, noisy, x0, weighting=weighting).loss

  mean = losses(plain, 0.0) / 3
  for u in (-0.7, 0.0, 1.3):
    np.testing.assert_allclose(losses(learned, u), np.exp(u) * mean - u, rtol=1e-5)
  best = -float(jnp.log(jnp.mean(mean)))
  slope = jax.grad(lambda u: jnp.mean(losses(learned, u)))(jnp.float32(best))
  assert abs(slope) < 1e-5  # rounding of a sum of 64 numbers of order one: 1e-6
