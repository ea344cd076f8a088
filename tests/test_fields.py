"""Fields: the straight path of an example, and the flow it averages to."""

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import fields, oracles, process
from cmjax.core import expand

TRIGFLOW = process.trigflow(1.0)


def draws():
  rng = np.random.default_rng(0)
  x0, z, x = (jnp.asarray(v) for v in rng.normal(size=(3, 4, 2)))
  return x0, z, x, jnp.asarray([0.05, 0.3, 0.8, 1.5])


def test_conditional_is_the_noise_for_ve_wherever_x_is(x64):
  x0, z, x, t = draws()
  field = fields.conditional(process.VE, x0, z)
  np.testing.assert_array_equal(field(x, t), z)
  np.testing.assert_array_equal(field(x + 1, 2 * t), z)


def test_conditional_follows_its_own_path(x64):
  x0, z, x, t = draws()
  field = fields.conditional(TRIGFLOW, x0, z)
  rotated = expand(jnp.cos(t), z) * z - expand(jnp.sin(t), x0) * x0
  # The derivative of cos t x0 + sin t z, one rounding a term.
  np.testing.assert_allclose(field(x, t), rotated, rtol=1e-13, atol=1e-15)


def test_conditional_is_unbiased_for_the_flow_given_x(x64):
  data, _, x, t = draws()
  # By Bayes' rule on a finite data set, with no sampling: x at time t came from data i
  # with noise (x - data_i) / t and with probability proportional to its density.
  noise = (x[:, None] - data[None]) / t[:, None, None]
  log_density = -jnp.sum(noise**2, axis=2) / 2
  posterior = np.asarray(jax.nn.softmax(log_density, axis=1))
  own = jax.vmap(lambda x0, z: fields.conditional(process.VE, x0, z)(x, t), (1, 1), 1)
  mean = np.einsum('bi,bid->bd', posterior, own(jnp.tile(data, (4, 1, 1)), noise))
  flow = oracles.field(oracles.points(np.asarray(data)))(x, t)
  # At t = 0.05 the exponents reach 1e3, so that their rounding reaches 1e-12.
  np.testing.assert_allclose(mean, flow, rtol=1e-11, atol=1e-11)


def test_probability_flow_of_a_gaussian_has_its_closed_form(x64):
  _, _, x, t = draws()
  mean, std = np.array([0.3, -0.2]), 0.4
  oracle = oracles.gaussian(mean, std)
  flow = fields.probability_flow(
    process.VE, lambda x, t: oracles.denoiser(oracle, x, t)
  )
  exact = expand(t / (std**2 + t**2), x) * (x - mean[None])
  # The field divides a difference by t >= 0.05.
  np.testing.assert_allclose(flow(x, t), exact, rtol=1e-12, atol=1e-13)
  np.testing.assert_array_equal(oracles.field(oracle)(x, t), flow(x, t))
