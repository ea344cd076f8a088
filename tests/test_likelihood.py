"""Likelihoods against the closed forms of Gaussians and mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import core, likelihood, oracles
from cmjax.studies.likelihood import likelihood as study_of_likelihood
from cmjax.studies.study import Subject

GRID = dict(sigma_min=0.01, sigma_max=80.0)
X = jnp.ones((2, 3))
GAUSSIAN = oracles.gaussian(np.array([0.3, -0.2, 0.1]), 0.4)


def denoiser_of(oracle):
  """The exact denoiser, on examples of any shape."""

  def denoiser(x, sigma):
    flat = jnp.reshape(x, (len(x), -1))
    return jnp.reshape(oracles.denoiser(oracle, flat, sigma), x.shape)

  return denoiser


def log_density(oracle, x, sigma):
  """log of the mixture convolved with N(0, sigma^2 I): x f64[B, D] -> f64[B]."""
  x, variance = np.asarray(x), oracle.stds**2 + sigma**2
  square = np.sum((x[:, None] - oracle.means[None]) ** 2, axis=2)
  each = np.log(oracle.weights) - square / (2 * variance)
  each = each - x.shape[1] / 2 * np.log(2 * np.pi * variance)
  return np.logaddexp.reduce(each, axis=1)


def draw(oracle, n, sigma=0.01):
  x = oracles.sample(oracle, jax.random.key(0), n)
  return x + sigma * jax.random.normal(jax.random.key(1), x.shape, x.dtype)


def nats_of(oracle, x, num_probes=0, num_steps=64, **more):
  keys = jax.random.split(jax.random.key(2), len(x)) if num_probes else None

  def nats(x):
    settings = dict(num_probes=num_probes, num_steps=num_steps) | GRID | more
    return likelihood.log_likelihood(denoiser_of(oracle), x, keys, **settings).nats

  return np.asarray(jax.jit(nats)(x))


def test_density_of_a_gaussian_is_its_change_of_variables(x64):
  x = draw(GAUSSIAN, 32)
  low, high = (np.hypot(0.4, GRID[name]) for name in ('sigma_min', 'sigma_max'))
  mean, growth = GAUSSIAN.means[0], high / low
  end = mean + growth * (np.asarray(x) - mean)
  exact = log_density(oracles.gaussian(np.zeros(3), 0.0), end, 80.0) + 3 * np.log(
    growth
  )
  # With the state of TrigFlow, RK4 is this close after 64 steps.
  np.testing.assert_allclose(nats_of(GAUSSIAN, x), exact, atol=1e-6)
  # The prior is not the density of the data at sigma_max: mean / 80 = 0.004.
  np.testing.assert_allclose(exact, log_density(GAUSSIAN, x, 0.01), atol=0.03)


@pytest.mark.parametrize('name', ['gaussian', 'mixture'])
def test_bits_per_dim_of_an_exact_trace(name, x64):
  oracle = {'gaussian': oracles.gaussian(np.zeros(2), 0.4), 'mixture': oracles.ring()}
  x = draw(oracle[name], 256)
  width = likelihood.bin_width(-1.0, 1.0, 256)
  found = likelihood.bits_per_dim(nats_of(oracle[name], x), 2, width)
  exact = likelihood.bits_per_dim(log_density(oracle[name], x, 0.01), 2, width)
  np.testing.assert_allclose(np.mean(found), np.mean(exact), rtol=1e-4)


def test_error_of_the_solver_falls_with_its_fourth_order(x64):
  oracle = oracles.ring()
  x = draw(oracle, 64)
  # Four halvings before the exact one: the prior adds the same error to all.
  found = [nats_of(oracle, x, num_steps=n) for n in (32, 64, 128, 256)]
  errors = [np.sqrt(np.mean((nats - found[-1]) ** 2)) for nats in found[:-1]]
  assert errors[1] < 1e-3
  assert 8 < errors[1] / errors[2] < 32


def test_hutchinson_agrees_with_the_exact_trace_within_half_a_per_cent():
  oracle, width = oracles.ring(), likelihood.bin_width(-1.0, 1.0, 256)
  x = draw(oracle, 512).astype(jnp.float32)
  exact = likelihood.bits_per_dim(log_density(oracle, x, 0.01), 2, width)
  found = likelihood.bits_per_dim(nats_of(oracle, x, num_probes=8), 2, width)
  np.testing.assert_allclose(np.mean(found), np.mean(exact), rtol=5e-3)
  # With one probe an example is off, but the mean is not: the estimate is unbiased.
  one = likelihood.bits_per_dim(nats_of(oracle, x, num_probes=1), 2, width)
  assert np.std(one - exact) > 2 * np.std(found - exact)  # 1 / sqrt(8) is 0.35
  assert abs(np.mean(one - exact)) < 4 * np.std(one - exact) / np.sqrt(len(x))


def test_an_example_does_not_depend_on_the_rest_of_the_batch_or_its_shape(x64):
  oracle = oracles.gaussian(np.linspace(-0.5, 0.5, 6), 0.3)
  x = draw(oracle, 5)
  flat = nats_of(oracle, x, num_steps=8)
  image = nats_of(oracle, jnp.reshape(x, (5, 1, 3, 2)), num_steps=8)
  np.testing.assert_allclose(image, flat, rtol=1e-12)  # the same sums
  alone = nats_of(oracle, x[3:4], num_steps=8)
  np.testing.assert_allclose(alone, flat[3:4], rtol=1e-12)


def test_evaluations_are_counted():
  seen = likelihood.log_likelihood(
    lambda x, sigma: 0 * x, jnp.ones((2, 3)), num_steps=5
  )
  assert seen.evaluations == 20


@pytest.mark.parametrize(
  ('low', 'high', 'levels'), [(-1.0, 1.0, 256), (-0.41, 0.93, 17)]
)
def test_bits_of_dequantised_uniform_levels_are_their_entropy(low, high, levels):
  """Levels drawn uniformly have log2(levels) bits, and bins of density 1 / range."""
  width = likelihood.bin_width(low, high, levels)
  level = np.random.default_rng(0).integers(levels, size=(64, 50))
  x0 = jnp.asarray(low + level * width, jnp.float32)
  keys = jax.random.split(jax.random.key(0), 64)
  x = np.asarray(likelihood.dequantise(x0, keys, width))
  assert low - width / 2 - 1e-6 <= x.min() < x.max() <= high + width / 2 + 1e-6
  np.testing.assert_array_equal(np.rint((x - low) / width), level)
  # Var U = width^2 / 12, to 4 deviations of 3,200 draws.
  np.testing.assert_allclose(np.var(x - x0), width**2 / 12, rtol=0.07)
  nats = np.full(64, -50 * np.log(levels * width))  # uniform over all bins
  bits = likelihood.bits_per_dim(nats, 50, width)
  np.testing.assert_allclose(bits, np.log2(levels), rtol=1e-6)


def test_the_offset_of_uint8_images_is_log2_of_127_5():
  width = likelihood.bin_width(-1.0, 1.0, 256)
  np.testing.assert_allclose(likelihood.bits_per_dim(0.0, 3072, width), np.log2(127.5))


def subject(oracle, x0, labels=None):
  def f(params, x, sigma, cond, *, key=None):
    return denoiser_of(oracle)(x, sigma)

  return Subject(f, core.Nets(None), x0, labels)


def test_study_reports_nats_of_points_and_bits_of_levels():
  oracle = oracles.gaussian(np.zeros(2), 0.5)
  x0 = oracles.sample(oracle, jax.random.key(0), 400).astype(jnp.float32)
  few = dict(num_steps=(4, 16), num_samples=300)
  study = study_of_likelihood(subject(oracle, x0), num_probes=0, **few)
  assert [row['evaluations'] for row in study.rows] == [16, 64]
  entropy = np.log(2 * np.pi * np.e * 0.25)  # of two dimensions
  row = study.rows[-1]
  assert abs(row['nats'] + entropy) < 4 * row['standard_error']
  levels = jnp.asarray(np.clip(np.rint(np.asarray(x0) / 0.1), -8, 8) * 0.1)
  study = study_of_likelihood(subject(oracle, levels), num_levels=17, **few)
  row = study.rows[-1]
  # Bins are narrow against std 0.5: the entropy of the density, less log2 of the width.
  bits = entropy / np.log(2) / 2 - np.log2(0.1)
  assert abs(row['bits_per_dim'] - bits) < 4 * row['standard_error'] + 0.01
  assert study.ys == ('bits_per_dim',)


UNEVEN = jnp.arange(3.0)[:, None] ** 2
INVALID = {
  'sigmas': (lambda: nats_of(GAUSSIAN, X, sigma_min=90.0), 'sigma_min < sigma_max'),
  'sigma_data': (lambda: nats_of(GAUSSIAN, X, sigma_data=0.0), 'sigma_data must be'),
  'steps': (lambda: nats_of(GAUSSIAN, X, num_steps=0), 'num_steps must be'),
  'no keys': (
    lambda: likelihood.log_likelihood(denoiser_of(GAUSSIAN), X, num_probes=2),
    'needs keys',
  ),
  'large': (
    lambda: likelihood.log_likelihood(denoiser_of(GAUSSIAN), jnp.ones((1, 5000))),
    'num_probes must be positive',
  ),
  'levels': (lambda: likelihood.bin_width(-1.0, 1.0, 1), 'num_levels must be'),
  'range': (lambda: likelihood.bin_width(1.0, -1.0, 4), 'low < high'),
  'width': (lambda: likelihood.bits_per_dim(0.0, 3, 0.0), 'width must be'),
  'not levels': (
    lambda: study_of_likelihood(
      subject(GAUSSIAN, X.at[0].set(jnp.arange(3.0) ** 2)), num_levels=3
    ),
    'evenly spaced',
  ),
  'no steps': (
    lambda: study_of_likelihood(subject(GAUSSIAN, X), num_steps=()),
    'must not be empty',
  ),
}


@pytest.mark.parametrize('name', INVALID)
def test_invalid_values_are_refused(name):
  call, match = INVALID[name]
  with pytest.raises(ValueError, match=match):
    call()
