"""The forward process: rates are derivatives, conversions undo each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import process
from cmjax.core import expand

# The process, and its coefficients in numpy.
PROCESSES = {
  've': (process.VE, np.ones_like, lambda t: t),
  'trigflow': (process.trigflow(1.0), np.cos, np.sin),
  'linear': (process.LINEAR, lambda t: 1 - t, lambda t: t),
}
ROUNDING = dict(rtol=1e-12, atol=1e-12)  # some ten operations in float64


@pytest.fixture(params=PROCESSES)
def path(request):
  return PROCESSES[request.param][0]


@pytest.fixture
def draws(x64):
  """Data, noise and one time an example, all different."""
  rng = np.random.default_rng(0)
  x0, z = rng.normal(size=(2, 4, 3, 2))
  return jnp.asarray(0.5 * x0), jnp.asarray(z), jnp.asarray([0.1, 0.4, 0.7, 0.9])


@pytest.mark.parametrize('name', PROCESSES)
def test_point_is_alpha_data_plus_sigma_noise(name, draws):
  path, alpha, sigma = PROCESSES[name]
  x0, z, t = (np.asarray(v) for v in draws)
  for i, row in enumerate(process.point(path, *draws)):
    expected = alpha(t[i]) * x0[i] + sigma(t[i]) * z[i]
    np.testing.assert_allclose(row, expected, **ROUNDING)


def test_rate_is_the_finite_difference_of_point(path, draws):
  x0, z, t = draws
  h = 1e-5  # error h^2 / 6 ~ 2e-11, rounding 1e-16 / h ~ 1e-11
  ahead, behind = (process.point(path, x0, z, t + s) for s in (h, -h))
  difference = (ahead - behind) / (2 * h)
  np.testing.assert_allclose(process.rate(path, x0, z, t), difference, atol=1e-9)


def test_noise_of_undoes_point(path, draws):
  x0, z, t = draws
  x_t = process.point(path, x0, z, t)
  np.testing.assert_allclose(process.noise_of(path, x_t, x0, t), z, **ROUNDING)


def test_score_is_the_gradient_of_the_transition_density(path, draws):
  x0, z, t = draws
  x_t = process.point(path, x0, z, t)

  def log_density(x):
    offset = (x - expand(path.alpha(t), x) * x0) / expand(path.sigma(t), x)
    return -jnp.sum(offset**2) / 2

  score = process.score_of(path, x_t, x0, t)
  np.testing.assert_allclose(score, jax.grad(log_density)(x_t), **ROUNDING)


def test_velocity_from_the_own_data_is_the_rate(path, draws):
  x0, z, t = draws
  velocity = process.velocity(path, process.point(path, x0, z, t), x0, t)
  np.testing.assert_allclose(velocity, process.rate(path, x0, z, t), **ROUNDING)


def test_velocity_of_ve_is_the_offset_over_t(draws):
  x0, x_t, t = draws
  velocity = process.velocity(process.VE, x_t, x0, t)
  np.testing.assert_allclose(velocity, (x_t - x0) / expand(t, x_t), **ROUNDING)


def test_velocity_from_the_posterior_mean_is_the_exact_flow_of_a_gaussian(path, draws):
  _, x, t = draws
  mean, std = 0.3, 0.4

  def spread(t):
    return jnp.sqrt((path.alpha(t) * std) ** 2 + path.sigma(t) ** 2)

  def centre(t):
    return expand(path.alpha(t), x) * mean

  def flow(r):  # keeps the quantile: the exact map from t to r
    return centre(r) + expand(spread(r) / spread(t), x) * (x - centre(t))

  wiener = expand(path.alpha(t) * std**2 / spread(t) ** 2, x)
  posterior_mean = mean + wiener * (x - centre(t))
  exact = jax.jvp(flow, (t,), (jnp.ones_like(t),))[1]
  velocity = process.velocity(path, x, posterior_mean, t)
  np.testing.assert_allclose(velocity, exact, **ROUNDING)
