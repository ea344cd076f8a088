"""Theorems 3 to 6 as limits of the discrete kernel, and the exact defect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import (
  core,
  distances,
  fields,
  oracles,
  precond,
  process,
  schedules,
  solvers,
  times,
  weightings,
)
from cmjax.networks import mlp, songunet
from cmjax.objectives import consistency, continuous

GAUSSIAN = oracles.gaussian(np.array([0.3, -0.2]), 0.4)
MIXTURE = oracles.Mixture(
  np.array([0.5, 0.3, 0.2]),
  np.array([[0.7, 0.1], [-0.5, 0.4], [0.0, -0.6]]),
  np.array([0.3, 0.25, 0.4]),
)
SIZES = (64, 1024, 16384)
FEATURES = np.random.default_rng(9).normal(size=(2, 5))


def feature_distance():
  """A smooth metric with a curvature that depends on where it is taken, like LPIPS."""

  def features(a):
    return jnp.tanh(jnp.matmul(a, jnp.asarray(FEATURES, a.dtype)))

  return distances.Distance(
    lambda a, b: core.sum_features((features(a) - features(b)) ** 2), degree=2
  )


METRICS = {
  'squared_l2': distances.squared_l2(),
  'pseudo_huber': distances.pseudo_huber(c=0.5),
  'features': feature_distance(),
  'l1': distances.l1(),
  'l2': distances.pseudo_huber(),
}


@pytest.fixture
def model(x64):
  """A smooth network that is far from consistent, and weights for it."""
  network = mlp.mlp(
    width=16, num_blocks=1, embedding=8, noise_scale=2.0, dtype='float64'
  )
  example = jnp.zeros((1, 2)), jnp.zeros(1), None
  shapes = jax.eval_shape(network.init, jax.random.key(0), *example)
  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda a: jnp.asarray(0.4 * draw.normal(size=a.shape)), shapes)
  return precond.consistency(network), params


def tau(u):
  return times.karras_time(u, sigma_min=0.01, sigma_max=10.0)


def draws(n=32):
  """Data, noise, and u of the cleaner point of each pair."""
  draw = np.random.default_rng(1)
  x0 = oracles.sample(MIXTURE, jax.random.key(1), n).astype(float)
  return x0, jnp.asarray(draw.normal(size=x0.shape)), jnp.asarray(draw.uniform(size=n))


def field_of(name, x0, z):
  if name == 'conditional':
    return fields.conditional(process.VE, x0, z)
  return oracles.field(MIXTURE)


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def distances_to(limit, found):
  """Relative distances of several estimates to their limit."""
  a, b = np.array([flat(f) for f in found]), flat(limit)
  return np.linalg.norm(a - b, axis=1) / np.linalg.norm(b)


def assert_first_order(found):
  print(' '.join(f'N={n}: {d:.1e}' for n, d in zip(SIZES, found)))
  # Errors of first order fall 16-fold; at N = 64 the next order may still show.
  assert 10 < found[0] / found[1] < 24
  assert 15 < found[1] / found[2] < 17
  assert found[2] <= 1e-3


def pairs_at(field_name, n):
  """Pairs of neighbours of an n-point grid: x_t, x_r, t and r."""
  x0, z, u = draws()
  upper, lower = tau(u + 1 / (n - 1)), tau(u)
  field = field_of(field_name, x0, z)
  x_t = process.perturb(process.VE, x0, z, upper)
  x_r = solvers.euler(field, x_t, upper, lower)
  return x_t, x_r, upper, lower


def limit_at(model, kernel, field_name, metric, power):
  """The kernel's value and gradient at the lower points, weighed by tau'^power."""
  f, params = model
  x0, z, u = draws()
  t, speed = jax.jvp(tau, (u,), (jnp.ones_like(u),))
  x_t = process.perturb(process.VE, x0, z, t)

  def value(params):
    out = kernel(
      f,
      core.Nets(params),
      field_of(field_name, x0, z),
      core.Noisy(x_t, t, None, None),
      distance=METRICS[metric],
      weighting=lambda t, r: speed**power,
    )
    return jnp.sum(out.loss)

  return jax.jit(jax.value_and_grad(value))(params)


def live_pairs(model, metric, field_name):
  """The discrete loss with both networks live, L(theta, theta), for each N."""
  f, params = model

  def value(params, n):
    x_t, x_r, t, r = pairs_at(field_name, n)
    pair = (f(params, x, s, None) for x, s in ((x_t, t), (x_r, r)))
    return jnp.sum(METRICS[metric](*pair))

  both = jax.jit(jax.value_and_grad(value))
  return [both(params, float(n)) for n in SIZES]


@pytest.mark.parametrize(
  ('metric', 'degree'),
  [('squared_l2', 2), ('pseudo_huber', 2), ('features', 2), ('l1', 1), ('l2', 1)],
)
def test_theorems_3_and_4_value_and_gradient(metric, degree, model):
  value, gradient = limit_at(model, continuous.true_loss, 'teacher', metric, degree)
  found = live_pairs(model, metric, 'teacher')
  for limit, values in zip((value, gradient), zip(*found)):
    scaled = [(n - 1.0) ** degree * flat(v) for n, v in zip(SIZES, values)]
    assert_first_order(distances_to(limit, scaled))


def discrete_gradients(model, metric, field_name):
  f, params = model

  def value(params, n):
    x_t, x_r, t, r = pairs_at(field_name, n)
    out = consistency.pair_loss(
      f,
      core.Nets(params),
      core.Noisy(x_t, t, None, None),
      x_r,
      r,
      distance=METRICS[metric],
      weighting=weightings.uniform(),
    )
    return jnp.sum(out.loss)

  gradient = jax.jit(jax.grad(value))
  return [gradient(params, float(n)) for n in SIZES]


@pytest.mark.parametrize('field_name', ['teacher', 'conditional'])
@pytest.mark.parametrize('metric', ['squared_l2', 'features'])
def test_theorems_5_and_6_gradient(metric, field_name, model):
  _, limit = limit_at(model, continuous.pseudo_loss, field_name, metric, power=1)
  found = discrete_gradients(model, metric, field_name)
  scaled = [(n - 1) * flat(gradient) for n, gradient in zip(SIZES, found)]
  assert_first_order(distances_to(limit, scaled))


@pytest.mark.parametrize('metric', ['l2', 'l1'])
def test_the_limit_of_a_norm_is_its_gradient_at_the_tangent(metric, model):
  """For l2: ECT's metric becomes sCM's tangent normalisation."""
  _, limit = limit_at(model, continuous.pseudo_loss, 'conditional', metric, power=0)
  found = discrete_gradients(model, metric, 'conditional')
  if metric == 'l2':
    assert_first_order(distances_to(limit, found))
  else:  # a sign may flip in a small row; what is left falls with their number
    assert distances_to(limit, found)[-1] < 1e-3


# The exact map ---------------------------------------------------------------------


@pytest.mark.parametrize(
  ('oracle', 'bound'), [(GAUSSIAN, 1e-12), (MIXTURE, 1e-9)], ids=['gaussian', 'mixture']
)
def test_the_exact_map_has_no_defect_and_another_has(oracle, bound, x64):
  def f(shift, x, t, cond, *, key=None):
    exact = oracles.consistency(oracle, x, t)
    return exact + shift * core.expand(jnp.log(t), x)

  x0, z, u = draws(8)
  t = tau(u)
  x_t = process.perturb(process.VE, x0, z, t)

  @jax.jit
  def defect(shift):
    noisy = core.Noisy(x_t, t, None, None)
    return continuous.tangent(f, shift, oracles.field(oracle), noisy)[1]

  assert np.max(np.abs(defect(0.0))) <= bound
  assert np.min(np.abs(defect(0.1))) > 1e-3

  @jax.jit
  def losses(shift):
    noisy = core.Noisy(x_t, t, None, None)
    arguments = f, core.Nets(shift), oracles.field(oracle), noisy
    kernels = continuous.true_loss, continuous.pseudo_loss
    metric = dict(distance=distances.squared_l2(), weighting=weightings.uniform())
    return [kernel(*arguments, **metric).loss for kernel in kernels]

  assert np.max(losses(0.0)) <= bound**2
  assert np.min(losses(0.1)) > 1e-6


def posterior_draws(oracle, x, t, n):
  """(x0, z) of the mixture given x_t = x at one noise level, from Bayes' rule."""
  rng = np.random.default_rng(3)
  variance = oracle.stds**2 + t**2
  logits = np.log(oracle.weights) - np.sum((x - oracle.means) ** 2, 1) / 2 / variance
  logits -= len(x) / 2 * np.log(variance)
  shares = np.exp(logits - logits.max())
  which = rng.choice(len(shares), n, p=shares / shares.sum())
  shrink = (oracle.stds**2 / variance)[which][:, None]
  mean = oracle.means[which] + shrink * (x - oracle.means[which])
  x0 = mean + np.sqrt(shrink) * t * rng.normal(size=mean.shape)
  return jnp.asarray(x0), jnp.asarray((x - x0) / t)


@pytest.mark.parametrize('t', [0.2, 1.0, 5.0])
def test_the_mean_of_training_tangents_is_the_distillation_tangent(t, model):
  f, params = model
  n, x = 20_000, np.array([0.4, -0.3])
  x0, z = posterior_draws(MIXTURE, x, t, n)
  noisy = core.Noisy(jnp.tile(jnp.asarray(x), (n, 1)), jnp.full(n, t), None, None)

  def tangent(field, noisy):
    return continuous.tangent(f, params, field, noisy)[1]

  drawn = np.asarray(
    jax.jit(lambda x0, z: tangent(fields.conditional(process.VE, x0, z), noisy))(x0, z)
  )
  one = core.Noisy(noisy.x[:1], noisy.t[:1], None, None)
  exact = tangent(oracles.field(MIXTURE), one)[0]
  error = (drawn.mean(0) - exact) / (drawn.std(0) / n**0.5)
  assert np.max(np.abs(error)) < 3  # standard errors, of two coordinates


@pytest.mark.parametrize('t', [0.05, 0.4, 3.0])
def test_the_variance_of_training_tangents_of_a_gaussian_is_closed_form(t, x64):
  n, x = 40_000, np.array([0.5, 0.1])
  x0, z = posterior_draws(GAUSSIAN, x, t, n)
  _, drawn = continuous.tangent(
    lambda params, x, t, cond, *, key=None: oracles.consistency(GAUSSIAN, x, t),
    None,
    fields.conditional(process.VE, x0, z),
    core.Noisy(jnp.tile(jnp.asarray(x), (n, 1)), jnp.full(n, t), None, None),
  )
  s, end = 0.4, 0.002
  exact = s**2 * (s**2 + end**2) / (s**2 + t**2) ** 2
  # A variance of 80,000 numbers has a standard error of half a per cent.
  np.testing.assert_allclose(np.var(drawn), exact, rtol=0.02)


# The pseudo-objective --------------------------------------------------------------


def test_the_gradient_stops_at_the_tangent_and_the_value_measures_it(model):
  f, params = model
  x0, z, u = draws(8)
  t = tau(u)
  x_t, field = process.perturb(process.VE, x0, z, t), field_of('conditional', x0, z)
  noisy = core.Noisy(x_t, t, None, None)
  metric = dict(distance=distances.squared_l2(), weighting=weightings.inverse_time())

  def loss(params):
    out = continuous.pseudo_loss(f, core.Nets(params), field, noisy, **metric)
    return jnp.sum(out.loss), out

  (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(params)
  _, dy = continuous.tangent(f, params, field, noisy)
  length = np.sum(np.asarray(dy) ** 2, axis=1)
  np.testing.assert_allclose(out.loss, 2 * length / np.asarray(t), rtol=1e-12)
  np.testing.assert_allclose(out.aux['tangent'], np.sqrt(length), rtol=1e-12)

  def written_out(params):
    return jnp.sum(f(params, x_t, t, None) * 2 * dy / t[:, None])

  np.testing.assert_allclose(
    flat(gradient), flat(jax.grad(written_out)(params)), rtol=1e-9
  )


def test_a_target_network_gives_the_tangent(model):
  f, params = model
  other = jax.tree.map(lambda a: 0.9 * a, params)
  x0, z, u = draws(8)
  t = tau(u)
  x_t, field = process.perturb(process.VE, x0, z, t), field_of('conditional', x0, z)
  noisy = core.Noisy(x_t, t, None, None)
  metric = dict(distance=distances.squared_l2(), weighting=weightings.uniform())
  out = continuous.pseudo_loss(f, core.Nets(params, other), field, noisy, **metric)
  _, dy = continuous.tangent(f, other, field, noisy)
  np.testing.assert_allclose(out.aux['tangent'], jnp.linalg.norm(dy, axis=1))


# What is refused -------------------------------------------------------------------

LOGNORMAL = times.lognormal(mean=-1.1, std=2.0)


def plain(params, x, t, cond, *, key=None):
  return x


@pytest.mark.parametrize('metric', ['l1', 'l2'])
def test_theorem_3_refuses_a_metric_without_second_derivatives(metric):
  with pytest.raises(ValueError, match='second derivatives'):
    continuous.theorem3(
      plain,
      plain,
      times=LOGNORMAL,
      distance=METRICS[metric],
      weighting=weightings.uniform(),
    )


@pytest.mark.parametrize('metric', ['squared_l2', 'pseudo_huber'])
def test_theorem_4_refuses_distances_that_are_not_norms(metric):
  with pytest.raises(ValueError, match='needs a norm'):
    continuous.theorem4(
      plain,
      plain,
      times=LOGNORMAL,
      distance=METRICS[metric],
      weighting=weightings.uniform(),
    )


def test_a_weighting_that_vanishes_in_the_limit_is_refused():
  with pytest.raises(ValueError, match=r'vanishes .*where r = t'):
    continuous.ct(
      plain,
      times=LOGNORMAL,
      distance=distances.squared_l2(),
      weighting=weightings.inverse_gap(),
    )


def test_guidance_without_labels_is_refused():
  loss = continuous.cd(
    plain,
    plain,
    times=LOGNORMAL,
    distance=distances.squared_l2(),
    weighting=weightings.uniform(),
    guidance=2.0,
  )
  batch = core.Batch(jnp.zeros((4, 2)), None)
  with pytest.raises(ValueError, match=r'guidance=2\.0 needs labels'):
    loss(core.Nets(None), batch, 0, core.streams(jax.random.key(0), 0))


# Cost ------------------------------------------------------------------------------


def test_a_continuous_step_costs_what_a_discrete_one_does():
  network = songunet.songunet(
    channels=16,
    channel_mult=(1, 2),
    num_blocks=1,
    attention_resolutions=(8,),
    dropout=0.1,
  )
  f = precond.consistency(network)
  num_scales = schedules.constant(value=18.0)
  metric = dict(distance=distances.squared_l2(), weighting=weightings.uniform())
  losses = {
    'discrete': consistency.ct(
      f, pairs=times.karras_pairs(num_scales=num_scales), **metric
    ),
    'continuous': continuous.ct(f, times=times.karras_uniform(), **metric),
  }
  image, level = jnp.zeros((1, 16, 16, 3)), jnp.zeros(1)
  params = jax.eval_shape(network.init, jax.random.key(0), image, level, None)
  batch = core.Batch(jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32), None)
  keys = jax.eval_shape(lambda: core.streams(jax.random.key(0), 0))

  def flops(loss):
    def mean(params, batch, keys):
      return jnp.mean(loss(core.Nets(params), batch, jnp.int32(0), keys).loss)

    lowered = jax.jit(jax.grad(mean)).lower(params, batch, keys)
    return lowered.compile().cost_analysis()['flops']

  ratio = flops(losses['continuous']) / flops(losses['discrete'])
  print(f'{ratio:.4f}')
  assert 0.9 < ratio <= 1.05
