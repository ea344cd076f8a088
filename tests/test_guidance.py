"""Guidance against the exact guided denoiser of a mixture with two classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import diffusion_samplers, guidance, oracles, samplers

MEANS = np.array([[0.7, 0.1], [-0.5, 0.4]])
CLASSES = [oracles.gaussian(mean, 0.3) for mean in MEANS]
BOTH = oracles.Mixture(np.array([0.5, 0.5]), MEANS, np.array([0.3, 0.3]))
WORSE = oracles.gaussian(np.zeros(2), 0.8)


def classes(params, x, sigma, cond, /, *, key=None):
  """The exact denoiser with a label, or of both classes with a row of zeros."""
  sigma = sigma.astype(x.dtype)
  parts = [oracles.denoiser(oracle, x, sigma) for oracle in (*CLASSES, BOTH)]
  weights = jnp.concatenate([cond, 1 - jnp.sum(cond, 1, keepdims=True)], axis=1)
  return params * sum(w[:, None] * d for w, d in zip(weights.T, parts))


def worse(params, x, sigma, cond, /, *, key=None):
  return params * oracles.denoiser(WORSE, x, sigma.astype(x.dtype))


KEYS = [3, 4]
COND = np.eye(2)[[0, 1, 1, 0]]


def draw(sampler, f, params, cond):
  keys = jax.random.split(jax.random.key(0), 4)
  return sampler(f, params, keys, cond, (2,))


SAMPLERS = {
  'one_step': samplers.one_step(),
  'multistep': samplers.multistep(sigmas=(80.0, 2.0, 0.5)),
  'heun': diffusion_samplers.ode(num_steps=8),
  'dpm_solver': diffusion_samplers.dpm_solver(num_steps=8),
}


@pytest.mark.parametrize('interval', [(0.0, 80.0), (0.4, 6.0)])
@pytest.mark.parametrize('name', SAMPLERS)
def test_classifier_free_guidance_is_the_exact_guided_denoiser(name, interval, x64):
  low, high = interval
  cond = jnp.asarray(COND)

  def exact(params, x, sigma, cond, *, key=None):  # written from the mixtures
    own = jnp.where(
      cond[:, :1] == 1,
      oracles.denoiser(CLASSES[0], x, sigma),
      oracles.denoiser(CLASSES[1], x, sigma),
    )
    every = oracles.denoiser(BOTH, x, sigma)
    inside = ((low < sigma) & (sigma <= high))[:, None]
    return jnp.where(inside, every + 1.7 * (own - every), own)

  inner = SAMPLERS[name]
  sampler = guidance.classifier_free(
    sampler=inner, guidance=1.7, sigma_low=low, sigma_high=high
  )
  found, plain = draw(sampler, classes, 1.0, cond), draw(inner, exact, None, cond)
  np.testing.assert_allclose(found.x, plain.x, atol=1e-6)  # float64, x of 80
  assert not np.allclose(found.x, draw(inner, classes, 1.0, cond).x, atol=1e-3) or (
    name == 'one_step' and high < 80
  )
  inside = sum(low < s <= high for s in plain.sigmas)
  assert found.evaluations == plain.evaluations + inside


@pytest.mark.parametrize('name', SAMPLERS)
def test_autoguidance_extrapolates_from_the_worse_version(name, x64):
  def exact(params, x, sigma, cond, *, key=None):
    good, bad = classes(1.0, x, sigma, cond), worse(0.9, x, sigma, cond)
    return bad + 1.5 * (good - bad)

  sampler = guidance.autoguidance(sampler=SAMPLERS[name], guidance=1.5)
  f, params = guidance.WithGuide(classes, worse), guidance.GuidedParams(1.0, 0.9)
  found = draw(sampler, f, params, jnp.asarray(COND))
  plain = draw(SAMPLERS[name], exact, None, jnp.asarray(COND))
  np.testing.assert_allclose(found.x, plain.x, atol=1e-6)
  assert found.evaluations == 2 * plain.evaluations
  # Other samplers see the better model.
  same = draw(SAMPLERS[name], f, params, jnp.asarray(COND))
  alone = draw(SAMPLERS[name], classes, 1.0, jnp.asarray(COND))
  np.testing.assert_array_equal(same.x, alone.x)


@pytest.mark.parametrize('build', [guidance.classifier_free, guidance.autoguidance])
def test_guidance_of_one_is_the_sampler_to_the_bit(build):
  inner, cond = SAMPLERS['multistep'], jnp.asarray(COND, jnp.float32)
  f, params = guidance.WithGuide(classes, worse), guidance.GuidedParams(1.0, 0.9)
  found = draw(build(sampler=inner, guidance=1.0), f, params, cond)
  plain = draw(inner, f, params, cond)
  np.testing.assert_array_equal(found.x, plain.x)
  assert found.sigmas == plain.sigmas


def test_the_weak_model_is_not_evaluated_outside_the_interval():
  calls = []

  def f(params, x, sigma, cond, /, *, key=None):
    jax.debug.callback(lambda s: calls.append(float(s)), sigma[0])
    return x * cond[:, :1]

  sampler = guidance.classifier_free(
    sampler=samplers.multistep(sigmas=(80.0, 5.0, 0.5)),
    guidance=2.0,
    sigma_low=1.0,
    sigma_high=10.0,
  )
  cond = jnp.asarray(COND, jnp.float32)
  out = jax.jit(lambda: draw(sampler, f, None, cond).x)()
  jax.block_until_ready(out)
  jax.effects_barrier()
  assert sorted(calls) == [0.5, 5.0, 5.0, 80.0]


@pytest.mark.parametrize('x64', [False, True])
def test_the_bounds_of_the_interval_are_open_below_and_closed_above(x64):
  calls = []

  def f(params, x, sigma, cond, /, *, key=None):
    calls.append(float(sigma[0]))
    return x * cond[:, :1]

  # In float32, 0.9 and 0.7 are below their values in float64.
  sampler = guidance.classifier_free(
    sampler=samplers.multistep(sigmas=(1.5, 0.9, 0.7)),
    guidance=2.0,
    sigma_low=0.7,
    sigma_high=0.9,
  )
  with jax.enable_x64(x64), jax.disable_jit():  # so that f is called with numbers
    out = draw(sampler, f, None, jnp.asarray(COND, float))
  assert out.sigmas == (1.5, 0.9, 0.9, 0.7)
  np.testing.assert_allclose(calls, out.sigmas, rtol=1e-6)  # float32


@pytest.mark.parametrize('build', [guidance.classifier_free, guidance.autoguidance])
def test_without_an_interval_every_noise_level_is_guided(build):
  f, params = guidance.WithGuide(classes, worse), guidance.GuidedParams(1.0, 0.9)
  inner = samplers.one_step(sigma_max=500.0)
  cond = jnp.asarray(COND, jnp.float32)
  assert draw(build(sampler=inner, guidance=2.0), f, params, cond).evaluations == 2


@pytest.mark.parametrize('build', [guidance.classifier_free, guidance.autoguidance])
@pytest.mark.parametrize(
  ('arguments', 'match'),
  [
    (dict(guidance=np.nan), 'guidance must be'),
    (dict(guidance=2.0, sigma_low=-1.0), 'sigma_low must be'),
    (dict(guidance=2.0, sigma_low=5.0, sigma_high=5.0), 'needs sigma_low < sigma_high'),
    (dict(guidance=2.0, sigma_high=np.inf), 'sigma_high must be'),
  ],
)
def test_weights_and_intervals_out_of_range_are_refused(build, arguments, match):
  with pytest.raises(ValueError, match=match):
    build(sampler=samplers.one_step(), **arguments)


def test_guidance_without_labels_or_a_guide_is_refused():
  one = samplers.one_step()
  with pytest.raises(ValueError, match='needs labels'):
    draw(guidance.classifier_free(sampler=one, guidance=2.0), classes, 1.0, None)
  with pytest.raises(ValueError, match='needs a model with a guide'):
    draw(guidance.autoguidance(sampler=one, guidance=2.0), classes, 1.0, COND)
