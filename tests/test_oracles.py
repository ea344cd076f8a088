"""Closed forms against independent derivations, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import oracles

MEAN, STD = np.array([0.3, -0.2]), 0.4
GAUSSIAN = oracles.gaussian(MEAN, STD)
MIXTURE = oracles.Mixture(
  np.array([0.5, 0.3, 0.2]),
  np.array([[0.7, 0.1], [-0.5, 0.4], [0.0, -0.6]]),
  np.array([0.3, 0.25, 0.4]),
)
POINTS = oracles.points(np.array([[0.7, 0.1], [-0.5, 0.4], [0.0, -0.6], [0.2, 0.3]]))
# Compiled once for all oracles of a size; a mixture is an argument like any other.
DENOISER = jax.jit(oracles.denoiser)
SCORE = jax.jit(oracles.score)
CONSISTENCY = jax.jit(oracles.consistency)
SAMPLE = jax.jit(oracles.sample, static_argnums=2)

ORACLES = {'gaussian': GAUSSIAN, 'mixture': MIXTURE, 'points': POINTS}


@pytest.fixture
def at(x64):
  """Points x where the process would be at times from small to large."""
  t = np.array([0.1, 0.5, 2.0, 10.0])
  x = np.random.default_rng(0).normal(size=(4, 2)) * np.sqrt(0.25 + t[:, None] ** 2)
  return jnp.asarray(x), jnp.asarray(t)


def log_density(oracle, x, t):
  """ln p_t at one point x f[D], from the definition of a mixture of Gaussians."""
  variance = oracle.stds**2 + t**2
  squared = jnp.sum((x[None] - oracle.means) ** 2, axis=1)
  normaliser = len(x) / 2 * jnp.log(2 * np.pi * variance)
  terms = jnp.log(oracle.weights) - squared / (2 * variance) - normaliser
  return jax.scipy.special.logsumexp(terms)


# Denoiser and score ----------------------------------------------------------------


@pytest.mark.parametrize('name', ORACLES)
def test_score_is_the_gradient_of_the_log_density(name, at):
  oracle = ORACLES[name]
  x, t = at
  gradient = jax.jit(jax.vmap(jax.grad(log_density, 1), (None, 0, 0)))(oracle, x, t)
  # Dividing by t^2 = 0.01 twice costs two digits or three.
  np.testing.assert_allclose(SCORE(oracle, x, t), gradient, rtol=1e-11)


def test_denoiser_and_score_of_a_gaussian_have_their_closed_forms(at):
  x, t = at
  variance = STD**2 + np.asarray(t)[:, None] ** 2
  wiener = (STD**2 * x + np.asarray(t)[:, None] ** 2 * MEAN) / variance
  np.testing.assert_allclose(DENOISER(GAUSSIAN, x, t), wiener, rtol=1e-12)
  score = -(np.asarray(x) - MEAN) / variance
  np.testing.assert_allclose(SCORE(GAUSSIAN, x, t), score, rtol=1e-11)


def test_denoiser_of_points_is_their_softmax(at):
  x, t = (np.asarray(v) for v in at)
  for i, found in enumerate(DENOISER(POINTS, *at)):
    logits = -np.sum((x[i] - POINTS.means) ** 2, axis=1) / (2 * t[i] ** 2)
    weights = np.exp(logits - logits.max())
    np.testing.assert_allclose(
      found, weights @ POINTS.means / weights.sum(), rtol=1e-12
    )


def test_denoiser_of_points_goes_from_the_nearest_to_the_mean(at):
  x = jnp.clip(at[0], -1, 1)
  distance = np.linalg.norm(np.asarray(x)[:, None] - POINTS.means, axis=2)
  nearest = POINTS.means[np.argmin(distance, axis=1)]
  # The gaps of squared distances exceed 0.01: exp(-0.01 / 2e-6) is zero.
  assert np.all(np.diff(np.sort(distance**2, axis=1), axis=1)[:, 0] > 0.01)
  found = DENOISER(POINTS, x, jnp.full(4, 1e-3))
  np.testing.assert_allclose(found, nearest, rtol=1e-14)
  far = DENOISER(POINTS, x, jnp.full(4, 1e5))
  mean = np.tile(POINTS.means.mean(0), (4, 1))
  np.testing.assert_allclose(far, mean, atol=1e-9)  # leading term x / t^2 ~ 1e-10


@pytest.mark.parametrize('name', ORACLES)
def test_denoiser_keeps_the_dtype_of_x(name, at):
  x, t = (v.astype(jnp.float32) for v in at)
  found = DENOISER(ORACLES[name], x, t)
  assert found.dtype == jnp.float32
  assert CONSISTENCY(ORACLES[name], x, t).dtype == jnp.float32
  exact = DENOISER(ORACLES[name], *at)
  # Exponents reach |x - m|^2 / 2 t^2 ~ 1e2: float32 leaves five digits.
  np.testing.assert_allclose(found, exact, atol=2e-5)


# Consistency map -------------------------------------------------------------------


@pytest.mark.parametrize('std', [STD, 0.0])
def test_consistency_of_a_gaussian_has_its_closed_form(std, at):
  x, t = (np.asarray(v) for v in at)
  found = CONSISTENCY(oracles.gaussian(MEAN, std), *at, sigma_end=0.01)
  shrink = np.sqrt((std**2 + 0.01**2) / (std**2 + t**2))[:, None]
  np.testing.assert_allclose(found, MEAN + shrink * (x - MEAN), rtol=1e-13)


def test_consistency_by_integration_agrees_with_the_closed_form(at):
  halves = oracles.Mixture(np.full(2, 0.5), np.stack([MEAN, MEAN]), np.full(2, STD))
  found = CONSISTENCY(halves, *at, num_steps=512)
  exact = CONSISTENCY(GAUSSIAN, *at)
  np.testing.assert_allclose(found, exact, atol=1e-9)  # the integrator's at 512 steps


@pytest.mark.parametrize('name', ['gaussian', 'mixture'])
def test_consistency_is_the_identity_at_its_end(name, at):
  x, t = at
  found = CONSISTENCY(ORACLES[name], x, jnp.full_like(t, 0.3), sigma_end=0.3)
  np.testing.assert_allclose(found, x, rtol=1e-13)


@pytest.mark.parametrize(('name', 'bound'), [('gaussian', 1e-13), ('mixture', 1e-9)])
def test_consistency_maps_compose(name, bound, at):
  oracle, (x, t) = ORACLES[name], at
  r = 0.08
  x_r = CONSISTENCY(oracle, x, t, sigma_end=r, num_steps=512)
  through = CONSISTENCY(oracle, x_r, jnp.full_like(t, r), num_steps=512)
  direct = CONSISTENCY(oracle, x, t, num_steps=512)
  assert np.max(np.abs(x_r - direct)) > 1e-3
  np.testing.assert_allclose(through, direct, atol=bound)


@pytest.mark.parametrize(('name', 'bound'), [('gaussian', 1e-12), ('mixture', 1e-9)])
def test_consistency_is_constant_along_the_flow(name, bound, at):
  oracle, (x, t) = ORACLES[name], at

  def f(x, t):
    return CONSISTENCY(oracle, x, t)

  flow = oracles.field(oracle)(x, t)
  _, along = jax.jvp(f, (x, t), (flow, jnp.ones_like(t)))
  _, by_x = jax.jvp(f, (x, t), (flow, jnp.zeros_like(t)))
  assert np.max(np.abs(by_x)) > 1e-2  # the two parts cancel; neither is small
  assert np.max(np.abs(along)) < bound


def test_consistency_converges_with_order_four(at):
  exact = CONSISTENCY(MIXTURE, *at, num_steps=1024)
  errors = [
    float(np.max(np.abs(CONSISTENCY(MIXTURE, *at, num_steps=steps) - exact)))
    for steps in (64, 128, 256)
  ]
  orders = np.log2(np.array(errors[:-1]) / errors[1:])
  # The next term of the error is of the relative size of a step, 8.5 / 64.
  np.testing.assert_allclose(orders, [4, 4], atol=0.4)
  assert errors[-1] < 1e-7


# Samples ---------------------------------------------------------------------------


@pytest.mark.parametrize('name', [*ORACLES, 'ring'])
def test_samples_have_the_moments_of_the_mixture(name, x64):
  oracle = ORACLES.get(name, oracles.ring())
  n = 20_000
  x = np.asarray(SAMPLE(oracle, jax.random.key(0), n))
  assert x.shape == (n, 2)
  mean = oracle.weights @ oracle.means
  offset = oracle.means - mean
  covariance = np.einsum('k,ki,kj->ij', oracle.weights, offset, offset)
  covariance += oracle.weights @ oracle.stds**2 * np.eye(2)
  # Five standard errors: std / sqrt(n) of a mean, at most sqrt(2 / n) var of a
  # covariance of data whose tails are no heavier than a Gaussian's.
  spread = np.sqrt(np.max(np.diag(covariance)))
  np.testing.assert_allclose(x.mean(0), mean, atol=5 * spread / n**0.5)
  bound = 5 * (2 / n) ** 0.5 * spread**2
  np.testing.assert_allclose(np.cov(x.T), covariance, atol=bound)


def test_samples_of_points_are_the_points_equally_often(x64):
  n = 4_000
  x = np.asarray(SAMPLE(POINTS, jax.random.key(1), n))
  found, counts = np.unique(x, axis=0, return_counts=True)
  np.testing.assert_array_equal(found, np.unique(POINTS.means, axis=0))
  assert np.max(np.abs(counts - n / 4)) < 5 * np.sqrt(n * 3 / 16)  # binomial


def test_samples_of_a_component_have_its_share(x64):
  far = MIXTURE._replace(means=100 * MIXTURE.means)
  n = 4_000
  x = np.asarray(SAMPLE(far, jax.random.key(2), n))
  which = np.argmin(np.linalg.norm(x[:, None] - far.means, axis=2), axis=1)
  shares = np.bincount(which) / n
  np.testing.assert_allclose(shares, far.weights, atol=5 * 0.5 / n**0.5)  # binomial


def test_ring_has_standard_deviation_one_half():
  oracle = oracles.ring()
  variance = np.mean(oracle.means**2, axis=0) + oracle.stds[0] ** 2
  np.testing.assert_allclose(np.sqrt(variance), [0.5, 0.5], atol=2e-3)  # as chosen
  np.testing.assert_allclose(oracle.means.mean(0), [0, 0], atol=1e-15)
