"""Preconditioning against published coefficients, and its boundary to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import core, oracles, precond, process
from cmjax.core import expand

# t, c_in, consistency c_skip and c_out, EDM c_skip and c_out, c_noise: in float64, for
# sigma_data = 0.5 and sigma_min = 0.002.
VECTORS = [
  (0.002, 1.99998, 1, 0, 0.999984, 0.001999984, -1.55365),
  (0.01, 1.9996, 0.99974407, 0.0079984005, 0.99960016, 0.0099980006, -1.15129),
  (0.1, 1.96116, 0.96300519, 0.096096906, 0.96153846, 0.098058068, -0.575646),
  (0.5, 1.41421, 0.502004, 0.35213918, 0.5, 0.35355339, -0.173287),
  (1, 0.894427, 0.20064141, 0.44631917, 0.2, 0.4472136, 0),
  (5, 0.199007, 0.0099088371, 0.49731959, 0.0099009901, 0.4975186, 0.402359),
  (80, 0.0124998, 3.9062927e-05, 0.49997773, 3.9060974e-05, 0.49999023, 1.09551),
]


def network(value, seen=None):
  """A network with constant output that records its arguments."""

  def apply(params, x, c_noise, cond, *, key=None):
    if seen is not None:
      seen.update(x=x, c_noise=c_noise, params=params, cond=cond, key=key)
    return jnp.full_like(x, value)

  return core.Network(None, apply)


@pytest.mark.parametrize(
  ('t', 'c_in', 'f_skip', 'f_out', 'd_skip', 'd_out', 'c_noise'), VECTORS
)
def test_coefficients_are_the_published_ones(
  t, c_in, f_skip, f_out, d_skip, d_out, c_noise, x64
):
  level = jnp.full(1, t, jnp.float64)
  one, zero = jnp.ones((1, 2)), jnp.zeros((1, 2))
  for build, skip, out in (
    (precond.consistency, f_skip, f_out),
    (precond.edm, d_skip, d_out),
  ):
    seen = {}
    found_skip = build(network(0.0, seen))(None, one, level, None)
    found_out = build(network(1.0))(None, zero, level, None)
    # Eight digits are printed of c_skip and c_out, six of c_in and c_noise.
    np.testing.assert_allclose(found_skip, np.full((1, 2), skip), rtol=1e-7)
    np.testing.assert_allclose(found_out, np.full((1, 2), out), rtol=1e-7, atol=1e-17)
    np.testing.assert_allclose(seen['x'], np.full((1, 2), c_in), rtol=5e-6)
    np.testing.assert_allclose(seen['c_noise'], [c_noise], rtol=5e-6, atol=1e-15)


@pytest.mark.parametrize(
  ('sigma_data', 'sigma_min'), [(0.5, 0.002), (0.5, 0.003), (0.3, 0.01)]
)
def test_boundary_is_the_identity_to_the_bit(sigma_data, sigma_min):
  model = precond.consistency(network(1e6), sigma_data=sigma_data, sigma_min=sigma_min)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
  x *= jnp.array([[1e-6], [1e-3], [1.0], [1e3], [1e6]])
  t = jnp.full(5, sigma_min)
  for compiled in (model, jax.jit(model, static_argnums=(0, 3))):
    np.testing.assert_array_equal(compiled(None, x, t, None), x)


def test_edm_is_the_consistency_function_with_boundary_zero(x64):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
  t = jnp.array([0.01, 1.0, 80.0])
  np.testing.assert_array_equal(
    precond.edm(network(0.7), sigma_data=0.3)(None, x, t, None),
    precond.consistency(network(0.7), sigma_data=0.3, sigma_min=0.0)(None, x, t, None),
  )


@pytest.mark.parametrize('sigma_data', [0.3, 0.5])
def test_zero_network_is_the_exact_denoiser_of_white_data(sigma_data, x64):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
  t = jnp.array([0.01, 1.0, 80.0])
  exact = oracles.denoiser(oracles.gaussian(np.zeros(2), sigma_data), x, t)
  found = precond.edm(network(0.0), sigma_data=sigma_data)(None, x, t, None)
  # Float64; the oracle cancels x against t^2 x / (t^2 + sigma_data^2).
  np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-15)


def test_parameters_label_and_key_reach_the_network_unchanged():
  seen = {}
  x, t, cond = jnp.ones((2, 4, 4, 1)), jnp.array([0.5, 2.0]), jnp.eye(2)
  params, key = object(), object()
  precond.edm(network(1.0, seen))(params, x, t, cond, key=key)
  assert seen['params'] is params
  assert seen['key'] is key
  assert seen['cond'] is cond
  np.testing.assert_allclose(seen['c_noise'], np.log([0.5, 2.0]) / 4, rtol=1e-6)


# TrigFlow --------------------------------------------------------------------------


def mixing(params, x, t, cond, *, key=None):
  """A network that depends on x, t and label."""
  return jnp.sin(3 * x) + expand(jnp.sin(t), x) + cond[:, :1]


@pytest.fixture
def noisy(x64):
  """x of the VE process, noise levels from small to large, and labels."""
  t = jnp.array([1e-3, 0.1, 0.5, 2.0, 80.0])
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
  return x * jnp.sqrt(0.25 + t[:, None] ** 2), t, jnp.eye(5)


@pytest.mark.parametrize('sigma_data', [0.3, 0.5])
def test_trigflow_is_its_formula_written_out(sigma_data, noisy):
  x, t, cond = noisy
  model = precond.trigflow(core.Network(None, mixing), sigma_data=sigma_data)
  angle = np.arctan(np.asarray(t) / sigma_data)[:, None]
  x_t = np.cos(angle) * np.asarray(x)  # cos x0 + sin sigma_data z
  raw = np.sin(3 * x_t / sigma_data) + np.sin(angle) + np.asarray(cond)[:, :1]
  expected = np.cos(angle) * x_t - np.sin(angle) * sigma_data * raw
  # A few float64 operations on numbers up to 80.
  np.testing.assert_allclose(model(None, x, t, cond), expected, rtol=1e-11, atol=1e-13)


def test_trigflow_is_edm_with_the_sign_of_the_network_turned(noisy):
  x, t, cond = noisy

  def blind(sign):  # the two tell a network the noise level differently
    return core.Network(
      None, lambda params, x, t, cond, *, key=None: sign * jnp.sin(3 * x)
    )

  found = precond.trigflow(blind(-1), sigma_data=0.4)(None, x, t, cond)
  expected = precond.edm(blind(1), sigma_data=0.4)(None, x, t, cond)
  np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)  # as above


def test_trigflow_calls_its_network_at_angles_with_normalised_data():
  seen, key = {}, jax.random.key(0)
  x, t, cond = 2 * jnp.ones((2, 3)), jnp.array([0.5, 1e4]), jnp.eye(2)
  precond.trigflow(network(1.0, seen))('params', x, t, cond, key=key)
  assert seen['params'] == 'params'
  assert seen['cond'] is cond
  assert seen['key'] is key
  np.testing.assert_allclose(seen['c_noise'], [np.pi / 4, np.pi / 2], atol=1e-4)
  cosine = np.cos(seen['c_noise'])[:, None]
  np.testing.assert_allclose(seen['x'], 2 * cosine * np.ones((1, 3)) / 0.5, rtol=1e-5)


@pytest.mark.parametrize('build', [precond.trigflow, precond.edm])
def test_the_slope_at_the_boundary_is_the_network_s(build, x64):
  # f(x, t) = x - t c F + O(t^2): what the boundary leaves to the network.
  x, t = jnp.ones((1, 2)), jnp.full(1, 1e-6)
  slope = (build(network(0.7))(None, x, t, None) - x) / 1e-6
  np.testing.assert_allclose(np.abs(slope), np.full((1, 2), 0.7), rtol=1e-5)


# Two times -------------------------------------------------------------------------


def two_times(params, x, c_noise, cond, *, key=None):
  t, length = c_noise[:, :1], c_noise[:, 1:]
  return jnp.sin(3 * x) + t**2 + 2 * length + cond[:, :1]


def test_two_time_moves_along_its_average_velocity(noisy):
  x, t, cond = noisy
  s = jnp.array([0.0, 0.05, 0.5, 0.4, 3.0])
  model = precond.two_time(core.Network(None, two_times, num_times=2))
  at, then = (np.asarray(v / (1 + v))[:, None] for v in (t, s))
  x_t = (1 - at) * np.asarray(x)  # (1 - t) x0 + t z
  raw = np.sin(3 * x_t) + at**2 + 2 * (at - then) + np.asarray(cond)[:, :1]
  expected = (x_t - (at - then) * raw) / (1 - then)
  found = model.move(None, x, t, s, cond)
  # A few float64 operations; 1 - at is 1 / 81 at the largest noise level.
  np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)
  clean = model.move(None, x, t, jnp.zeros(5), cond)
  np.testing.assert_array_equal(model(None, x, t, cond), clean)


def test_two_time_is_the_identity_for_equal_noise_levels(noisy):
  x, t, cond = noisy
  model = precond.two_time(core.Network(None, two_times, num_times=2))
  # (x (1 - t)) / (1 - t) rounds.
  np.testing.assert_allclose(model.move(None, x, t, t, cond), x, rtol=1e-14)


def test_two_time_of_the_exact_average_velocity_is_the_exact_map(noisy):
  x, t, cond = noisy
  oracle = oracles.gaussian(np.array([0.3, -0.2, 0.1]), 0.4)

  def apply(params, x, c_noise, cond, *, key=None):
    at, then = c_noise[:, 0], c_noise[:, 0] - c_noise[:, 1]
    y, level = process.change_process(process.LINEAR, process.VE, x, at)
    lower = then / (1 - then)
    mean = jnp.asarray(oracle.means)
    shrink = jnp.sqrt((0.4**2 + lower**2) / (0.4**2 + level**2))
    y = mean + expand(shrink, y) * (y - mean)
    moved, _ = process.change_process(process.VE, process.LINEAR, y, lower)
    return (x - moved) / c_noise[:, 1:]

  model = precond.two_time(core.Network(None, apply, num_times=2))
  # Differences of times of 1e-3 cost three digits of float64, and 1 / 81 two.
  exact = oracles.consistency(oracle, x, t, 0.0)
  np.testing.assert_allclose(model(None, x, t, cond), exact, rtol=1e-9, atol=1e-11)
  for s in (0.0, 1e-4, 5e-4):
    exact = oracles.consistency(oracle, x, t, s)
    found = model.move(None, x, t, jnp.full(5, s), cond)
    np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-11)


# Times -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('build', 'num_times', 'needed'),
  [
    (precond.edm, 2, 1),
    (precond.consistency, 2, 1),
    (precond.trigflow, 2, 1),
    (precond.two_time, 1, 2),
    (precond.two_time, 3, 2),
  ],
)
def test_a_network_with_another_number_of_times_is_refused(build, num_times, needed):
  match = rf'num_times={needed}, got num_times={num_times}'
  with pytest.raises(ValueError, match=match):
    build(core.Network(None, mixing, num_times=num_times))


@pytest.mark.parametrize('name', ['edm', 'consistency', 'trigflow', 'two_time'])
def test_a_model_can_be_compiled_as_a_function(name):
  network = core.Network(
    lambda *inputs: {},
    lambda params, x, c_noise, cond, *, key=None: params * x,
    2 if name == 'two_time' else 1,
  )
  f, x, sigma = getattr(precond, name)(network), jnp.ones((2, 3)), jnp.ones(2)
  compiled = jax.jit(f)(0.5, x, sigma, None)
  np.testing.assert_allclose(compiled, f(0.5, x, sigma, None), rtol=1e-6)  # a rounding
