"""Samplers on data whose denoiser and consistency map are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import core, diffusion_samplers, oracles, precond, process, samplers
from cmjax.core import expand

MEAN, STD = np.array([0.3, -0.2]), 0.4
GAUSSIAN = oracles.gaussian(MEAN, STD)


def exact_denoiser(params, x, t, cond, *, key=None):
  return oracles.denoiser(GAUSSIAN, x, t.astype(x.dtype))


def exact_map(sigma_min):
  def f(params, x, t, cond, *, key=None):
    return oracles.consistency(GAUSSIAN, x, t, sigma_end=sigma_min)

  return f


def identity(params, x, t, cond, *, key=None):
  return x


# Evaluations -----------------------------------------------------------------------


@pytest.mark.parametrize(
  ('sampler', 'evaluations'),
  [
    (samplers.one_step(), 1),
    (samplers.multistep(sigmas=(80.0, 0.8)), 2),
    (diffusion_samplers.ode(num_steps=18, solver='heun'), 35),
    (diffusion_samplers.ode(num_steps=18, solver='euler'), 18),
    (samplers.phased(edges=(0.5, 5.0)), 3),
  ],
  ids=['one_step', 'multistep', 'heun', 'euler', 'phased'],
)
def test_sampler_evaluates_as_often_as_it_says(sampler, evaluations):
  levels = []

  def f(params, x, t, cond, *, key=None):
    levels.append(np.asarray(t))
    return 0.5 * x

  with jax.disable_jit():  # a scan calls f as often as it runs
    out = sampler(f, None, jax.random.split(jax.random.key(0), 2), None, (3,))
  assert out.evaluations == len(levels) == evaluations
  assert np.all(np.ptp(levels, axis=1) == 0)  # all samples at one level
  levels = np.array(levels)[:, 0]
  assert levels[0] == pytest.approx(80, rel=1e-6)  # float32
  assert np.all(np.diff(levels) <= 0)
  assert np.all(levels > 0)


def test_every_sampler_can_be_built_under_jit():
  builders = (
    samplers.one_step,
    diffusion_samplers.ode,
    lambda: samplers.multistep(sigmas=(80.0, 0.8)),
    lambda: samplers.phased(edges=(1.0,)),
  )
  for build in builders:

    def draw(keys, build=build):
      return build()(exact_denoiser, None, keys, None, (2,)).x

    keys = jax.random.split(jax.random.key(0), 2)
    inside, outside = jax.jit(draw)(keys), draw(keys)
    np.testing.assert_allclose(inside, outside, rtol=1e-4, atol=1e-5)  # float32, of 80


@pytest.mark.parametrize(
  'cond',
  [jnp.arange(2), jnp.arange(2.0), jnp.eye(2, dtype=jnp.int32), jnp.eye(3)],
  ids=['integers', 'numbers', 'integer one-hot', 'other rows'],
)
def test_labels_that_are_not_one_hot_are_refused_in_one_line(cond):
  two_time = precond.two_time(core.Network(None, exact_average_velocity, num_times=2))
  every = {
    samplers.one_step(): identity,
    samplers.multistep(sigmas=(80.0, 0.8)): identity,
    diffusion_samplers.ode(): identity,
    samplers.phased(edges=(1.0,)): identity,
    samplers.flow_map(): two_time,
  }
  for sampler, f in every.items():
    with pytest.raises(ValueError, match=r'cond must be .*jax\.nn\.one_hot') as error:
      sampler(f, None, jax.random.split(jax.random.key(0), 2), cond, (2,))
    assert '\n' not in str(error.value)


def test_parameters_and_label_reach_the_model_and_no_dropout_key():
  cond = jnp.eye(2)

  def f(params, x, t, cond, *, key=None):
    assert key is None
    return params * jnp.tile(cond[:, :1], (1, 3))

  every = (
    samplers.one_step(),
    diffusion_samplers.ode(num_steps=2),
    samplers.phased(edges=(1.0,)),
  )
  for sampler in every:
    keys = jax.random.split(jax.random.key(0), 2)
    out = jax.jit(lambda keys, run=sampler: run(f, 3.0, keys, cond, (3,)).x)(keys)
    # Every evaluation answers the same, so that the last Euler step to zero ends there;
    # up to float32 rounding of the way from 80.
    np.testing.assert_allclose(out, [[3.0] * 3, [0.0] * 3], atol=1e-4)


def unit_noise(keys):
  """What the samplers start from, in units of sigma_max."""
  return samplers.one_step(sigma_max=1.0)(identity, None, keys, None, (2,)).x


# Samplers of a consistency function ------------------------------------------------

N = 20_000


def assert_moments(x, mean, variance):
  """Within five standard errors of independent normals with these moments."""
  assert x.shape == (N, 2)
  np.testing.assert_allclose(x.mean(0), mean, atol=5 * np.sqrt(variance / N))
  bound = 5 * variance * np.sqrt(2 / N)
  np.testing.assert_allclose(np.cov(x.T), variance * np.eye(2), atol=bound)


def draw(sampler, f):
  keys = jax.random.split(jax.random.key(0), N)
  return np.asarray(jax.jit(lambda keys: sampler(f, None, keys, None, (2,)).x)(keys))


@pytest.mark.parametrize('sigma_max', [2.0, 80.0])
def test_one_step_maps_the_prior_as_the_exact_flow_does(sigma_max):
  x = draw(samplers.one_step(sigma_max=sigma_max), exact_map(0.0))
  # The prior is N(0, T^2), not N(mean, std^2 + T^2): that much is lost, exactly.
  shrink = STD / np.sqrt(STD**2 + sigma_max**2)
  assert_moments(x, MEAN * (1 - shrink), (shrink * sigma_max) ** 2)


@pytest.mark.parametrize(
  ('sigmas', 'sigma_min'),
  [((80.0, 0.8), 0.0), ((80.0, 5.0, 0.5), 0.0), ((80.0, 5.0, 0.5), 0.3)],
)
def test_multistep_keeps_the_marginal_of_its_end(sigmas, sigma_min):
  x = draw(samplers.multistep(sigmas=sigmas, sigma_min=sigma_min), exact_map(sigma_min))
  # What is left of the prior's mismatch, std / 80 * std / 5, is below the tolerance.
  assert_moments(x, MEAN, STD**2 + sigma_min**2)


def test_multistep_adds_fresh_noise_each_time():
  seen = []

  def f(params, x, t, cond, *, key=None):
    seen.append(np.asarray(x / expand(t, x)))
    return jnp.zeros_like(x)

  keys = jax.random.split(jax.random.key(0), N)
  samplers.multistep(sigmas=(80.0, 5.0, 0.5))(f, None, keys, None, (2,))
  correlations = np.corrcoef([x.ravel() for x in seen])
  # Five standard errors of a correlation of independent numbers.
  np.testing.assert_allclose(correlations, np.eye(3), atol=5 / np.sqrt(2 * N))
  for x in seen:
    assert_moments(x, np.zeros(2), 1.0)


def test_noise_of_a_sample_depends_on_its_key_alone():
  keys = jax.random.split(jax.random.key(0), 5)
  sampler = samplers.multistep(sigmas=(80.0, 5.0))
  whole = np.asarray(sampler(identity, None, keys, None, (2, 3)).x)
  part = sampler(identity, None, keys[np.array([3, 1])], None, (2, 3)).x
  np.testing.assert_array_equal(part, whole[[3, 1]])
  assert len(np.unique(whole)) == 5 * 2 * 3


def affine(mean, std, sigma):
  """The exact f of N(mean, std^2) at sigma as x -> slope x + shift, to sigma 0."""
  slope = std / np.sqrt(std**2 + sigma**2)
  return slope, mean * (1 - slope)


@pytest.mark.parametrize('num_steps', [1, 2, 4, 8])
def test_multistep_has_the_mean_and_deviation_of_the_closed_form(num_steps, x64):
  sigmas = tuple(np.geomspace(80.0, 0.3, num_steps))
  mean, std = 0.3, 0.4
  oracle = oracles.gaussian(np.array([mean]), std)

  def f(params, x, t, cond, *, key=None):
    return oracles.consistency(oracle, x, t, sigma_end=0.0)

  # Samples are affine in the noise, so their moments follow from its coefficients,
  # which a jacobian gives: the sampler itself, without Monte Carlo.
  def sampled(noise):
    count = iter(noise)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(samplers, 'normal', lambda keys, i, shape: next(count)[None, None])
      keys = jax.random.split(jax.random.key(0), 1)
      return samplers.multistep(sigmas=sigmas)(f, None, keys, None, (1,)).x[0, 0]

  zero = jnp.zeros(num_steps)
  coefficients = jax.jacobian(sampled)(zero)
  expected_mean, expected_variance = 0.0, sigmas[0] ** 2
  for i, sigma in enumerate(sigmas):
    if i:
      expected_variance += sigma**2
    slope, shift = affine(mean, std, sigma)
    expected_mean = slope * expected_mean + shift
    expected_variance *= slope**2
  # Float64 throughout, in a chain of at most 24 operations.
  np.testing.assert_allclose(sampled(zero), expected_mean, rtol=1e-10)
  deviation = np.sqrt(np.sum(coefficients**2))
  np.testing.assert_allclose(deviation, np.sqrt(expected_variance), rtol=1e-10)
  # And the closed form itself is near the data: the prior's mean is 0, not 0.3.
  np.testing.assert_allclose([expected_mean, deviation], [mean, std], atol=2e-3)


def test_trigflow_follows_the_update_of_scm(x64):
  keys = jax.random.split(jax.random.key(0), 4)
  sigma_data, angles = 0.5, (1.4, 1.1)
  f = exact_map(0.0)
  found = samplers.trigflow(angles=angles)(f, None, keys, None, (2,)).x

  def trig(x, t):  # f of a TrigFlow state
    sigma = jnp.full(4, sigma_data * np.tan(t))
    return f(None, x / np.cos(t), sigma, None)

  def noise(i):
    return sigma_data * samplers.normal(keys, i, (2,))

  t = np.arctan(80 / sigma_data)
  x = trig(np.sin(t) * noise(0), t)
  for i, t in enumerate(angles, start=1):
    x = trig(np.cos(t) * x + np.sin(t) * noise(i), t)
  # sCM starts from sin t z, which is 80 z on the VE process.
  np.testing.assert_allclose(found, x, rtol=1e-12)


def test_published_noise_levels_are_those_of_the_papers():
  levels = {name: round(s[1], 3) for name, (s, _) in samplers.PUBLISHED.items()}
  assert levels == {
    **dict(cd_cifar10=0.585, cd_imagenet64=1.382, ct_imagenet64=1.913),
    **dict(cd_lpips_bedroom256=4.366, cd_l2_bedroom256=3.520),
    **dict(ct_bedroom256=3.991, ct_cat256=5.249),
    **dict(ict_cifar10=0.821, ict_imagenet64=1.526, scm=0.982),
  }
  keys = jax.random.split(jax.random.key(0), 2)
  for name, (sigmas, sigma_min) in samplers.PUBLISHED.items():
    found = samplers.published(name=name)(identity, None, keys, None, (3,))
    plain = samplers.multistep(sigmas=sigmas, sigma_min=sigma_min)
    np.testing.assert_array_equal(found.x, plain(identity, None, keys, None, (3,)).x)
  with pytest.raises(ValueError, match='name must be one of cd_cifar10, '):
    samplers.published(name='cd_mnist')


@pytest.mark.parametrize('angles', [(1.1, 1.4), (0.0,), (1.6,), (-1.0,), (np.nan,)])
def test_trigflow_refuses_angles_out_of_range_or_order(angles):
  with pytest.raises(ValueError, match=r'^angles must '):
    samplers.trigflow(angles=angles)


# Samplers between noise levels -----------------------------------------------------

EDGES = (0.5, 5.0)


def exact_jump(params, x, t, cond, *, key=None):
  """The data prediction whose jump to the segment's lower edge is the exact map."""
  levels = jnp.asarray((0.0, *EDGES))
  s = levels[jnp.sum(t[:, None] > levels[None], axis=1) - 1]
  ratio = expand(s / t, x)
  moved = oracles.consistency(GAUSSIAN, x, t, sigma_end=expand(s, x)[:, 0])
  return (moved - ratio * x) / (1 - ratio)


def test_phased_by_exact_jumps_is_the_exact_map(x64):
  keys = jax.random.split(jax.random.key(0), 8)
  found = samplers.phased(edges=EDGES)(exact_jump, None, keys, None, (2,))
  exact = oracles.consistency(
    GAUSSIAN, 80 * unit_noise(keys), jnp.full(8, 80.0), sigma_end=0.0
  )
  # Float64, x of 80 times 1 / 400 at the end.
  np.testing.assert_allclose(found.x, exact, atol=1e-13)
  assert found.evaluations == 3


@pytest.mark.parametrize('skip', [0.8, 1.0])
def test_phased_jumps_to_its_share_of_each_edge(skip):
  seen = []

  def f(params, x, t, cond, *, key=None):
    seen.append((np.asarray(x), np.asarray(t)))
    return jnp.cos(x)

  keys = jax.random.split(jax.random.key(0), 4)
  out = samplers.phased(edges=EDGES, sigma_max=20.0, skip=skip)(
    f, None, keys, None, (2,)
  )
  levels = [20.0, 5.0 * skip, 0.5 * skip]
  x = 20 * unit_noise(keys)
  for (at, t), level, lower in zip(seen, levels, [*levels[1:], 0.0]):
    np.testing.assert_allclose(t, np.full(4, level), rtol=1e-6)
    np.testing.assert_allclose(at, x, rtol=1e-5, atol=1e-6)  # float32
    x = lower / level * at + (1 - lower / level) * np.cos(at)  # DDIM
  np.testing.assert_allclose(out.x, x, rtol=1e-5, atol=1e-6)


def test_phased_by_the_exact_denoiser_is_euler_and_nears_the_exact_map(x64):
  keys = jax.random.split(jax.random.key(0), 8)
  exact = oracles.consistency(
    GAUSSIAN, 80 * unit_noise(keys), jnp.full(8, 80.0), sigma_end=0.0
  )

  def error(n):
    edges = tuple(np.geomspace(0.01, 80.0, n)[:-1])
    x = samplers.phased(edges=edges)(exact_denoiser, None, keys, None, (2,)).x
    return np.linalg.norm(x - exact)

  errors = [error(n) for n in (20, 40, 80)]
  orders = np.log2(np.array(errors[:-1]) / errors[1:])
  # First order; the next term is of the relative size of a step in ln t, 9 / 20.
  np.testing.assert_allclose(orders, [1, 1], atol=0.25)


def test_phased_without_edges_is_one_step_to_the_bit():
  keys = jax.random.split(jax.random.key(0), 5)
  for skip in (1.0, 0.7):  # there is no edge to go past
    found = samplers.phased(edges=(), sigma_max=7.0, skip=skip)(
      exact_denoiser, None, keys, None, (2,)
    )
    plain = samplers.one_step(sigma_max=7.0)(exact_denoiser, None, keys, None, (2,))
    np.testing.assert_array_equal(found.x, plain.x)
    assert found.evaluations == plain.evaluations == 1


def exact_average_velocity(params, x, c_noise, cond, *, key=None):
  """(x_t - x_r) / (t - r) of the linear process, on the Gaussian's exact path."""
  t, r = c_noise[:, 0], c_noise[:, 0] - c_noise[:, 1]
  y, level = process.change_process(process.LINEAR, process.VE, x, t)
  lower = r / (1 - r)
  y = oracles.consistency(GAUSSIAN, y, level, sigma_end=lower)
  moved, _ = process.change_process(process.VE, process.LINEAR, y, lower)
  return (x - moved) / c_noise[:, 1:]


@pytest.mark.parametrize('sigmas', [(80.0,), (80.0, 5.0, 0.5), (2.0, 1.9)])
def test_flow_map_of_the_exact_average_velocity_is_the_exact_map(sigmas, x64):
  calls = []

  def apply(*arguments, key=None):
    calls.append(len(arguments[1]))
    return exact_average_velocity(*arguments)

  model = precond.two_time(core.Network(None, apply, num_times=2))
  keys = jax.random.split(jax.random.key(0), 8)
  found = samplers.flow_map(sigmas=sigmas)(model, None, keys, None, (2,))
  start = sigmas[0] * unit_noise(keys)
  exact = oracles.consistency(GAUSSIAN, start, jnp.full(8, sigmas[0]), sigma_end=0.0)
  # Float64; 1 - t is 1 / 81 at 80, and times differ by 0.01 at least.
  np.testing.assert_allclose(found.x, exact, atol=1e-12)
  assert found.evaluations == len(calls) == len(sigmas)


# Refusals --------------------------------------------------------------------------


def test_flow_map_refuses_a_model_of_one_time():
  keys = jax.random.split(jax.random.key(0), 2)
  for model in (exact_denoiser, precond.edm(core.Network(None, None))):
    with pytest.raises(ValueError, match=r'precond\.two_time'):
      samplers.flow_map()(model, None, keys, None, (2,))


@pytest.mark.parametrize(
  ('sigmas', 'match'),
  [
    ((), 'empty'),
    ((0.8, 80.0), 'must descend'),
    ((80.0, 80.0), 'must descend'),
    ((80.0, 0.0), 'must be above'),
  ],
)
def test_flow_map_refuses_sigmas_that_do_not_descend(sigmas, match):
  with pytest.raises(ValueError, match=rf'sigmas .*{match}'):
    samplers.flow_map(sigmas=sigmas)


@pytest.mark.parametrize(
  'arguments',
  [
    dict(edges=(5.0, 0.5)),
    dict(edges=(0.5, 0.5)),
    dict(edges=(0.0, 0.5)),
    dict(edges=(-1.0,)),
    dict(edges=(0.5, 80.0)),
    dict(edges=(2.0,), sigma_max=1.0),
    dict(edges=(0.5,), skip=0.0),
    dict(edges=(0.5,), skip=1.1),
  ],
)
def test_phased_refuses_invalid_edges_and_skips(arguments):
  with pytest.raises(ValueError, match=r'edges must|skip must'):
    samplers.phased(**arguments)


@pytest.mark.parametrize(
  ('sigmas', 'match'),
  [
    ((), 'empty'),
    ((0.8, 80.0), 'must descend'),
    ((80.0, 0.8, 0.8), 'must descend'),
    ((80.0, 0.0), 'must be above'),
  ],
)
def test_multistep_refuses_sigmas_that_do_not_descend(sigmas, match):
  with pytest.raises(ValueError, match=match):
    samplers.multistep(sigmas=sigmas)


def test_multistep_refuses_to_end_at_its_boundary():
  with pytest.raises(ValueError, match=r'0\.002'):
    samplers.multistep(sigmas=(80.0, 0.002), sigma_min=0.002)
