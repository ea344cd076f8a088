"""Gradients of continuous-time objectives: closed forms, zeros, limits, builders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import core, distances, fields, oracles, process, solvers, times, weightings
from cmjax.objectives import consistency, continuous

GAUSSIAN = oracles.gaussian(np.array([0.3, -0.2]), 0.4)
MIXTURE = oracles.Mixture(
  np.array([0.6, 0.4]), np.array([[0.7, 0.1], [-0.5, 0.4]]), np.array([0.3, 0.25])
)
FEATURES = np.random.default_rng(9).normal(size=(2, 5))
ROWS = 16


def features(a):
  return jnp.tanh(jnp.matmul(a, jnp.asarray(FEATURES, a.dtype)))


METRICS = {
  'squared_l2': distances.squared_l2(),
  'pseudo_huber': distances.pseudo_huber(c=0.5),
  'features': distances.Distance(
    lambda a, b: core.sum_features((features(a) - features(b)) ** 2), degree=2
  ),
  'l1': distances.l1(),
  'l2': distances.pseudo_huber(),
}


def model(params, x, t, cond, *, key=None):
  """Smooth, far from consistent, and cheap."""
  h = jnp.matmul(x, params['x']) + core.expand(jnp.log(t), x) * params['t'][None]
  return jnp.matmul(jnp.tanh(h), params['out'])


def weights(seed=0):
  draw = np.random.default_rng(seed)
  shapes = {'x': (2, 8), 't': (8,), 'out': (8, 2)}
  return {name: jnp.asarray(draw.normal(size=shape)) for name, shape in shapes.items()}


def draws():
  """Data, noise, and and u of their times."""
  draw = np.random.default_rng(1)
  x0, z = (jnp.asarray(draw.normal(size=(ROWS, 2))) for _ in range(2))
  return 0.5 * x0, z, jnp.asarray(draw.uniform(size=ROWS))


def tau(u):
  return times.karras_time(u, sigma_min=0.01, sigma_max=10.0)


def field_and_point(t):
  """The conditional field of the draws, and x_t at times t."""
  x0, z, _ = draws()
  return fields.conditional(process.VE, x0, z), process.perturb(process.VE, x0, z, t)


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def distance_between(found, exact):
  found, exact = flat(found), flat(exact)
  return np.linalg.norm(found - exact) / np.linalg.norm(exact)


# The cotangent of a small defect ---------------------------------------------------


def two():
  draw = np.random.default_rng(2)
  return (jnp.asarray(draw.normal(size=(4, 2))) for _ in range(2))


@pytest.mark.parametrize(
  ('metric', 'exact'),
  [
    ('squared_l2', lambda d: 2 * d),
    ('pseudo_huber', lambda d: d / 0.5),
    ('l1', np.sign),
    ('l2', lambda d: d / np.linalg.norm(d, axis=1, keepdims=True)),
  ],
)
def test_the_cotangent_has_its_closed_form_for_any_size_of_defect(metric, exact, x64):
  y, defect = two()
  for size in (1e-6, 1.0, 1e3):
    found = distances.limit_cotangent(METRICS[metric], y, size * defect)
    np.testing.assert_allclose(found, exact(size * np.asarray(defect)), rtol=1e-12)
  nothing = distances.limit_cotangent(METRICS[metric], y, jnp.zeros_like(y))
  np.testing.assert_array_equal(nothing, np.zeros((4, 2)))


def test_the_cotangent_of_a_metric_of_features_is_by_its_matrix(x64):
  y, defect = two()

  def measure(a, b):
    return METRICS['features'](a[None], b[None])[0]

  matrix = jax.vmap(jax.hessian(measure))(y, y)
  assert np.min(np.linalg.eigvalsh(matrix)) > 1e-3
  exact = np.einsum('bij,bj->bi', matrix, defect)
  found = distances.limit_cotangent(METRICS['features'], y, defect)
  np.testing.assert_allclose(found, exact, rtol=1e-11)  # float64, sums of 10 terms


@pytest.mark.parametrize('metric', ['squared_l2', 'features', 'l2'])
@pytest.mark.parametrize('own', [True, False], ids=['own', 'target'])
def test_the_pseudo_objective_has_the_gradient_of_the_stopped_cotangent(
  metric, own, x64
):
  params, target = weights(), None if own else weights(seed=7)
  t = tau(draws()[2])
  field, x_t = field_and_point(t)
  distance, w = METRICS[metric], np.asarray(1 / t)

  def loss(params):
    out = continuous.pseudo_loss(
      model,
      core.Nets(params, target),
      field,
      core.Noisy(x_t, t, None, None),
      distance=distance,
      weighting=weightings.inverse_time(),
    )
    return jnp.sum(out.loss), out

  gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
  at = params if own else target
  # Along the straight path, by its own parameter: no field, and no jvp in x and t.
  x0, z, _ = draws()
  dy = jax.vmap(
    jax.jacfwd(lambda t, x0, z: model(at, (x0 + t * z)[None], t[None], None)[0])
  )(t, x0, z)
  pull = distances.limit_cotangent(distance, model(params, x_t, t, None), dy)

  def written_out(params):
    return jnp.sum(model(params, x_t, t, None) * pull * w[:, None])

  assert distance_between(gradient, jax.grad(written_out)(params)) < 1e-12  # float64
  value = w * np.sum(np.asarray(dy * pull), axis=1)
  np.testing.assert_allclose(out.loss, value, rtol=1e-11)
  assert np.min(value) > 0  # there is a defect, and the metric sees it
  length = np.linalg.norm(np.asarray(dy), axis=1)
  np.testing.assert_allclose(out.aux['tangent'], length, rtol=1e-12)


# Where it vanishes -----------------------------------------------------------------


@pytest.mark.parametrize('metric', ['features', 'l1', 'l2'])
@pytest.mark.parametrize('kernel', [continuous.true_loss, continuous.pseudo_loss])
def test_a_model_without_a_defect_has_exactly_no_loss_and_no_gradient(kernel, metric):
  def still(params, x, t, cond, *, key=None):
    return params * jnp.ones_like(x)

  t = tau(draws()[2])
  x_t, x0 = (jnp.ones((ROWS, 2)) * v for v in (0.7, 0.3))
  field = fields.conditional(process.VE, x0, x_t)
  metric = dict(distance=METRICS[metric], weighting=weightings.uniform())

  def loss(params):
    noisy = core.Noisy(x_t, t.astype(jnp.float32), None, None)
    return jnp.sum(kernel(still, core.Nets(params), field, noisy, **metric).loss)

  assert jax.value_and_grad(loss)(0.7) == (0.0, 0.0)


@pytest.mark.parametrize('kernel', [continuous.true_loss, continuous.pseudo_loss])
@pytest.mark.parametrize(
  ('oracle', 'bound'), [(GAUSSIAN, 1e-12), (MIXTURE, 1e-9)], ids=['gaussian', 'mixture']
)
def test_the_exact_map_has_no_gradient_and_another_has(kernel, oracle, bound, x64):
  def f(shift, x, t, cond, *, key=None):
    return oracles.consistency(oracle, x, t) + shift * core.expand(jnp.log(t), x)

  t = tau(draws()[2])
  _, x_t = field_and_point(t)
  metric = dict(distance=distances.squared_l2(), weighting=weightings.uniform())

  @jax.jit
  @jax.grad
  def gradient(shift):
    at = oracles.field(oracle), core.Noisy(x_t, t, None, None)
    return jnp.sum(kernel(f, core.Nets(shift), *at, **metric).loss)

  # A sum over 32 defects times what the parameter does to them: 1 / t, up to 100.
  assert abs(gradient(0.0)) < 1e4 * bound
  assert abs(gradient(0.1)) > 1


# Weightings in the limit -----------------------------------------------------------

SIZES = np.array([64.0, 1024.0, 16384.0])


@pytest.mark.parametrize(
  ('metric', 'weighting', 'scale', 'limit'),
  [
    # lambda, and what Theorems 5 and 6 make of it: lambda tau'.
    ('features', weightings.edm(), 1, lambda t, s: s / t**2 + s / 0.25),
    ('squared_l2', weightings.inverse_time(), 1, lambda t, s: s / t),
    # For a norm lambda stays, and 1 / (t - r) grows as (N - 1) / tau'.
    ('l2', weightings.edm(), 0, lambda t, s: 1 / t**2 + 1 / 0.25),
    ('l2', weightings.inverse_gap(), -1, lambda t, s: 1 / s),
  ],
  ids=['features-edm', 'squared_l2-inverse_time', 'l2-edm', 'l2-inverse_gap'],
)
def test_a_weighted_pair_has_the_weighted_limit(metric, weighting, scale, limit, x64):
  u = draws()[2]
  metric = METRICS[metric]

  @jax.jit
  @jax.grad
  def gradient(params, n):
    t, r = tau(u + 1 / (n - 1)), tau(u)
    field, x_t = field_and_point(t)
    x_r = solvers.euler(field, x_t, t, r)
    at = core.Nets(params), core.Noisy(x_t, t, None, None), x_r, r
    choices = dict(distance=metric, weighting=weighting)
    return (n - 1) ** scale * jnp.sum(consistency.pair_loss(model, *at, **choices).loss)

  @jax.jit
  @jax.grad
  def exact(params):
    t, speed = jax.jvp(tau, (u,), (jnp.ones_like(u),))
    field, x_t = field_and_point(t)
    at = core.Nets(params), field, core.Noisy(x_t, t, None, None)
    choices = dict(distance=metric, weighting=lambda t, r: limit(t, speed))
    return jnp.sum(continuous.pseudo_loss(model, *at, **choices).loss)

  goal = exact(weights())
  found = np.array([distance_between(gradient(weights(), n), goal) for n in SIZES])
  print(' '.join(f'N={n:.0f}: {d:.1e}' for n, d in zip(SIZES, found)))
  # Errors of first order fall 16-fold; at N = 64 the next order may still show.
  assert 9 < found[0] / found[1] < 26
  assert 15 < found[1] / found[2] < 17
  # 1 / t^2 is taken at the upper point: near t = 0.01 it falls there by 1.4e-3.
  assert found[2] <= 2e-3


# The builders ----------------------------------------------------------------------

LOGNORMAL = times.lognormal(mean=-1.1, std=2.0)
# The builder, its kernel, and a metric that it takes.
BUILDERS = {
  'theorem3': (continuous.theorem3, continuous.true_loss, 'features'),
  'theorem4': (continuous.theorem4, continuous.true_loss, 'l1'),
  'cd': (continuous.cd, continuous.pseudo_loss, 'features'),
  'ct': (continuous.ct, continuous.pseudo_loss, 'l2'),
}


def labelled(params, x, t, cond, *, key=None):
  """A denoiser whose label shows."""
  return model(params, x, t, cond) + cond


def build(name, **choices):
  builder, _, metric = BUILDERS[name]
  choices = {'weighting': weightings.uniform(), 'distance': METRICS[metric]} | choices
  models = (model,) if name == 'ct' else (model, labelled)
  return builder(*models, times=LOGNORMAL, **choices)


@pytest.mark.parametrize(
  ('name', 'guidance'),
  [('theorem3', 1.0), ('theorem4', 2.5), ('cd', 1.0), ('cd', 2.5), ('ct', None)],
)
def test_a_builder_calls_its_kernel_with_its_draws_and_field(name, guidance, x64):
  _, kernel, metric = BUILDERS[name]
  choices = dict(distance=METRICS[metric], weighting=weightings.edm())
  x0 = draws()[0]
  batch = core.Batch(x0, jnp.eye(2)[jnp.arange(ROWS) % 2])
  nets = core.Nets(weights(), teacher=weights(seed=7))

  def keys():
    return core.streams(jax.random.key(3), 0)

  extra = {} if name == 'ct' else dict(guidance=guidance)
  loss = build(name, **choices, **extra)
  found = jax.jit(loss)(nets, batch, jnp.int32(0), keys())
  t = LOGNORMAL(keys()['time'], ROWS)
  z = jax.random.normal(keys()['noise'], x0.shape)
  x_t = x0 + t[:, None] * z

  def slope(x, t):
    if name == 'ct':
      return z
    free = model(nets.teacher, x, t, None)
    return (x - free - guidance * batch.cond) / t[:, None]

  exact = kernel(model, nets, slope, core.Noisy(x_t, t, None, None), **choices)
  np.testing.assert_allclose(found.loss, exact.loss, rtol=1e-10)  # float64
  np.testing.assert_allclose(found.aux['sigma'], t, rtol=1e-14)
  np.testing.assert_allclose(found.aux['tangent'], exact.aux['tangent'], rtol=1e-10)


@pytest.mark.parametrize('name', BUILDERS)
def test_a_weighting_that_vanishes_without_a_gap_is_refused(name):
  build(name)
  with pytest.raises(ValueError, match=r'vanishes .*where r = t'):
    build(name, weighting=weightings.inverse_gap())


@pytest.mark.parametrize('name', ['theorem3', 'theorem4', 'cd'])
def test_guidance_of_a_teacher_without_labels_is_refused(name):
  loss = build(name, guidance=2.0)
  batch = core.Batch(jnp.zeros((4, 2)), None)
  with pytest.raises(ValueError, match=r'guidance=2\.0 needs labels'):
    loss(core.Nets(weights()), batch, 0, core.streams(jax.random.key(0), 0))
