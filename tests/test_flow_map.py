"""Two-time objectives against Theorem 6, flow matching and exact flow maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import core, distances, fields, oracles, precond, process, times, weightings
from cmjax.objectives import continuous, flow_map

LINEAR = process.LINEAR
MEAN, STD = np.array([0.3, -0.2, 0.1]), 0.4
GAUSSIAN = oracles.gaussian(MEAN, STD)
MIXTURE = oracles.Mixture(
  np.array([0.6, 0.4]), np.array([[0.7, 0.1, 0.0], [-0.5, 0.4, 0.3]]), np.full(2, 0.3)
)
ROWS = 8


def perceptron(params, x, c_noise, cond, *, key=None):
  """A smooth u of two times and an optional label, fitted to nothing."""
  h = jnp.matmul(x, params['x']) + jnp.matmul(c_noise, params['c_noise'])
  if cond is not None:
    h += jnp.matmul(cond, params['label'])
  return jnp.matmul(jnp.tanh(h), params['out'])


MODEL = precond.two_time(core.Network(None, perceptron, num_times=2))


def weights(seed=0):
  draw = np.random.default_rng(seed)
  shapes = {'x': (3, 8), 'c_noise': (2, 8), 'label': (2, 8), 'out': (8, 3)}
  return {name: jnp.asarray(draw.normal(size=shape)) for name, shape in shapes.items()}


def draws():
  draw = np.random.default_rng(1)
  x0, z = (jnp.asarray(draw.normal(size=(ROWS, 3))) for _ in range(2))
  return 0.5 * x0, z, jnp.linspace(0.1, 0.95, ROWS)


def on_path(kernel, r, f=MODEL, target=None, field=None, **choices):
  """The kernel's loss as a function of the parameters, on the examples' own paths."""
  x0, z, t = draws()
  path = fields.conditional(LINEAR, x0, z)
  x_t = process.perturb(LINEAR, x0, z, t)

  def loss(params):
    nets = core.Nets(params, target)
    noisy = core.Noisy(x_t, t, None, None)
    return kernel(f, nets, field or path, noisy, r, **choices)

  return loss


def total_and_gradient(loss, params=None):
  value = jax.jit(jax.value_and_grad(lambda p: jnp.sum(loss(p))))
  return value(weights() if params is None else params)


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def distance_between(found, exact):
  found, exact = flat(found), flat(exact)
  distance = np.linalg.norm(found - exact) / np.linalg.norm(exact)
  print(f'{distance:.1e}')
  return distance


# MeanFlow and what it is at its ends ------------------------------------------------


@pytest.mark.parametrize('fraction', [0.0, 0.6])
@pytest.mark.parametrize('field', ['conditional', 'teacher'])
def test_the_gradient_is_theorem_6s_weighed_by_the_inverse_gap(fraction, field, x64):
  """At r = 0 that is the inverse time."""
  x0, z, t = draws()
  r, x_t = fraction * t, process.perturb(LINEAR, x0, z, t)
  flow = fields.conditional(LINEAR, x0, z)
  if field == 'teacher':
    flow = fields.probability_flow(LINEAR, lambda x, t: oracles.denoiser(MIXTURE, x, t))
  weighting = lambda t, _: 1 / (t - r)  # noqa: E731
  if fraction == 0:
    weighting = weightings.inverse_time()

  def jump(params, x, t, cond, *, key=None):
    return x - core.expand(t - r, x) * MODEL.average_velocity(params, x, t, r, cond)

  def theorem(params):
    out = continuous.pseudo_loss(
      jump,
      core.Nets(params),
      flow,
      core.Noisy(x_t, t, None, None),
      distance=distances.squared_l2(),
      weighting=weighting,
    )
    return out.loss

  loss = on_path(flow_map.meanflow_loss, r, field=flow, power=0.0)
  _, found = total_and_gradient(lambda p: loss(p).loss)
  _, exact = total_and_gradient(theorem)
  assert distance_between(found, exact) < 1e-12  # float64, two orders of operations


@pytest.mark.parametrize('kernel', [flow_map.meanflow_loss, flow_map.shortcut_loss])
def test_where_the_times_are_equal_it_is_flow_matching(kernel, x64):
  x0, z, t = draws()
  choices = dict(power=0.0) if kernel is flow_map.meanflow_loss else {}
  loss = on_path(kernel, t, target=weights(seed=7), **choices)

  def matching(params):
    c_noise = jnp.stack([t, jnp.zeros(ROWS)], axis=1)
    u = perceptron(params, process.perturb(LINEAR, x0, z, t), c_noise, None)
    return core.sum_features((u - (z - x0)) ** 2)

  for found, exact in zip(
    total_and_gradient(lambda p: loss(p).loss), total_and_gradient(matching)
  ):
    assert distance_between(found, exact) < 1e-12  # float64


@pytest.mark.parametrize('fraction', [0.0, 0.3, 1.0])
def test_the_error_is_how_fast_the_jump_changes_along_the_path(fraction, x64):
  x0, z, t = draws()
  r = fraction * t
  params = weights()

  def jump(x0, z, t, r):
    x = (1 - t) * x0 + t * z
    u = perceptron(params, x[None], jnp.stack([t, t - r])[None], None)[0]
    return x - (t - r) * u

  speed = jax.jit(jax.vmap(jax.jacfwd(jump, argnums=2)))(x0, z, t, r)
  out = jax.jit(on_path(flow_map.meanflow_loss, r, power=0.0))(params)
  exact = np.sum(np.asarray(speed) ** 2, axis=1)
  np.testing.assert_allclose(out.aux['squared'], exact, rtol=1e-12)  # float64
  np.testing.assert_allclose(out.loss, exact, rtol=1e-12)
  np.testing.assert_allclose(out.aux['sigma'], t / (1 - t), rtol=1e-14)
  np.testing.assert_allclose(out.aux['gap'], t - r, rtol=1e-14)


@pytest.mark.parametrize(('power', 'c'), [(0.5, 0.01), (1.0, 0.3)])
def test_the_power_divides_by_the_error_without_differentiating_it(power, c, x64):
  r = 0.4 * draws()[2]
  plain = on_path(flow_map.meanflow_loss, r, power=0.0)
  found = on_path(flow_map.meanflow_loss, r, power=power, c=c)
  squared = plain(weights()).loss
  fraction = (squared + c) ** -power
  np.testing.assert_allclose(found(weights()).loss, squared * fraction, rtol=1e-12)
  _, exact = total_and_gradient(lambda p: plain(p).loss * fraction)
  _, gradient = total_and_gradient(lambda p: found(p).loss)
  assert distance_between(gradient, exact) < 1e-12  # float64


# Exact flow maps -------------------------------------------------------------------


def gaussian_velocity(shift, x, c_noise, cond, *, key=None):
  """(x - X(x, t, r)) / (t - r) of the Gaussian's exact map X, without its 0 / 0.

  X = (1 - r) m + S(r) / S(t) (x - (1 - t) m) with S(t)^2 = (1 - t)^2 s^2 + t^2.
  """
  t, gap = c_noise[:, :1], c_noise[:, 1:]
  r = t - gap
  at_t, at_r = (jnp.sqrt((1 - s) ** 2 * STD**2 + s**2) for s in (t, r))
  slope = (t + r - STD**2 * (2 - t - r)) / (at_t * (at_t + at_r))
  mean = jnp.asarray(MEAN, x.dtype)[None]
  return (x - (1 - t) * mean) * slope - mean + shift * gap


def test_the_velocity_written_out_is_that_of_the_exact_map(x64):
  x, _, t = draws()
  r = 0.3 * t
  end, level = process.change_process(LINEAR, process.VE, x, t)
  moved = oracles.consistency(GAUSSIAN, end, level, r / (1 - r))
  exact = (x - (1 - r)[:, None] * moved) / (t - r)[:, None]
  found = gaussian_velocity(0.0, x, jnp.stack([t, t - r], axis=1), None)
  np.testing.assert_allclose(found, exact, rtol=1e-11)  # float64, and t - r > 0.07


def mixture_velocity(shift, x, c_noise, cond, *, key=None):
  t, gap = c_noise[:, 0], c_noise[:, 1]
  r = t - gap
  on_ve, level = process.change_process(LINEAR, process.VE, x, t)
  moved = oracles.consistency(MIXTURE, on_ve, level, r / (1 - r), num_steps=1024)
  u = (x - core.expand(1 - r, x) * moved) / core.expand(gap, x)
  return u + shift * core.expand(gap, x)


@pytest.mark.parametrize('kernel', [flow_map.meanflow_loss, flow_map.shortcut_loss])
@pytest.mark.parametrize(
  ('velocity', 'oracle', 'bound'),
  [(gaussian_velocity, GAUSSIAN, 1e-13), (mixture_velocity, MIXTURE, 1e-9)],
  ids=['gaussian', 'mixture'],
)
def test_the_exact_average_velocity_has_no_error(kernel, velocity, oracle, bound, x64):
  t, r = (v.ravel() for v in jnp.meshgrid(jnp.linspace(0.2, 0.9, 6), jnp.arange(6.0)))
  # From 0 to t, ends included, where that is no 0 / 0; else short of both ends.
  r = t * (r / 5 if velocity is gaussian_velocity else 0.1 + 0.12 * r)
  f = precond.two_time(core.Network(None, velocity, num_times=2))
  field = fields.probability_flow(LINEAR, lambda x, t: oracles.denoiser(oracle, x, t))
  x_t = jnp.asarray(np.random.default_rng(2).normal(size=(36, 3)))
  choices = dict(power=0.0) if kernel is flow_map.meanflow_loss else {}

  @jax.jit
  @jax.value_and_grad
  def total(shift):
    noisy = core.Noisy(x_t, t, None, None)
    out = kernel(f, core.Nets(shift), field, noisy, r, **choices)
    return jnp.sum(out.loss)

  value, gradient = total(0.0)
  print(f'{value**0.5:.1e}')
  # Rounding in closed form; for a mixture the integrator's error over t - r >= 0.06.
  assert value < bound**2
  assert abs(gradient) < 100 * bound  # a sum over 108 numbers, each with its error
  value, gradient = total(0.3)
  assert value > 1e-3
  assert gradient > 1e-3


# Labels and the model's own velocity -----------------------------------------------


def pairs(key, n, step):
  """Times for every row, a quarter of them equal."""
  t = jnp.linspace(0.1, 0.95, n)
  return t, jnp.where(jnp.arange(n) < n // 4, t, 0.4 * t)


def labelled():
  return core.Batch(draws()[0], jnp.eye(2)[jnp.arange(ROWS) % 2])


def keys():
  return core.streams(jax.random.key(5), 3)


@pytest.mark.parametrize('guidance', [1.0, 2.5])
@pytest.mark.parametrize('marginal_tangent', [False, True])
@pytest.mark.parametrize('target', [None, 7], ids=['own', 'target'])
def test_meanflow_is_its_formula_written_out(guidance, marginal_tangent, target, x64):
  params, batch = weights(), labelled()
  fixed = params if target is None else weights(target)
  loss = flow_map.meanflow(
    MODEL,
    pairs=pairs,
    power=0.75,
    c=0.02,
    guidance=guidance,
    label_dropout=0.5,
    marginal_tangent=marginal_tangent,
  )

  def found(params):
    nets = core.Nets(params, None if target is None else fixed)
    out = loss(nets, batch, jnp.int32(3), keys())
    return jnp.sum(out.loss), out.loss

  x0, (t, r) = batch.x0, pairs(None, ROWS, 3)
  z = jax.random.normal(keys()['noise'], x0.shape)
  cond = core.drop_labels(batch.cond, keys()['label'], 0.5)
  kept = np.asarray(jnp.sum(cond, axis=1)) > 0
  assert 0 < np.sum(kept) < ROWS
  x_t = (1 - t)[:, None] * x0 + t[:, None] * z

  def u(params, x, t, r, cond):
    return perceptron(params, x, jnp.stack([t, t - r], axis=1), cond)

  v = z - x0
  free = u(fixed, x_t, t, t, jnp.zeros_like(cond))
  v = jnp.where(kept[:, None], guidance * v + (1 - guidance) * free, v)
  along = u(fixed, x_t, t, t, cond) if marginal_tangent else v

  @jax.jit
  def moved(along):
    # By central differences, with errors of the order of the step squared.
    ahead, behind = (u(params, x_t + h * along, t + h, r, cond) for h in (3e-6, -3e-6))
    return (ahead - behind) / 6e-6

  error = u(params, x_t, t, r, cond) - v + (t - r)[:, None] * moved(along)
  squared = np.sum(np.asarray(error) ** 2, axis=1)
  fraction = (squared + 0.02) ** -0.75
  gradient, value = jax.jit(jax.grad(found, has_aux=True))(params)
  # Differences: 1e-11 by the step squared, a hundredfold where |along| is 5; rounding.
  np.testing.assert_allclose(value, squared * fraction, rtol=1e-8)

  @jax.grad
  def written_out(
    params,
  ):  # only u moves: not the target, the guidance in it, the fraction
    pull = 2 * error * fraction[:, None]
    return jnp.sum(u(params, x_t, t, r, cond) * pull)

  assert distance_between(gradient, written_out(params)) < 1e-8


def test_rows_without_a_label_are_not_guided(x64):
  def run(**choices):
    choices |= dict(label_dropout=0.5, power=0.0)
    loss = flow_map.meanflow(MODEL, pairs=pairs, **choices)
    return np.asarray(
      jax.jit(loss)(core.Nets(weights()), labelled(), jnp.int32(3), keys()).loss
    )

  kept = np.any(
    np.asarray(core.drop_labels(labelled().cond, keys()['label'], 0.5)) != 0, axis=1
  )
  plain, guided = run(), run(guidance=3.0)
  np.testing.assert_allclose(guided[~kept], plain[~kept], rtol=1e-12)  # float64
  assert np.min(np.abs(guided[kept] / plain[kept] - 1)) > 1e-3


# Shortcuts -------------------------------------------------------------------------


FINEST = 8


@pytest.mark.parametrize('target', [None, 7], ids=['own', 'target'])
def test_shortcut_regresses_a_step_on_two_half_steps_of_the_target(target, x64):
  params, batch = weights(), labelled()
  fixed = params if target is None else weights(target)
  loss = flow_map.shortcut(MODEL, num_steps=FINEST, flow_fraction=0.25)

  def found(params):
    nets = core.Nets(params, None if target is None else fixed)
    out = loss(nets, batch, jnp.int32(3), keys())
    return jnp.sum(out.loss), out

  drawn = times.dyadic_pairs(num_steps=FINEST, flow_fraction=0.25)
  x0, (t, r) = batch.x0, drawn(keys()['time'], ROWS, 3)
  z = jax.random.normal(keys()['noise'], x0.shape)
  x_t, half = (1 - t)[:, None] * x0 + t[:, None] * z, (t - r) / 2

  def u(params, x, t, gap):
    return perceptron(params, x, jnp.stack([t, gap], axis=1), batch.cond)

  first = u(fixed, x_t, t, half)
  second = u(fixed, x_t - half[:, None] * first, t - half, half)
  flows = t - r == 1 / FINEST
  assert np.sum(flows) == 2  # a quarter of eight
  goal = jnp.where(flows[:, None], z - x0, (first + second) / 2)

  def written_out(params):
    loss = core.sum_features((u(params, x_t, t, t - r) - goal) ** 2)
    return jnp.sum(loss), loss

  gradient, out = jax.jit(jax.grad(found, has_aux=True))(params)
  exact, value = jax.jit(jax.grad(written_out, has_aux=True))(params)
  np.testing.assert_allclose(out.loss, value, rtol=1e-12)  # float64
  np.testing.assert_allclose(out.aux['gap'], t - r, rtol=1e-14)
  assert distance_between(gradient, exact) < 1e-12


def test_shortcut_trains_every_length_of_step_that_it_takes_by_its_target():
  gaps = {'online': set(), 'target': set()}

  def apply(params, x, c_noise, cond, *, key=None):
    name = 'target' if params == 1 else 'online'
    assert (key is None) == (name == 'target')  # half steps are without dropout
    gaps[name] |= set(np.asarray(c_noise)[:, 1])
    return jnp.zeros_like(x)

  f = precond.two_time(core.Network(None, apply, num_times=2))
  batch = core.Batch(jnp.zeros((256, 3)), None)  # no length is missed, 1e-37

  def run(flow_fraction):
    loss = flow_map.shortcut(f, num_steps=FINEST, flow_fraction=flow_fraction)
    loss(core.Nets(0.0, 1.0), batch, jnp.int32(0), keys())

  run(0.0)
  evaluated = set(gaps['target'])
  assert evaluated == {1 / 2, 1 / 4, 1 / FINEST}
  run(1.0)  # whose half steps are not used
  assert gaps['online'] == evaluated | {1.0}


def test_logged_sigma_is_finite_where_sigma_is_infinite():
  t = jnp.array([0.5, 80 / 81, 0.999, 1.0])
  zeros = jnp.zeros((4, 3))
  field = fields.conditional(LINEAR, zeros, zeros)
  noisy = core.Noisy(zeros, t, None, None)
  out = flow_map.shortcut_loss(MODEL, core.Nets(weights()), field, noisy, t / 2)
  levels = np.asarray(out.aux['sigma'])
  np.testing.assert_allclose(levels[:2], [1.0, 80.0], rtol=1e-5)  # float32 of 1 - t
  assert np.all(np.diff(levels) > 0)  # rows are ranked by it
  assert levels[-1] < 81.01


# What is refused -------------------------------------------------------------------

TIMES = times.logit_normal_pairs()


def plain(params, x, t, cond, *, key=None):
  return x


@pytest.mark.parametrize(
  'build', [lambda f: flow_map.meanflow(f, pairs=TIMES), flow_map.shortcut]
)
def test_models_of_one_time_are_refused(build):
  build(MODEL)
  network = core.Network(None, perceptron)
  for other in (plain, precond.edm(network), precond.trigflow(network)):
    with pytest.raises(ValueError, match=r'precond\.two_time'):
      build(other)


def test_pairs_out_of_order_are_refused():
  build = flow_map.meanflow
  with pytest.raises(ValueError, match=r'0 <= r <= t, got r='):
    build(MODEL, pairs=lambda key, n, step: TIMES(key, n, step)[::-1])
  with pytest.raises(ValueError, match=r'0 <= r <= t, got r=-0\.1'):
    build(MODEL, pairs=lambda key, n, step: (jnp.ones(n), jnp.full(n, -0.1)))


def test_guidance_without_label_dropout_is_refused():
  with pytest.raises(ValueError, match=r'guidance=2\.0 needs label_dropout > 0'):
    flow_map.meanflow(MODEL, pairs=TIMES, guidance=2.0)


@pytest.mark.parametrize('fraction', [-0.1, 1.0])
def test_a_label_dropout_outside_its_range_is_refused(fraction):
  with pytest.raises(ValueError, match=r'label_dropout in \[0, 1\)'):
    flow_map.meanflow(MODEL, pairs=TIMES, label_dropout=fraction)


@pytest.mark.parametrize('guidance', [1.0, 2.0])
def test_label_dropout_without_labels_is_refused(guidance):
  loss = flow_map.meanflow(MODEL, pairs=TIMES, label_dropout=0.1, guidance=guidance)
  batch = core.Batch(jnp.zeros((4, 3)), None)
  with pytest.raises(ValueError, match=r'label_dropout=0\.1 needs labels'):
    loss(core.Nets(None), batch, 0, core.streams(jax.random.key(0), 0))
