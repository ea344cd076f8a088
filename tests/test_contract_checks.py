"""Each property of the contracts refuses what breaks it, in one line; two oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import (
  contract_networks,
  contract_objectives,
  contract_samplers,
  contracts,
  core,
  distances,
  guidance,
  oracles,
  precond,
  samplers,
  schedules,
  times,
  weightings,
)
from cmjax.contract_networks import network_case
from cmjax.contract_objectives import objective_case
from cmjax.contract_samplers import PrecondCase, SamplerCase
from cmjax.core import LossOut, Network
from cmjax.objectives import consistency, denoise

# Objectives ------------------------------------------------------------------------


def objective(change=None, **parts):
  """|f(x0 + t z) - target|^2, with one of its parts replaced, and then changed."""
  use = dict(
    t=lambda keys, draws: draws.times(keys['time'], 8),
    z=lambda keys, x: jax.random.normal(keys['noise'], x.shape),
    target=lambda f, nets, x, t, batch: jax.lax.stop_gradient(
      f(nets.target_params(), batch.x0 + 0.5 * (x - batch.x0), 0.5 * t, batch.cond)
    ),
  )
  use |= parts

  def build(f, draws):
    def loss(nets, batch, step, keys):
      t = use['t'](keys, draws)
      x = batch.x0 + core.expand(t, batch.x0) * use['z'](keys, batch.x0)
      y = f(nets.online, x, t, batch.cond, key=keys['dropout'])
      target = use['target'](f, nets, x, t, batch)
      losses = core.sum_features((y - target) ** 2)
      return change(losses, t) if change else LossOut(losses, {'sigma': t})

    return loss

  return build


COUNT = iter(range(1000))
WRONG_OBJECTIVES = {
  'mean': (
    'losses_are_finite: .*shape',
    dict(change=lambda d, t: LossOut(d.mean(), {'sigma': t})),
  ),
  'no sigma': (
    'losses_are_finite: return LossOut',
    dict(change=lambda d, t: LossOut(d, {})),
  ),
  'an array': ('losses_are_finite: return LossOut', dict(change=lambda d, t: d)),
  'half': (
    'losses_are_finite: loss is bfloat16',
    dict(change=lambda d, t: LossOut(d.astype(jnp.bfloat16), {'sigma': t})),
  ),
  'NaN': (
    'losses_are_finite: loss is',
    dict(change=lambda d, t: LossOut(d / (t - t), {'sigma': t})),
  ),
  'NumPy': (
    'draws_come_from_keys: traced twice',
    dict(
      z=lambda keys, x: (
        jnp.asarray(np.random.normal(size=x.shape), x.dtype)
        + jax.random.normal(keys['noise'], x.shape)
      )
    ),
  ),
  'state': (
    'draws_come_from_keys: traced twice',
    dict(change=lambda d, t: LossOut(d + next(COUNT), {'sigma': t})),
  ),
  'one key': (
    'draws_come_from_keys: a key',
    dict(z=lambda keys, x: jax.random.normal(keys['time'], x.shape)),
  ),
  'no keys': (
    'draws_come_from_keys: other keys',
    dict(
      t=lambda keys, draws: jnp.ones(8),
      z=lambda keys, x: jax.random.normal(jax.random.key(0), x.shape),
      change=lambda d, t: LossOut(0 * d + t, {'sigma': t}),
    ),
  ),
  'over the batch': (
    r'examples_are_independent: .*\[0, 1',
    dict(change=lambda d, t: LossOut(d / jnp.mean(d), {'sigma': t})),
  ),
  'no root floor': (
    'online_alone_is_trained: the gradient is not finite',
    dict(change=lambda d, t: LossOut(d + jnp.sqrt(d - d), {'sigma': t})),
  ),
  'stopped': (
    'online_alone_is_trained: the gradient is zero',
    dict(change=lambda d, t: LossOut(jax.lax.stop_gradient(d), {'sigma': t})),
  ),
  'teacher': (
    'online_alone_is_trained: nets.teacher has a gradient',
    dict(target=lambda f, nets, x, t, batch: f(nets.teacher, x, 0.5 * t, batch.cond)),
  ),
  'target': (
    'online_alone_is_trained: nets.target has a gradient',
    dict(target=lambda f, nets, x, t, batch: f(nets.target, x, 0.5 * t, batch.cond)),
  ),
  'online target': (
    'target_is_a_constant: .*target_params',
    dict(
      target=lambda f, nets, x, t, batch: f(
        nets.online if nets.target is None else jax.lax.stop_gradient(nets.target),
        x,
        0.9 * t,
        batch.cond,
      )
    ),
  ),
  'half of the data': (
    'exact_model_has_no_loss: the loss of the exact model',
    dict(target=lambda f, nets, x, t, batch: 0.5 * batch.x0),
  ),
  'bounded below': (
    'exact_model_has_no_loss: the loss of a wrong model',
    dict(change=lambda d, t: LossOut(jnp.maximum(d - 1e3, 0.0), {'sigma': t})),
  ),
  'overflow': (
    r'extreme_times_are_finite: the loss is not finite at t = 300',
    dict(change=lambda d, t: LossOut(d * jnp.exp(t), {'sigma': t})),
  ),
  'sigma = 0': (
    'extreme_times_are_finite: the loss is not finite at t = 0.001',
    dict(
      target=lambda f, nets, x, t, batch: jax.lax.stop_gradient(
        f(nets.target_params(), batch.x0, 0 * t, batch.cond)
      )
    ),
  ),
}
CHECKS = {check.__name__: check for check in contract_objectives.OBJECTIVE}


@pytest.mark.parametrize('name', WRONG_OBJECTIVES)
def test_a_wrong_objective_is_refused(name):
  message, parts = WRONG_OBJECTIVES[name]
  case = objective_case(objective(**parts))
  with pytest.raises(contracts.ContractError, match=f'^{message}') as error:
    CHECKS[message.partition(':')[0]](case)
  assert '\n' not in str(error.value)


def test_the_right_objective_passes_with_and_without_draws():
  contracts.check_objective(objective())
  calls = []

  def without(f):
    calls.append(f)
    return objective()(f, contract_objectives.USUAL)

  contract_objectives.losses_are_finite(objective_case(without))
  assert len(calls) == 1


def test_an_unknown_form_is_refused():
  with pytest.raises(ValueError, match='form must be one of edm, trigflow, two_time'):
    contracts.check_objective(objective(), form='linear')


@pytest.mark.parametrize(
  ('bind', 'message'),
  [
    (lambda d: lambda nets: d.bind(jnp.ones((16, 5))), 'does not follow'),
    (
      lambda d: (
        lambda nets: d.bind(
          jnp.ones((16, 5)) if nets.perceptual is None else nets.perceptual
        )
      ),
      'no error',
    ),
    (
      lambda d: lambda nets: distances.Distance(lambda a, b: 0 * a[:, 0, 0, 0], 2),
      'zero',
    ),
  ],
  ids=['bound early', 'a default', 'none'],
)
def test_a_wrong_use_of_a_perceptual_distance_is_refused(bind, message):
  def build(f, distance):
    def loss(nets, batch, step, keys):
      d = bind(distance)(nets)
      y = f(nets.online, batch.x0, jnp.ones(8), batch.cond)
      return LossOut(d(y, batch.x0), {'sigma': jnp.ones(8)})

    return loss

  with pytest.raises(contracts.ContractError, match=f'^check_perceptual: .*{message}'):
    contracts.check_perceptual(build)


# Networks --------------------------------------------------------------------------


def network(**wrong):
  """How to build a network of one layer, with parts of `wrong` in place of its own."""

  def build(
    *, dropout=0.0, dtype='float32', num_times=1, log_weight=False, remat=False,
    attention_implementation='exact', channel_mult=(), attention_resolutions=(),
  ):  # fmt: skip
    if num_times < 1 or (num_times > 1 and log_weight):
      raise ValueError(wrong.get('error', f'num_times must be 1, got {num_times}'))

    def init(key, x, c_noise, cond):
      size = int(np.prod(x.shape[1:]))
      params = dict(
        x=jnp.zeros((size, size)),
        t=jnp.zeros((num_times, size)),
        y=jnp.zeros((3, size)),
      )
      if log_weight:
        params[core.LOG_WEIGHT] = jnp.full(1, wrong.get('log_weight_at_first', 0.0))
      params = jax.tree.map(lambda a: a.astype(wrong.get('params', 'float32')), params)
      if attention_implementation == 'fused' and 'more_params' in wrong:
        params['more'] = jnp.zeros(1)
      return params

    def apply(params, x, c_noise, cond, *, key=None):
      if cond is None:
        raise ValueError(wrong.get('no_labels', 'trained with labels'))
      w = jax.tree.map(lambda a: a.astype(dtype), params)
      h = jnp.reshape(x, (len(x), -1)).astype(dtype) @ w['x']
      c = jnp.reshape(c_noise, (len(x), -1)).astype(dtype)
      h = h + wrong.get('time', lambda c, w: jnp.sin(c @ w))(c, w['t'])
      h = jnp.tanh(h + wrong.get('label', lambda y: y)(cond.astype(dtype) @ w['y']))
      h = wrong.get('drop', drop)(h, key) if dropout else h
      h = wrong.get('out', lambda h: h)(h)
      if attention_implementation == 'fused':
        h = h * wrong.get('fused', 1.0)
      return jnp.reshape(h, x.shape).astype(wrong.get('dtype', dtype))

    def weight(params, c_noise):
      return params[core.LOG_WEIGHT][0] * wrong.get('weight', lambda c: c)(c_noise)

    has_weight = log_weight or 'weight_always' in wrong
    return Network(init, apply, num_times, weight if has_weight else None)

  return build


def drop(h, key):
  return h if key is None else jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h, 0)


@jax.custom_vjp
def reverse_only(h):
  return h


reverse_only.defvjp(lambda h: (h, None), lambda _, g: (g,))
HALF = dict(key=jax.random.key(0))
WRONG_NETWORKS = {
  'dropout_needs_a_key: two calls with the same': dict(
    drop=lambda h, key: h if key is None else h + next(COUNT)
  ),
  'dropout_needs_a_key: dropout=0.5 with a key': dict(drop=lambda h, key: h),
  r'inputs_are_used: another x .*\[0, 1': dict(out=lambda h: h - jnp.mean(h, 0)[None]),
  'inputs_are_used: another noise level': dict(time=lambda c, w: 0 * (c @ w)),
  'inputs_are_used: another label': dict(label=lambda y: 0 * y),
  'labels_are_required: cond=None gives: sorry': dict(no_labels='sorry'),
  'dtype_is_kept: parameters are bfloat16': dict(params='bfloat16'),
  'dtype_is_kept: F is float32': dict(dtype='float32'),
  'dtype_is_kept: bfloat16 changes F by': dict(out=lambda h: jnp.round(3 * h)),
  'jvp_is_the_derivative: jax.jvp fails': dict(out=reverse_only),
  'jvp_is_the_derivative: jax.jvp, of norm': dict(
    out=lambda h: h + jax.lax.stop_gradient(h)
  ),
  'two_times_differ: another second time': dict(
    time=lambda c, w: jnp.sin(jnp.sum(c, 1, keepdims=True) @ w[:1])
  ),
  'log_weight_is_apart: Network.log_weight': dict(weight_always=True),
  'log_weight_is_apart: log w is': dict(log_weight_at_first=1.0),
  'log_weight_is_apart: log w has 1 values': dict(weight=lambda c: 0 * c),
  'num_times_is_checked: .*gives: no': dict(error='no'),
  'attentions_agree: .*changes the parameters': dict(more_params=True),
  'attentions_agree: .*the gradient differs': dict(fused=1.01),
}
NETWORK_CHECKS = {check.__name__: check for check in contract_networks.NETWORK}


@pytest.mark.parametrize('message', WRONG_NETWORKS)
def test_a_wrong_network_is_refused(message):
  case = network_case(network(**WRONG_NETWORKS[message]), (2, 2, 1))
  if 'two calls' in message:  # compiled, it would be the same number
    case = case._replace(apply=network(**WRONG_NETWORKS[message])(dropout=0.5).apply)
  with pytest.raises(contracts.ContractError, match=f'^{message}') as error:
    NETWORK_CHECKS[message.partition(':')[0]](case)
  assert '\n' not in str(error.value)


def test_the_right_network_passes():
  contracts.check_network(network(), (2, 2, 1))


# Preconditionings and samplers ------------------------------------------------------


def wrong_precond(c_skip, c_out, cast=lambda x: x):
  def build(net):
    def model(params, x, sigma, cond, *, key=None):
      s = core.expand(sigma, x)
      return c_skip(s) * x + c_out(s) * cast(net.apply(params, x, sigma, cond, key=key))

    return model

  return build


@pytest.mark.parametrize(
  ('message', 'parts'),
  [
    ('boundary_is_the_identity: ', (lambda s: 1.0, lambda s: 0.1 + s)),
    ('boundary_is_the_identity: c_out', (lambda s: 1.0, lambda s: 0 * s)),
    ('boundary_is_of_first_order: ', (lambda s: 1.0, lambda s: s**2)),
    ('outside_is_float32: ', (lambda s: jnp.bfloat16(1), lambda s: s)),
  ],
)
def test_a_wrong_preconditioning_is_refused(message, parts):
  if 'float32' in message:
    case = PrecondCase(lambda net: lambda p, x, s, c: net.apply(p, x, s, c))
  else:
    case = PrecondCase(wrong_precond(*parts))
  check = {c.__name__: c for c in contract_samplers.PRECOND}[message.partition(':')[0]]
  with pytest.raises(contracts.ContractError, match=f'^{message}'):
    check(case)


def test_the_right_preconditionings_and_samplers_pass():
  contracts.check_precond(precond.consistency, boundary=0.002)
  contracts.check_sampler(samplers.multistep(sigmas=(80.0, 1.0)), evaluations=2)


def sampler(noise=samplers.normal, sigmas=(1.0,), **given):
  def sample(f, params, keys, cond, shape):
    x = f(params, noise(keys, 0, shape), jnp.ones(len(keys)), cond, **given)
    return samplers.Samples(x, sigmas)

  return sample


@pytest.mark.parametrize(
  ('message', 'wrong'),
  [
    ('evaluations_are_counted: .*1 times.* 2 noise', sampler(sigmas=(1.0, 0.5))),
    ('evaluations_are_counted: a key', sampler(key=jax.random.key(0))),
    (
      'samples_are_independent: samples 1 and 2',
      sampler(lambda keys, i, shape: jax.random.normal(keys[0], (len(keys), *shape))),
    ),
  ],
)
def test_a_wrong_sampler_is_refused(message, wrong):
  with pytest.raises(contracts.ContractError, match=f'^{message}'):
    contracts.check_sampler(wrong, evaluations=1)


def test_a_guided_sampler_gets_a_guide():
  guided = guidance.autoguidance(sampler=samplers.one_step(), guidance=2.0)
  for check in contract_samplers.SAMPLER:
    check(SamplerCase(guided, 2, guided=True))


# Exact models ----------------------------------------------------------------------

GAUSSIAN = oracles.gaussian(np.array([0.3, -0.2]), 0.4)
SMALL = dict(num_batches=8, batch_size=2048)


def exact_map(x, sigma):
  return oracles.consistency(GAUSSIAN, x, sigma, 1e-3)


def of_gap(gap):
  return lambda f: consistency.ect(
    f,
    times=times.lognormal(mean=-0.5, std=0.5),
    relative_gap=schedules.constant(value=gap),
    k=0.0,
    distance=distances.squared_l2(),
    weighting=weightings.inverse_gap(),
  )


def test_the_denoiser_is_stationary_and_the_consistency_map_is_not():
  def edm(f):
    return denoise.edm(f, times=times.lognormal(mean=-0.5, std=0.5))

  def exact(x, sigma):
    return oracles.denoiser(GAUSSIAN, x, sigma)

  measured = contracts.check_minimiser(edm, GAUSSIAN, exact, **SMALL)
  assert measured.exact < 3 * measured.noise
  with pytest.raises(
    contracts.ContractError, match=r'^exact model: .*correct the target'
  ):
    contracts.check_minimiser(edm, GAUSSIAN, exact_map, **SMALL)


def test_the_gradient_of_ect_at_the_exact_map_falls_with_the_gap():
  wide, narrow = (
    contracts.gradient_at_exact(of_gap(gap), GAUSSIAN, exact_map, **SMALL)
    for gap in (0.8, 0.2)
  )
  # Of the order of the gap: a quarter, and up to three standard errors.
  assert narrow.exact < 0.35 * wide.exact + 3 * narrow.noise
  assert wide.exact > 5 * wide.noise
  with pytest.raises(contracts.ContractError, match='smaller gap'):
    contracts.check_minimiser(of_gap(0.8), GAUSSIAN, exact_map, **SMALL)


def test_a_gradient_that_is_hidden_by_noise_is_refused():
  with pytest.raises(contracts.ContractError, match='too uncertain'):
    contracts.check_minimiser(
      of_gap(0.01), GAUSSIAN, exact_map, num_batches=2, batch_size=4, size=1e-3
    )
