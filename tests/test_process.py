"""The forward process: velocities are derivatives, conversions are inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import fields, oracles, process
from cmjax.core import expand

# The process, its coefficients in numpy, and where its time ends.
PROCESSES = {
  've': (process.VE, np.ones_like, lambda t: t, 80.0),
  'trigflow': (process.trigflow(0.5), np.cos, lambda t: 0.5 * np.sin(t), np.pi / 2),
  'linear': (process.LINEAR, lambda t: 1 - t, lambda t: t, 1.0),
}
# Changes between any two of them, and of each to itself.
CHANGES = pytest.mark.parametrize(
  ('source', 'to'),
  [
    pytest.param(a[0], b[0], id=f'{i} to {j}')
    for i, a in PROCESSES.items()
    for j, b in PROCESSES.items()
  ],
)
MIXTURE = oracles.Mixture(
  np.array([0.5, 0.3, 0.2]),
  np.array([[0.7, 0.1], [-0.5, 0.4], [0.0, -0.6]]),
  np.array([0.3, 0.25, 0.4]),
)
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
def test_perturb_is_alpha_data_plus_sigma_noise(name, draws):
  path, alpha, sigma, _ = PROCESSES[name]
  x0, z, t = (np.asarray(v) for v in draws)
  for i, row in enumerate(process.perturb(path, *draws)):
    expected = alpha(t[i]) * x0[i] + sigma(t[i]) * z[i]
    np.testing.assert_allclose(row, expected, **ROUNDING)


def test_conditional_velocity_is_the_finite_difference_of_perturb(path, draws):
  x0, z, t = draws
  h = 1e-5  # error h^2 / 6 ~ 2e-11, rounding 1e-16 / h ~ 1e-11
  ahead, behind = (process.perturb(path, x0, z, t + s) for s in (h, -h))
  difference = (ahead - behind) / (2 * h)
  np.testing.assert_allclose(
    process.conditional_velocity(path, x0, z, t), difference, atol=1e-9
  )


def test_noise_of_inverts_perturb(path, draws):
  x0, z, t = draws
  x_t = process.perturb(path, x0, z, t)
  np.testing.assert_allclose(process.noise_of(path, x_t, x0, t), z, **ROUNDING)


def test_score_is_the_gradient_of_the_transition_density(path, draws):
  x0, z, t = draws
  x_t = process.perturb(path, x0, z, t)

  def log_density(x):
    offset = (x - expand(path.alpha(t), x) * x0) / expand(path.sigma(t), x)
    return -jnp.sum(offset**2) / 2

  score = process.score_of(path, x_t, x0, t)
  np.testing.assert_allclose(score, jax.grad(log_density)(x_t), **ROUNDING)


def test_marginal_velocity_of_the_exact_data_is_the_conditional_velocity(path, draws):
  x0, z, t = draws
  velocity = process.marginal_velocity(path, process.perturb(path, x0, z, t), x0, t)
  np.testing.assert_allclose(
    velocity, process.conditional_velocity(path, x0, z, t), **ROUNDING
  )


def test_velocity_of_ve_is_the_offset_over_t(draws):
  x0, x_t, t = draws
  velocity = process.marginal_velocity(process.VE, x_t, x0, t)
  np.testing.assert_allclose(velocity, (x_t - x0) / expand(t, x_t), **ROUNDING)


MEAN, STD = 0.3, 0.4


def exact_map(path, x, t, r):
  """From t to r along the ODE of N(MEAN, STD^2): it keeps the quantile."""
  spread_t, spread_r = (
    jnp.sqrt((path.alpha(s) * STD) ** 2 + path.sigma(s) ** 2) for s in (t, r)
  )
  offset = x - expand(path.alpha(t), x) * MEAN
  return expand(path.alpha(r), x) * MEAN + expand(spread_r / spread_t, x) * offset


def test_velocity_from_the_posterior_mean_is_the_exact_flow_of_a_gaussian(path, draws):
  _, x, t = draws
  alpha, sigma = (expand(v(t), x) for v in (path.alpha, path.sigma))
  wiener = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
  posterior_mean = MEAN + wiener * (x - alpha * MEAN)
  exact = jax.jvp(lambda r: exact_map(path, x, t, r), (t,), (jnp.ones_like(t),))[1]
  velocity = process.marginal_velocity(path, x, posterior_mean, t)
  np.testing.assert_allclose(velocity, exact, **ROUNDING)


# What a network may predict --------------------------------------------------------


def test_data_comes_back_from_noise_score_and_velocity(path, draws):
  x0, z, t = draws
  x_t = process.perturb(path, x0, z, t)
  for forward, inverse in (
    (process.noise_of, process.data_of_noise),
    (process.score_of, process.data_of_score),
    (process.marginal_velocity, process.data_of_velocity),
  ):
    found = inverse(path, x_t, forward(path, x_t, x0, t), t)
    # The smallest coefficient to divide by is 0.1, alpha(0.9) of the linear process.
    np.testing.assert_allclose(found, x0, **ROUNDING)


@pytest.mark.parametrize('name', PROCESSES)
def test_data_comes_back_from_the_velocity_at_both_ends_of_time(name, draws):
  path, _, _, end = PROCESSES[name]
  x0, z, _ = draws
  for t in (0.0, end):
    t = jnp.full(4, t)
    x_t, v = (
      process.perturb(path, x0, z, t),
      process.conditional_velocity(path, x0, z, t),
    )
    # At 80 of VE x_t and t v, of that size, cancel to x0: 1e-14.
    np.testing.assert_allclose(
      process.data_of_velocity(path, x_t, v, t), x0, **ROUNDING
    )


def test_velocity_gives_data_in_float32_near_the_ends_of_time(path):
  x0, z = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
  t = jnp.array([0.0, 1e-30, 1e-6, 0.5, 0.999999], jnp.float32)
  x_t, v = process.perturb(path, x0, z, t), process.conditional_velocity(path, x0, z, t)
  # Numbers up to three in a few float32 operations.
  np.testing.assert_allclose(process.data_of_velocity(path, x_t, v, t), x0, atol=2e-6)


# Processes -------------------------------------------------------------------------


def test_time_of_a_level_inverts_the_noise_to_signal_ratio(path, draws):
  _, _, t = draws
  level = path.sigma(t) / path.alpha(t)
  np.testing.assert_allclose(path.time_of(level), t, **ROUNDING)
  np.testing.assert_array_equal(path.time_of(jnp.zeros(1)), np.zeros(1))


@CHANGES
def test_a_change_of_process_keeps_data_and_noise(source, to, draws):
  x0, z, t = draws
  x, new_t = process.change_process(source, to, process.perturb(source, x0, z, t), t)
  np.testing.assert_allclose(x, process.perturb(to, x0, z, new_t), **ROUNDING)
  ratio = to.sigma(new_t) / to.alpha(new_t)
  np.testing.assert_allclose(ratio, source.sigma(t) / source.alpha(t), **ROUNDING)
  back, again = process.change_process(to, source, x, new_t)
  np.testing.assert_allclose(again, t, **ROUNDING)
  np.testing.assert_allclose(back, process.perturb(source, x0, z, t), **ROUNDING)


@CHANGES
def test_a_change_of_process_carries_the_exact_map_of_a_gaussian(source, to, draws):
  _, x, t = draws
  r = jnp.asarray([0.3, 0.05, 0.2, 0.5])
  new_x, new_t = process.change_process(source, to, x, t)
  moved, new_r = process.change_process(source, to, exact_map(source, x, t, r), r)
  np.testing.assert_allclose(exact_map(to, new_x, new_t, new_r), moved, **ROUNDING)


@CHANGES
def test_a_change_of_process_carries_the_flow_of_a_mixture(source, to, draws):
  _, x, t = draws
  x = x[:, 0]

  def flow(path):
    return fields.probability_flow(path, lambda x, t: oracles.denoiser(MIXTURE, x, t))

  (new_x, new_t), (dx, dt) = jax.jvp(
    lambda x, t: process.change_process(source, to, x, t),
    (x, t),
    (flow(source)(x, t), jnp.ones_like(t)),
  )
  # dx'/dt = (dt'/dt) v'(x', t'); float64, with quotients of 0.1.
  expected = expand(dt, x) * flow(to)(new_x, new_t)
  np.testing.assert_allclose(dx, expected, rtol=1e-10, atol=1e-11)
