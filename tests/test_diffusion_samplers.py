"""Samplers of denoisers: their orders, their noise, and what they have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import diffusion_samplers, oracles, samplers

MEAN, STD = np.array([0.3, -0.2]), 0.4
GAUSSIAN = oracles.gaussian(MEAN, STD)
MIXTURE = oracles.Mixture(
  np.array([0.6, 0.4]), np.array([[0.7, 0.1], [-0.5, 0.4]]), np.array([0.3, 0.25])
)


def denoiser_of(oracle):
  def f(params, x, t, cond, *, key=None):
    return oracles.denoiser(oracle, x, t.astype(x.dtype))

  return f


def draw(sampler, f, n=8):
  keys = jax.random.split(jax.random.key(0), n)
  return jax.jit(lambda: sampler(f, None, keys, None, (2,)).x)()


def exact(oracle, sigma_max, n=8):
  keys = jax.random.split(jax.random.key(0), n)
  start = sigma_max * samplers.normal(keys, 0, (2,))
  levels = jnp.full(n, sigma_max)
  return oracles.consistency(oracle, start, levels, sigma_end=1e-6, num_steps=2048)


ORDERS = {
  'euler': (diffusion_samplers.ode, dict(solver='euler'), 1),
  'ddim': (diffusion_samplers.ddim, {}, 1),
  'heun': (diffusion_samplers.ode, {}, 2),
  'dpm_solver': (diffusion_samplers.dpm_solver, {}, 2),
  'stochastic, no churn': (diffusion_samplers.stochastic, dict(churn=0.0), 2),
}


@pytest.mark.parametrize('oracle', [GAUSSIAN, MIXTURE], ids=['gaussian', 'mixture'])
@pytest.mark.parametrize('name', ORDERS)
def test_samplers_converge_to_the_exact_map_with_their_order(name, oracle, x64):
  build, settings, order = ORDERS[name]
  settings = settings | dict(sigma_min=1e-3, sigma_max=20.0)
  # The last step, from sigma_min, errs by (sigma_min / std)^2 / 2 ~ 1e-5 of x; it is
  # the same at each number of steps, and so far below the errors that are compared.
  end = exact(oracle, 20.0)

  def error(n):
    x = draw(build(num_steps=n, **settings), denoiser_of(oracle))
    return np.linalg.norm(x - end)

  coarse, fine = error(64), error(128)
  # The next term of the error is of the relative size of a step, about a tenth.
  assert np.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_ddim_without_noise_is_euler_and_stochastic_without_churn_is_heun_to_the_bit():
  f = denoiser_of(MIXTURE)
  euler = draw(diffusion_samplers.ode(num_steps=9, solver='euler'), f)
  ddim = draw(diffusion_samplers.ddim(num_steps=9), f)
  # Another order of operations, in float32, on a state that starts at 80.
  np.testing.assert_allclose(ddim, euler, atol=2e-5)
  heun = draw(diffusion_samplers.ode(num_steps=9), f)
  for still in (dict(churn=0.0), dict(churn_min=90.0, churn_max=91.0)):
    plain = draw(diffusion_samplers.stochastic(num_steps=9, **still), f)
    np.testing.assert_array_equal(plain, heun)


@pytest.mark.parametrize(
  'sampler',
  [
    diffusion_samplers.stochastic(num_steps=200, churn=30.0, noise_scale=1.0),
    diffusion_samplers.ddim(num_steps=200, eta=1.0, rho=20.0),
    diffusion_samplers.ddim(num_steps=200, eta=0.5, rho=20.0),
  ],
  ids=['stochastic', 'ancestral', 'half'],
)
def test_samplers_that_add_noise_keep_the_distribution_of_the_data(sampler):
  n = 4_000
  x = np.asarray(draw(sampler, denoiser_of(GAUSSIAN), n))
  # Five standard errors, and 2 % of the deviation for steps of finite size.
  np.testing.assert_allclose(x.mean(0), MEAN, atol=5 * STD / np.sqrt(n) + 0.01)
  bound = 5 / np.sqrt(2 * n) + 0.02
  np.testing.assert_allclose(x.std(0) / STD, [1, 1], atol=bound)
  # And they are not the deterministic ones.
  plain = np.asarray(
    draw(diffusion_samplers.ode(num_steps=50), denoiser_of(GAUSSIAN), n)
  )
  assert np.corrcoef(x[:, 0], plain[:, 0])[0, 1] < 0.95


def test_noise_levels_are_those_of_the_evaluations():
  levels = []

  def f(params, x, t, cond, *, key=None):
    levels.append(float(t[0]))
    return 0.5 * x

  every = (
    diffusion_samplers.ode(num_steps=5),
    diffusion_samplers.ode(num_steps=5, solver='euler'),
    diffusion_samplers.stochastic(num_steps=5, churn=2.0),
    diffusion_samplers.ddim(num_steps=5),
    diffusion_samplers.dpm_solver(num_steps=5),
  )
  keys, found = jax.random.split(jax.random.key(0), 2), []
  with jax.disable_jit():  # a scan calls f as often as it runs
    for sampler in every:
      levels.clear()
      found.append(sampler(f, None, keys, None, (3,)).sigmas)
      np.testing.assert_allclose(found[-1], levels, rtol=1e-6)  # float32
  grid, raised = np.array(found[1]), np.array(found[2])[::2]
  # Algorithm 2 raises sigma by 2 / 5 between 0.05 and 50: of 80, 17.5, ..., 0.002.
  np.testing.assert_allclose(raised / grid, [1, 1.4, 1.4, 1.4, 1], rtol=1e-12)


@pytest.mark.parametrize(
  ('build', 'arguments', 'match'),
  [
    (diffusion_samplers.ode, dict(solver='rk45'), 'rk45'),
    (diffusion_samplers.ode, dict(num_steps=1), 'num_steps must be'),
    (diffusion_samplers.dpm_solver, dict(num_steps=1), 'num_steps must be'),
    (diffusion_samplers.ddim, dict(eta=1.1), 'eta must be'),
    (diffusion_samplers.stochastic, dict(churn=-1.0), 'churn must be'),
    (diffusion_samplers.stochastic, dict(churn_min=51.0), 'needs churn_min <='),
    (diffusion_samplers.stochastic, dict(noise_scale=-0.1), 'noise_scale must be'),
  ],
)
def test_settings_out_of_range_are_refused(build, arguments, match):
  with pytest.raises(ValueError, match=match):
    build(**arguments)
