"""Preconditioning against published coefficients, and its boundary to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import core, oracles, precond

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
  """A network that answers `value` and notes what it was asked."""

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
