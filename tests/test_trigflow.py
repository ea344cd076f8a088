"""The simplified objectives against Theorem 6, other processes and exact maps."""

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
)
from cmjax.networks import mlp
from cmjax.objectives import continuous, trigflow

# Three dimensions, so that their number is not taken for the 2 of a square.
GAUSSIAN = oracles.gaussian(np.array([0.3, -0.2, 0.1]), 0.4)
MIXTURE = oracles.Mixture(
  np.array([0.5, 0.3, 0.2]),
  np.array([[0.7, 0.1, 0.0], [-0.5, 0.4, 0.3], [0.0, -0.6, -0.2]]),
  np.array([0.3, 0.25, 0.4]),
)
ROWS = 8


def perceptron(params, x, t, cond, *, key=None):
  h = jnp.matmul(x, params['x']) + core.expand(t, x) * params['t'][None]
  return jnp.matmul(jnp.tanh(h), params['out'])


NETWORK = core.Network(None, perceptron)


def weights(seed=0):
  """Parameters of order one for a smooth F that fits nothing."""
  draw = np.random.default_rng(seed)
  shapes = {'x': (3, 8), 't': (8,), 'out': (8, 3)}
  return {name: jnp.asarray(draw.normal(size=shape)) for name, shape in shapes.items()}


def mlp_and_weights(**kwargs):
  """The network that is trained on points, with no parameter at zero."""
  network = mlp.mlp(width=16, num_blocks=1, embedding=8, noise_scale=3.0, **kwargs)
  example = jnp.zeros((1, 3)), jnp.zeros(1), None
  shapes = jax.eval_shape(network.init, jax.random.key(0), *example)
  draw = np.random.default_rng(0)

  def drawn(like):
    return jnp.asarray(0.4 * draw.normal(size=like.shape), like.dtype)

  return network, jax.tree.map(drawn, shapes)


def draws():
  """Data, noise and angles over the whole quarter turn."""
  x0 = oracles.sample(MIXTURE, jax.random.key(1), ROWS).astype(float)
  z = jnp.asarray(np.random.default_rng(1).normal(size=x0.shape))
  return x0, z, jnp.linspace(0.05, 1.5, ROWS)


def column(v):
  return np.asarray(v)[:, None]


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def distance_between(found, exact):
  found, exact = flat(found), flat(exact)
  distance = np.linalg.norm(found - exact) / np.linalg.norm(exact)
  print(f'{distance:.1e}')
  return distance


def flow(f, name, x0, z):
  if name == 'conditional':
    return fields.conditional(f.process, x0, z)
  return fields.probability_flow(
    f.process, lambda x, t: oracles.denoiser(MIXTURE, x, t)
  )


def in_angles(f):
  """f(x, t) = cos t x - sin t sigma_data F as a model of angles, written out."""

  def model(params, x, t, cond, *, key=None):
    turn = core.expand(t, x)
    raw = f.network.apply(params, x / f.sigma_data, t, cond, key=key)
    return jnp.cos(turn) * x - jnp.sin(turn) * f.sigma_data * raw

  return model


# Theorem 6 -------------------------------------------------------------------------


@pytest.mark.parametrize('sigma_data', [0.5, 1.3])
@pytest.mark.parametrize('name', ['conditional', 'teacher'])
def test_the_raw_gradient_is_that_of_theorem_6(name, sigma_data, x64):
  f = precond.trigflow(NETWORK, sigma_data=sigma_data)
  x0, z, t = draws()
  x_t = process.perturb(f.process, x0, z, t)
  at = flow(f, name, x0, z), core.Noisy(x_t, t, None, None)

  def simplified(params):
    out = trigflow.scm_loss(f, core.Nets(params), *at, normaliser=None)
    return jnp.sum(out.loss)

  def theorem(params):
    out = continuous.pseudo_loss(
      in_angles(f),
      core.Nets(params),
      *at,
      distance=distances.squared_l2(),
      weighting=lambda t, r: 1 / (3 * sigma_data * jnp.tan(t)),
    )
    return jnp.sum(out.loss)

  found, exact = jax.jit(lambda p: [jax.grad(g)(p) for g in (simplified, theorem)])(
    weights()
  )
  assert distance_between(found, exact) < 1e-12  # float64, two orders of operations


def test_a_target_network_gives_the_tangent_and_the_point_it_starts_from(x64):
  f = precond.trigflow(NETWORK, sigma_data=0.7)
  params, target = weights(), weights(seed=7)
  x0, z, t = draws()
  x_t, field = process.perturb(f.process, x0, z, t), flow(f, 'conditional', x0, z)
  at = field, core.Noisy(x_t, t, None, None)

  def found(params):
    nets = core.Nets(params, target)
    return jnp.sum(trigflow.scm_loss(f, nets, *at, normaliser=None).loss)

  def written_out(params):
    _, dy = continuous.tangent(in_angles(f), target, *at)
    y, still = (perceptron(p, x_t / 0.7, t, None) for p in (params, target))
    return jnp.sum((y - still - jnp.cos(t)[:, None] * dy) ** 2) / 3

  for a, b in zip(
    *(jax.jit(jax.value_and_grad(g))(params) for g in (found, written_out))
  ):
    assert distance_between(a, b) < 1e-12  # float64, two orders of operations


@pytest.mark.parametrize('name', ['conditional', 'teacher'])
def test_the_tangent_is_that_on_the_ve_process(name, x64):
  f, params = precond.trigflow(NETWORK, sigma_data=0.7), weights()
  x0, z, t = draws()
  x_t, field = process.perturb(f.process, x0, z, t), flow(f, name, x0, z)
  levels = 0.7 * jnp.tan(t)
  if name == 'conditional':
    ve_field = fields.conditional(process.VE, x0, z)
  else:
    ve_field = oracles.field(MIXTURE)

  @jax.jit
  def both(params):
    noisy = core.Noisy(x_t, t, None, None)
    _, by_angle = continuous.tangent(in_angles(f), params, field, noisy)
    x = process.perturb(process.VE, x0, z, levels)
    on_ve = core.Noisy(x, levels, None, None)
    _, by_level = continuous.tangent(f, params, ve_field, on_ve)
    out = trigflow.scm_loss(f, core.Nets(params), field, noisy, normaliser=None)
    return by_angle, by_level, out.aux

  by_angle, by_level, aux = both(params)
  moved = by_level * 0.7 / np.cos(column(t)) ** 2
  assert distance_between(moved, by_angle) < 1e-12  # float64
  length = np.linalg.norm(np.asarray(by_angle), axis=1)
  # As is cos t of it, the length that is logged, with the noise level beside it.
  np.testing.assert_allclose(aux['tangent'], np.cos(np.asarray(t)) * length, rtol=1e-11)
  np.testing.assert_allclose(aux['sigma'], levels, rtol=1e-14)


# Teachers of other processes -------------------------------------------------------


@pytest.mark.parametrize('sigma_data', [0.5, 1.3])
def test_an_edm_teacher_is_a_trigflow_network_with_its_sign_turned(sigma_data, x64):
  network, params = mlp_and_weights(dtype='float64')
  trig = process.trigflow(sigma_data)
  x0, z, t = draws()
  x_t = process.perturb(trig, x0, z, t)
  teacher = fields.teacher_denoiser(
    precond.edm(network, sigma_data=sigma_data), params, None
  )
  c_noise = jnp.log(sigma_data * jnp.tan(t)) / 4
  raw = jax.jit(network.apply)(params, x_t / sigma_data, c_noise, None)
  found = jax.jit(fields.probability_flow(trig, teacher))(x_t, t)
  # The teacher's data is divided by sin 0.05 to be a velocity: two digits are lost.
  assert distance_between(found, -sigma_data * raw) < 1e-12


def test_a_flow_matching_teacher_has_its_closed_form(x64):
  params, trig = weights(), process.trigflow(1.0)
  x0, z, t = draws()
  x_t = process.perturb(trig, x0, z, t)

  def denoiser(x, level):
    x, s = process.change_process(process.VE, process.LINEAR, x, level)
    v = perceptron(params, x, s, None)
    return process.data_of_velocity(process.LINEAR, x, v, s)

  found = fields.probability_flow(trig, denoiser)(x_t, t)
  s = column(jnp.sin(t) / (jnp.sin(t) + jnp.cos(t)))
  norm = np.sqrt(s**2 + (1 - s) ** 2)
  x = np.asarray(x_t) * norm
  v = perceptron(params, jnp.asarray(x), jnp.asarray(s[:, 0]), None)
  # Chen et al. 2025 (SANA-Sprint), proposition 3.1, for sigma_data = 1.
  exact = ((1 - 2 * s) * x + (1 - 2 * s + 2 * s**2) * np.asarray(v)) / norm
  assert distance_between(found, exact) < 1e-12  # float64


@pytest.mark.parametrize(
  'other', [process.trigflow(0.5), process.LINEAR], ids=['trigflow', 'linear']
)
def test_the_flow_of_another_process_leads_to_the_same_point(other, x64):
  x0, z, _ = draws()
  high, low = jnp.linspace(0.5, 20.0, ROWS), jnp.full(ROWS, 0.05)
  x = process.perturb(process.VE, x0, z, high)
  field = fields.probability_flow(other, lambda x, t: oracles.denoiser(MIXTURE, x, t))

  @jax.jit
  def both(x):
    exact = oracles.consistency(MIXTURE, x, high, low)
    x, start = process.change_process(process.VE, other, x, high)
    step = (other.time_of(low) - start) / 1024

    def advance(i, x):
      return solvers.runge_kutta4(field, x, start + i * step, start + (i + 1) * step)

    x = jax.lax.fori_loop(0, 1024, advance, x)
    return exact, process.change_process(other, process.VE, x, start + 1024 * step)[0]

  exact, through = both(x)
  # The integrator in ln t errs by 1e-11 at 1,024 steps, those in other times by less.
  np.testing.assert_allclose(through, exact, atol=1e-10)


# The target of the regression ------------------------------------------------------


def offset(shift, x, c_noise, cond, *, key=None):
  """F with a parameter of its own in each row, whose gradient shows the target."""
  return perceptron(weights(), x, c_noise, cond) + shift


def targets(**choices):
  """What F is regressed towards in each row, and the loss's other numbers."""
  f = precond.trigflow(core.Network(None, offset))
  x0, z, t = draws()
  x_t = process.perturb(f.process, x0, z, t)
  at = flow(f, 'conditional', x0, z), core.Noisy(x_t, t, None, None)

  def loss(shift):
    out = trigflow.scm_loss(f, core.Nets(shift), *at, **choices)
    return jnp.sum(out.loss), out

  gradient, out = jax.jit(jax.grad(loss, has_aux=True))(jnp.zeros_like(x0))
  return -3 * np.asarray(gradient) / 2, out


def test_without_warmup_only_velocity_matching_is_left(x64):
  found, _ = targets(warmup=0.0, normaliser=None)
  trig = process.trigflow(0.5)
  x0, z, t = draws()
  raw = perceptron(weights(), process.perturb(trig, x0, z, t) / 0.5, t, None)
  error = 0.5 * np.asarray(raw) - np.asarray(
    process.conditional_velocity(trig, x0, z, t)
  )
  exact = -(np.cos(column(t)) ** 2) * error
  # Float64; at t = 1.5 the cosine squared is 0.005, which costs two digits.
  np.testing.assert_allclose(found, exact, rtol=1e-11, atol=1e-14)


def test_warmup_goes_from_velocity_matching_to_the_whole_target(x64):
  none, some, whole, plain = (
    targets(normaliser=None, **warmup)[0]
    for warmup in (dict(warmup=0.0), dict(warmup=0.3), dict(warmup=1.0), {})
  )
  np.testing.assert_array_equal(whole, plain)
  assert np.min(np.linalg.norm(whole - none, axis=1)) > 1e-3
  np.testing.assert_allclose(some, 0.7 * none + 0.3 * whole, rtol=1e-12)


@pytest.mark.parametrize('normaliser', [0.1, 2.0])
def test_a_normalised_target_is_shorter_than_one_and_has_its_direction(normaliser, x64):
  found, out = targets(normaliser=normaliser)
  whole, raw = targets(normaliser=None)
  length = np.linalg.norm(whole, axis=1)
  np.testing.assert_allclose(raw.aux['tangent'], length, rtol=1e-12)
  np.testing.assert_array_equal(out.aux['tangent'], raw.aux['tangent'])
  assert np.max(length) > 1 > np.max(np.linalg.norm(found, axis=1))
  np.testing.assert_allclose(found, whole / (length + normaliser)[:, None], rtol=1e-12)
  shorter = length / (length + normaliser)
  np.testing.assert_allclose(out.loss, shorter**2 / 3, rtol=1e-12)


def test_no_defect_gives_exactly_no_loss_and_no_gradient():
  def zero(params, x, c_noise, cond, *, key=None):
    return params * x

  f = precond.trigflow(core.Network(None, zero))
  x_t, t = jnp.zeros((ROWS, 3)), jnp.linspace(0.0, 1.57, ROWS)
  field = fields.conditional(f.process, x_t, x_t)

  def loss(params):
    out = trigflow.scm_loss(f, core.Nets(params), field, core.Noisy(x_t, t, None, None))
    return jnp.sum(out.loss)

  assert jax.value_and_grad(loss)(0.7) == (0.0, 0.0)


# The learned weighting -------------------------------------------------------------


def test_a_learned_weighting_settles_at_the_inverse_of_the_mean_error(x64):
  def apply(params, x, c_noise, cond, *, key=None):
    return perceptron(params['f'], x, c_noise, cond)

  def log_weight(params, c_noise):
    return params['w'] * jnp.ones_like(c_noise)

  x0, z, t = draws()

  def mean(params, log_weight):
    f = precond.trigflow(core.Network(None, apply, 1, log_weight))
    x_t = process.perturb(f.process, x0, z, t)
    field = fields.conditional(f.process, x0, z)
    out = trigflow.scm_loss(f, core.Nets(params), field, core.Noisy(x_t, t, None, None))
    return jnp.mean(out.loss)

  plain = jax.jit(jax.value_and_grad(lambda p: mean(p, None)))
  learned = jax.jit(jax.value_and_grad(lambda p: mean(p, log_weight)))
  error, unweighted = plain({'f': weights(), 'w': 0.0})
  best = -float(jnp.log(error))
  for w in (best, best + 0.5, best - 0.5):
    value, gradient = learned({'f': weights(), 'w': w})
    weight = np.exp(w)
    np.testing.assert_allclose(value, weight * error - w, rtol=1e-12)
    # Zero at the best w, where e^w E = 1 to rounding.
    np.testing.assert_allclose(gradient['w'], weight * error - 1, atol=1e-14)
    np.testing.assert_allclose(
      flat(gradient['f']), weight * flat(unweighted['f']), rtol=1e-10, atol=1e-13
    )


def test_a_learned_weighting_is_evaluated_at_the_angles(x64):
  network, params = mlp_and_weights(dtype='float64', log_weight=True)
  f = precond.trigflow(network)
  x0, z, t = draws()
  x_t, field = process.perturb(f.process, x0, z, t), flow(f, 'conditional', x0, z)

  def loss(network, params):
    f = precond.trigflow(network)
    return trigflow.scm_loss(
      f, core.Nets(params), field, core.Noisy(x_t, t, None, None)
    ).loss

  w = np.asarray(network.log_weight(params, t))
  assert np.ptp(w) > 0.1
  without = network._replace(log_weight=None)
  plain = np.asarray(jax.jit(lambda p: loss(without, p))(params))
  learned = jax.jit(lambda p: loss(network, p))
  np.testing.assert_allclose(learned(params), np.exp(w) * plain - w, rtol=1e-12)
  start = params | {core.LOG_WEIGHT: jnp.zeros(32)}
  np.testing.assert_allclose(learned(start), plain, rtol=1e-12)


# The builders ----------------------------------------------------------------------

ALWAYS = schedules.constant(value=1.0)
LEVELS = times.lognormal(mean=-1.0, std=1.4)


@pytest.mark.parametrize(
  ('oracle', 'bound'), [(GAUSSIAN, 1e-12), (MIXTURE, 1e-9)], ids=['gaussian', 'mixture']
)
def test_scd_with_exact_teacher_and_map_has_no_tangent(oracle, bound, x64):
  def apply(shift, x, t, cond, *, key=None):
    x, turn = 0.5 * x, core.expand(t, x)
    exact = oracles.consistency(oracle, x / jnp.cos(turn), 0.5 * jnp.tan(t))
    off = shift * jnp.sin(turn) ** 2
    return (jnp.cos(turn) * x - exact - off) / (0.5 * jnp.sin(turn))

  def exact_denoiser(params, x, t, cond, *, key=None):
    return oracles.denoiser(oracle, x, t)

  f = precond.trigflow(core.Network(None, apply))
  loss = trigflow.scd(f, exact_denoiser, times=LEVELS, warmup=ALWAYS)
  batch = core.Batch(
    oracles.sample(oracle, jax.random.key(1), ROWS).astype(float), None
  )

  @jax.jit
  def at(shift):
    def total(shift):
      out = loss(
        core.Nets(shift), batch, jnp.int32(0), core.streams(jax.random.key(2), 0)
      )
      return jnp.sum(out.loss), out

    return jax.grad(total, has_aux=True)(shift)

  gradient, out = at(0.0)
  print(f'{np.max(out.aux["tangent"]):.1e}')
  # Rounding in closed form; the integrator's error for a mixture.
  assert np.max(out.aux['tangent']) < bound
  assert abs(gradient) < 100 * bound  # the normaliser of 0.1 makes it tenfold
  gradient, out = at(0.3)
  assert np.min(out.aux['tangent']) > 1e-3
  assert abs(gradient) > 1e-2


def test_sct_draws_noise_levels_and_follows_the_conditional_field_with_warmup(x64):
  f, params = precond.trigflow(NETWORK), weights()
  x0 = draws()[0]
  batch = core.Batch(x0, None)
  warmup = lambda step: jnp.minimum(step / 8, 1.0)  # noqa: E731
  loss = jax.jit(trigflow.sct(f, times=LEVELS, warmup=warmup, normaliser=0.3))

  def keys():
    return core.streams(jax.random.key(3), 0)

  levels = LEVELS(keys()['time'], ROWS)
  z = jax.random.normal(keys()['noise'], x0.shape)
  angles = jnp.arctan(levels / 0.5)
  x_t = jnp.cos(angles)[:, None] * x0 + 0.5 * jnp.sin(angles)[:, None] * z
  for step, factor in ((0, 0.0), (4, 0.5), (20, 1.0)):
    found = loss(core.Nets(params), batch, jnp.int32(step), keys())
    exact = trigflow.scm_loss(
      f,
      core.Nets(params),
      fields.conditional(f.process, x0, z),
      core.Noisy(x_t, angles, None, None),
      warmup=factor,
      normaliser=0.3,
    )
    np.testing.assert_allclose(found.loss, exact.loss, rtol=1e-11)  # float64
    np.testing.assert_allclose(found.aux['tangent'], exact.aux['tangent'], rtol=1e-11)
    np.testing.assert_allclose(found.aux['sigma'], levels, rtol=1e-13)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_everything_is_finite_at_the_ends_of_the_quarter_turn(dtype):
  network, drawn = mlp_and_weights(dtype=dtype, log_weight=True)
  f, levels = precond.trigflow(network), jnp.array([1e-3, 300.0, 1e-3, 300.0])
  loss = trigflow.scd(f, f, times=lambda key, n: levels, warmup=ALWAYS, normaliser=1e-8)
  batch = core.Batch(jnp.asarray(draws()[0][:4], jnp.float32), None)

  @jax.jit
  def at(params):
    def mean(online):
      nets = core.Nets(online, teacher=params)
      out = loss(nets, batch, jnp.int32(0), core.streams(jax.random.key(0), 0))
      return jnp.mean(out.loss), out

    return jax.grad(mean, has_aux=True)(params)

  for params in drawn, jax.tree.map(jnp.zeros_like, drawn):
    gradient, out = at(params)
    assert out.loss.dtype == jnp.float32
    assert np.all(np.isfinite(flat((gradient, out))))


def plain(params, x, t, cond, *, key=None):
  return x


@pytest.mark.parametrize('name', ['sct', 'scd'])
def test_invalid_models_and_normalisers_are_refused(name):
  def build(f, **kwargs):
    choices = dict(times=LEVELS, warmup=ALWAYS) | kwargs
    if name == 'sct':
      return trigflow.sct(f, **choices)
    return trigflow.scd(f, plain, **choices)

  f = precond.trigflow(NETWORK)
  build(f)
  for other in (
    plain,
    precond.edm(NETWORK),
    precond.two_time(NETWORK._replace(num_times=2)),
  ):
    with pytest.raises(ValueError, match=r'precond\.trigflow'):
      build(other)
  for normaliser in (0.0, -0.1):
    with pytest.raises(ValueError, match='normaliser must'):
      build(f, normaliser=normaliser)


def test_guidance_without_labels_is_refused():
  f = precond.trigflow(NETWORK)
  loss = trigflow.scd(f, plain, times=LEVELS, warmup=ALWAYS, guidance=2.0)
  batch = core.Batch(jnp.zeros((4, 3)), None)
  with pytest.raises(ValueError, match=r'guidance=2\.0 needs labels'):
    loss(core.Nets(None), batch, 0, core.streams(jax.random.key(0), 0))
