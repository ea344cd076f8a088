"""Contracts of all objectives, networks, preconditioners and samplers, from one table.

A new member needs one row in its table; a public function without a row fails.
"""

import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import (
  core,
  diffusion_samplers,
  distances,
  fields,
  guidance,
  precond,
  samplers,
  schedules,
  times,
  weightings,
)
from cmjax.data.reference import reference
from cmjax.data.source import Source
from cmjax.networks import adm, edm2, mlp, songunet
from cmjax.objectives import (
  consistency,
  continuous,
  denoise,
  flow_map,
  progressive,
  trigflow,
)
from tests.conftest import ROOT

ONE_STEP = jnp.int32(7)
LOGNORMAL = times.lognormal(mean=-1.1, std=2.0)
GRID = times.karras_pairs(num_scales=schedules.constant(value=18.0))
METRIC = dict(
  distance=distances.pseudo_huber(c=0.01), weighting=weightings.inverse_gap()
)

SQUARED = dict(distance=distances.squared_l2(), weighting=weightings.uniform())
GAP = schedules.constant(value=0.1)
WARM = schedules.constant(value=0.5)
TWO_TIMES = times.logit_normal_pairs(equal_fraction=0.5)

# name: how to build it from a model f; a second f is the teacher's
OBJECTIVES = {
  'denoise:edm': lambda f: denoise.edm(f, times=LOGNORMAL, label_dropout=0.2),
  'consistency:ect': lambda f: consistency.ect(
    f, times=LOGNORMAL, relative_gap=GAP, **METRIC
  ),
  'consistency:ct': lambda f: consistency.ct(f, pairs=GRID, **METRIC),
  'consistency:ict': lambda f: consistency.ict(
    f, num_scales=schedules.constant(value=18.0), c=0.01
  ),
  'consistency:cd': lambda f: consistency.cd(f, f, pairs=GRID, guidance=1.5, **METRIC),
  'consistency:stable_ct': lambda f: consistency.stable_ct(
    f,
    times=LOGNORMAL,
    relative_gap=GAP,
    sigma_threshold=0.3,
    block_size=3,
    edges=(0.4, 2.0),
    **METRIC,
  ),
  'continuous:theorem3': lambda f: continuous.theorem3(
    f, f, times=LOGNORMAL, **SQUARED
  ),
  'continuous:theorem4': lambda f: continuous.theorem4(
    f, f, times=LOGNORMAL, **SQUARED | dict(distance=distances.pseudo_huber())
  ),
  'continuous:cd': lambda f: continuous.cd(
    f, f, times=LOGNORMAL, guidance=1.5, **SQUARED
  ),
  'continuous:ct': lambda f: continuous.ct(f, times=LOGNORMAL, **SQUARED),
  'trigflow:sct': lambda f: trigflow.sct(f, times=LOGNORMAL, warmup=WARM),
  'trigflow:scd': lambda f: trigflow.scd(
    f, f, times=LOGNORMAL, warmup=WARM, guidance=1.5
  ),
  'flow_map:meanflow': lambda f: flow_map.meanflow(
    f, pairs=TWO_TIMES, guidance=2.0, label_dropout=0.2, marginal_tangent=True
  ),
  'flow_map:shortcut': lambda f: flow_map.shortcut(f, num_steps=8),
  'progressive:pd': lambda f: progressive.pd(
    f, num_steps=schedules.constant(value=4.0), **SQUARED
  ),
}
# Objectives of a family whose model has a form of its own; the others take EDM's.
FORMS = {'trigflow': precond.trigflow, 'flow_map': precond.two_time}
UNET = dict(channels=8, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,))
# name: how to build it, and the shape of an example
NETWORKS = {
  'mlp:mlp': (
    lambda **kw: mlp.mlp(width=16, num_blocks=2, embedding=8, noise_scale=4.0, **kw),
    (4, 4, 1),
  ),
  'mlp:mlp of two times': (
    lambda **kw: mlp.mlp(
      width=16, num_blocks=2, embedding=8, noise_scale=4.0, num_times=2, **kw
    ),
    (4, 4, 1),
  ),
  'songunet:songunet': (lambda **kw: songunet.songunet(**UNET | kw), (8, 8, 3)),
  'songunet:songunet as NCSN++': (
    lambda **kw: songunet.songunet(
      **UNET | kw,
      embedding='fourier',
      residual_input=True,
      taps=(1, 3, 3, 1),
      augment=2,
    ),
    (8, 8, 3),
  ),
  'adm:adm': (lambda **kw: adm.adm(head_channels=4, **UNET | kw), (8, 8, 3)),
  'adm:adm without FiLM': (
    lambda **kw: adm.adm(head_channels=8, film=False, **UNET | kw),
    (8, 8, 3),
  ),
  'edm2:edm2': (lambda **kw: edm2.edm2(head_channels=4, **UNET | kw), (8, 8, 3)),
}
UNETS = [name for name in NETWORKS if not name.startswith('mlp') and ' ' not in name]
# Networks whose learned weighting does not start at zero: EDM2's does not either.
WEIGHTED_AT_FIRST = {'edm2:edm2'}
PRECONDITIONERS = {
  'edm': (precond.edm, 0.0),  # and where its boundary f(x, t) = x lies
  'consistency': (precond.consistency, 0.002),
  'trigflow': (precond.trigflow, 0.0),
  'two_time': (lambda n: precond.two_time(n._replace(num_times=2)), 0.0),
}
SAMPLERS = {
  'one_step': (samplers.one_step(), 1),  # and how often it evaluates the network
  'multistep': (samplers.multistep(sigmas=(80.0, 5.0, 0.8)), 3),
  'phased': (samplers.phased(edges=(1.0, 5.0), skip=0.9), 3),
  'flow_map': (samplers.flow_map(sigmas=(80.0, 1.0)), 2),
  'trigflow': (samplers.trigflow(), 2),
  'published': (samplers.published(name='cd_cifar10'), 2),
  'ode': (diffusion_samplers.ode(num_steps=18), 35),
  'stochastic': (diffusion_samplers.stochastic(num_steps=18), 35),
  'ddim': (diffusion_samplers.ddim(num_steps=18, eta=0.5), 18),
  'dpm_solver': (diffusion_samplers.dpm_solver(num_steps=18), 18),
  # Three of the six noise levels of this grid are in the interval.
  'classifier_free': (
    guidance.classifier_free(
      sampler=diffusion_samplers.ddim(num_steps=6),
      guidance=2.0,
      sigma_low=0.5,
      sigma_high=30.0,
    ),
    9,
  ),
  'autoguidance': (
    guidance.autoguidance(sampler=samplers.multistep(sigmas=(80.0, 0.8)), guidance=2.0),
    4,
  ),
}
# Samplers of a model of two times; the others take any.
TWO_TIME = {'flow_map'}


def public_functions(module, returns):
  return {
    name
    for name, value in inspect.getmembers(module, inspect.isfunction)
    if value.__module__ == module.__name__
    and inspect.signature(value).return_annotation is returns
    and not name.startswith('_')
  }


def folder_members(folder, returns):
  members = set()
  for path in (ROOT / 'cmjax' / folder).glob('[a-z]*.py'):
    module = importlib.import_module(f'cmjax.{folder}.{path.stem}')
    found = public_functions(module, returns) - {'as_network'}
    members |= {f'{path.stem}:{name}' for name in found}
  return members


def test_every_member_has_a_row():
  assert folder_members('objectives', core.Loss) == set(OBJECTIVES)
  assert folder_members('networks', core.Network) == {n.split()[0] for n in NETWORKS}
  assert public_functions(precond, core.Model) == set(PRECONDITIONERS)
  of_samplers = (samplers, diffusion_samplers, guidance)
  returned = [public_functions(module, samplers.Sampler) for module in of_samplers]
  assert set().union(*returned) == set(SAMPLERS)


# Objectives ------------------------------------------------------------------------

SHAPE, CLASSES, BATCH = (4, 4, 1), 3, 8


def small_model(name, labels=True, **keywords):
  """A small network in the form that its objective needs, and weights of order one."""
  family = name.partition(':')[0]
  num_times = 2 if family == 'flow_map' else 1
  network = mlp.mlp(
    width=16,
    num_blocks=1,
    embedding=8,
    num_times=num_times,
    log_weight=family == 'trigflow',
    **keywords,
  )
  c_noise = jnp.zeros((1, num_times) if num_times > 1 else 1)
  cond = jnp.zeros((1, CLASSES)) if labels else None
  params = some_params(network, jnp.zeros((1, *SHAPE)), c_noise, cond)
  return FORMS.get(family, precond.edm)(network), params


def some_params(net, x, c_noise, cond, dtype=jnp.float32):
  """Parameters of order one, so that nothing vanishes by chance or by its zeros."""
  draw = np.random.default_rng(1)

  def some(path, a):
    spread = np.prod(a.shape[:-1]) ** -0.5 if a.ndim > 1 else 0.1
    around = 1.0 if 'scale' in jax.tree_util.keystr(path) else 0.0
    return jnp.asarray(around + spread * draw.normal(size=a.shape), dtype)

  shapes = jax.eval_shape(net.init, jax.random.key(0), x, c_noise, cond)
  return jax.tree.map_with_path(some, shapes)


def a_batch(seed=2):
  x0 = jnp.clip(0.5 * jax.random.normal(jax.random.key(seed), (BATCH, *SHAPE)), -1, 1)
  cond = jax.nn.one_hot(jnp.arange(BATCH) % CLASSES, CLASSES)
  return core.Batch(x0, cond, jnp.arange(BATCH))


def a_reference(labels=True):
  """As many more examples as in a batch, of the same classes."""
  x0 = np.random.default_rng(4).normal(size=(2 * BATCH, *SHAPE)).astype(np.float32)
  classes = np.arange(2 * BATCH) % CLASSES if labels else None
  source = Source(
    'noise', 0.5 * x0, classes, CLASSES * labels, -9.0, 9.0, 0.0, 1.0, False
  )
  return fields.Reference(*map(jnp.asarray, reference(source)))


def keys():
  return core.streams(jax.random.key(3), ONE_STEP)


@pytest.fixture(params=OBJECTIVES, scope='module')
def objective(request):
  f, params = small_model(request.param, dropout=0.5)
  loss = OBJECTIVES[request.param](f)
  nets = core.Nets(params, params, params, reference=a_reference())
  return jax.jit(loss), nets


def test_objective_gives_one_finite_number_an_example(objective):
  loss, nets = objective
  out = loss(nets, a_batch(), ONE_STEP, keys())
  assert out.loss.shape == (BATCH,)
  assert out.loss.dtype == jnp.float32
  assert np.all(np.isfinite(out.loss))
  assert 'sigma' in out.aux
  assert all(v.shape == (BATCH,) for v in out.aux.values())


def test_objective_is_a_function_of_its_arguments_alone(objective):
  loss, nets = objective
  first = loss(nets, a_batch(), ONE_STEP, keys()).loss
  np.testing.assert_array_equal(first, loss(nets, a_batch(), ONE_STEP, keys()).loss)
  other = core.streams(jax.random.key(4), ONE_STEP)
  assert not np.array_equal(first, loss(nets, a_batch(), ONE_STEP, other).loss)


def test_objective_keeps_examples_apart(objective):
  loss, nets = objective
  batch = a_batch()
  first = loss(nets, batch, ONE_STEP, keys()).loss
  changed = batch._replace(x0=batch.x0.at[3].add(0.1))
  second = loss(nets, changed, ONE_STEP, keys()).loss
  same = np.delete(np.arange(BATCH), 3)
  np.testing.assert_array_equal(first[same], second[same])
  assert first[3] != second[3]


def test_objective_differentiates_only_the_online_network(objective):
  loss, nets = objective

  def mean(nets):
    return jnp.mean(loss(nets, a_batch(), ONE_STEP, keys()).loss)

  gradient = jax.jit(jax.grad(mean, allow_int=True))(nets)
  online = jax.tree.leaves(gradient.online)
  assert all(np.all(np.isfinite(g)) for g in online)
  assert any(np.any(g != 0) for g in online)
  for frozen in (gradient.target, gradient.teacher, gradient.reference):
    leaves = (g for g in jax.tree.leaves(frozen) if g.dtype != jax.dtypes.float0)
    assert all(np.all(g == 0) for g in leaves)


# Those that save an evaluation where the two are one network.
@pytest.mark.parametrize('name', ['continuous:ct', 'trigflow:sct'])
def test_without_a_target_network_the_target_is_the_online_one(name):
  f, params = small_model(name)
  loss = OBJECTIVES[name](f)

  @jax.jit
  @jax.grad
  def gradient(params, target):
    nets = core.Nets(params, target, params, reference=a_reference())
    return jnp.mean(loss(nets, a_batch(), ONE_STEP, keys()).loss)

  for a, b in zip(*(jax.tree.leaves(gradient(params, t)) for t in (None, params))):
    # The same mathematics in another order of operations, float32.
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(b))))


CENTRE = 0.25


def exact_of_one_point(name):
  """A model that is exact for data that is one point, where its parameter is 1."""

  def off(params, x):
    return (params - 1.0) * x

  def angle(params, x, t, cond, *, key=None):
    t = core.expand(t, x)
    return (jnp.cos(t) * x - CENTRE / 0.5) / jnp.sin(t) + off(params, x)

  def velocity(params, x, c_noise, cond, *, key=None):
    return (x - CENTRE) / core.expand(c_noise[:, 0], x) + off(params, x)

  def data_itself(params, x, t, cond, *, key=None):
    return CENTRE + off(params, x)

  family = name.partition(':')[0]
  if family == 'trigflow':
    return precond.trigflow(core.Network(None, angle))
  if family == 'flow_map':
    return precond.two_time(core.Network(None, velocity, num_times=2))
  return data_itself


@pytest.mark.parametrize('name', OBJECTIVES)
def test_objective_leaves_nothing_to_learn_at_the_truth(name, x64):
  loss = OBJECTIVES[name](exact_of_one_point(name))
  batch = a_batch()._replace(x0=jnp.full((BATCH, *SHAPE), CENTRE))
  reference = a_reference()
  reference = reference._replace(examples=jnp.full_like(reference.examples, CENTRE))

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradient_and_losses(params):
    nets = core.Nets(params, params, params, reference=reference)
    losses = loss(nets, batch, ONE_STEP, keys()).loss
    return jnp.sum(losses), losses

  gradient, losses = gradient_and_losses(1.0)
  # Measured 1e-10 for pd, whose levels are float32 in any mode; else 1e-27 at most.
  np.testing.assert_allclose(losses, np.zeros(BATCH), atol=1e-9)
  assert np.isfinite(gradient)
  assert np.all(gradient_and_losses(1.1)[1] > 1e-7)


@pytest.mark.parametrize(
  'build',
  [
    lambda f, d: consistency.ect(
      f, times=LOGNORMAL, relative_gap=GAP, distance=d, weighting=weightings.uniform()
    ),
    lambda f, d: continuous.theorem3(
      f, f, times=LOGNORMAL, distance=d, weighting=weightings.uniform()
    ),
    lambda f, d: continuous.cd(
      f, f, times=LOGNORMAL, distance=d, weighting=weightings.uniform()
    ),
    lambda f, d: progressive.pd(
      f,
      num_steps=schedules.constant(value=4.0),
      distance=d,
      weighting=weightings.uniform(),
    ),
  ],
  ids=['ect', 'theorem3', 'continuous cd', 'pd'],
)
def test_objective_takes_a_distance_with_a_network(build):
  f, params = small_model('consistency:ect', labels=False)

  def measure(features, a, b):  # of a network with dead features
    def look(x):
      x = jnp.reshape(x, (len(x), -1))
      return jax.nn.relu(jnp.matmul(x, features))

    return jnp.sum((look(a) - look(b)) ** 2, axis=1)

  loss = build(f, distances.Distance(measure, degree=2, perceptual=True))
  batch = a_batch()._replace(cond=None)

  @jax.jit
  @jax.value_and_grad
  def mean(params, features):
    nets = core.Nets(params, jax.lax.stop_gradient(params), params, features)
    return jnp.mean(loss(nets, batch, ONE_STEP, keys()).loss)

  features = jax.random.normal(jax.random.key(11), (16, 5))
  value, gradient = mean(params, features)
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
  assert any(np.any(g != 0) for g in jax.tree.leaves(gradient))
  other = mean(params, 2.0 * features)[1]
  for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(gradient)):
    # Features are an argument: twice as long, four times the squared difference.
    np.testing.assert_allclose(a, 4 * b, rtol=1e-4, atol=1e-6)
  with pytest.raises(ValueError, match='parameters of its network'):
    jax.eval_shape(mean, params, None)


# t, and r / t.
EXTREMES = [(1e-3, 0.9), (300.0, 0.9), (1e-3, 0.0), (300.0, 0.0)]
# Heun's step needs the field at r: such pairs have r > 0.
NEVER_CLEAN = {'consistency:cd'}


@pytest.mark.parametrize('name', OBJECTIVES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_objective_stays_finite_at_extreme_times(name, dtype, monkeypatch):
  f, params = small_model(name, dtype=dtype)
  at = dict(t=1.0, ratio=0.9)  # read when it is traced: compiled once for all

  def pairs(key, n, step):
    return jnp.full(n, at['t']), jnp.full(n, at['ratio'] * at['t'])

  def in_unit_time(key, n, step):
    t = jnp.full(n, jnp.minimum(at['t'], 1.0))
    return t, at['ratio'] * t

  monkeypatch.setitem(globals(), 'LOGNORMAL', lambda key, n: jnp.full(n, at['t']))
  monkeypatch.setitem(globals(), 'GAP', lambda step: 1.0 - at['ratio'])
  monkeypatch.setitem(globals(), 'GRID', pairs)
  monkeypatch.setitem(globals(), 'TWO_TIMES', in_unit_time)
  loss = OBJECTIVES[name](f)

  @jax.jit
  @jax.value_and_grad
  def mean(params, t, ratio):
    at.update(t=t, ratio=ratio)
    still = jax.lax.stop_gradient(params)
    nets = core.Nets(params, still, still, reference=a_reference())
    return jnp.mean(loss(nets, a_batch(), ONE_STEP, keys()).loss)

  for t, ratio in EXTREMES:
    if ratio > 0 or name not in NEVER_CLEAN:
      value, gradient = mean(params, t, ratio)
      assert np.isfinite(value), (t, ratio)
      for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf)), (t, ratio)


# Networks --------------------------------------------------------------------------


def inputs(net, shape, dtype=jnp.float32):
  x = jax.random.normal(jax.random.key(5), (4, *shape), dtype)
  c_noise = jnp.linspace(-1.5, 1.1, 4 * net.num_times, dtype=dtype)
  c_noise = c_noise if net.num_times == 1 else jnp.reshape(c_noise, (4, net.num_times))
  return x, c_noise, jax.nn.one_hot(jnp.arange(4) % CLASSES, CLASSES, dtype=dtype)


@pytest.fixture(params=NETWORKS, scope='module')
def network(request):
  """A compiled network with dropout, its parameters, and inputs for it."""
  build, shape = NETWORKS[request.param]
  net = build(dropout=0.5)
  arguments = inputs(net, shape)
  params = some_params(net, *arguments)
  return build, jax.jit(net.apply), params, arguments


def test_network_is_deterministic_without_a_key_and_drops_with_one(network):
  _, apply, params, arguments = network
  plain = apply(params, *arguments)
  assert plain.shape == arguments[0].shape
  np.testing.assert_array_equal(plain, apply(params, *arguments))
  dropped = apply(params, *arguments, key=jax.random.key(1))
  again = apply(params, *arguments, key=jax.random.key(1))
  other = apply(params, *arguments, key=jax.random.key(2))
  np.testing.assert_array_equal(dropped, again)
  assert not np.array_equal(dropped, plain)
  assert not np.array_equal(dropped, other)


def test_network_uses_noise_level_and_label_and_keeps_examples_apart(network):
  _, apply, params, (x, c_noise, cond) = network
  plain = apply(params, x, c_noise, cond)
  for changed in (
    (x.at[2].add(0.5), c_noise, cond),
    (x, c_noise.at[2].add(0.5), cond),
    (x, c_noise, cond.at[2].set(cond[1])),
  ):
    assert rows_that_differ(plain, apply(params, *changed)) == [2]


def rows_that_differ(a, b):
  return [i for i in range(len(a)) if not np.array_equal(a[i], b[i])]


BUILDERS = [name for name in NETWORKS if ' ' not in name]


@pytest.mark.parametrize('name', BUILDERS)
def test_network_of_two_times_tells_them_apart(name):
  build, shape = NETWORKS[name]
  net = build(num_times=2)
  x, c_noise, cond = inputs(net, shape)
  params = some_params(net, x, c_noise, cond)
  apply = jax.jit(net.apply)
  plain = apply(params, x, c_noise, cond)
  assert plain.shape == x.shape
  others = [apply(params, x, c_noise.at[2, i].add(0.5), cond) for i in range(2)]
  others.append(apply(params, x, c_noise.at[2].set(c_noise[2, ::-1]), cond))
  for i, other in enumerate(others):
    assert rows_that_differ(plain, other) == [2]
    assert all(rows_that_differ(other, one) for one in others[:i])


@pytest.mark.parametrize('name', BUILDERS)
def test_network_may_have_a_learned_weighting(name):
  build, shape = NETWORKS[name]
  net, plain = build(log_weight=True), build()
  arguments = inputs(net, shape)
  fresh = jax.jit(lambda: net.init(jax.random.key(0), *arguments)[core.LOG_WEIGHT])()
  c_noise = arguments[1]
  first = net.log_weight({core.LOG_WEIGHT: fresh}, c_noise)
  assert np.all(first == 0) != (name in WEIGHTED_AT_FIRST)
  params = some_params(net, *arguments)
  values = net.log_weight(params, c_noise)
  assert len(np.unique(values)) == 4  # one at each noise level
  gradient = jax.grad(lambda p: jnp.sum(net.log_weight(p, c_noise)))(params)
  assert np.any(gradient.pop(core.LOG_WEIGHT) != 0)
  assert all(np.all(g == 0) for g in jax.tree.leaves(gradient))
  # The rest is the network without it.
  without = jax.eval_shape(plain.init, jax.random.key(0), *arguments)
  assert jax.tree.structure(without) == jax.tree.structure(gradient)
  assert plain.log_weight is None
  out = jax.eval_shape(net.apply, params, *arguments)
  assert out.shape == arguments[0].shape


@pytest.mark.parametrize('name', BUILDERS)
@pytest.mark.parametrize(
  'given', [dict(num_times=0), dict(num_times=2, log_weight=True)]
)
def test_network_refuses_an_invalid_number_of_times(name, given):
  with pytest.raises(ValueError, match=f'num_times.*{given["num_times"]}'):
    NETWORKS[name][0](**given)


def test_network_with_labels_refuses_to_go_without(network):
  _, apply, params, (x, c_noise, _) = network
  with pytest.raises(ValueError, match='trained with labels'):
    apply(params, x, c_noise, None)


def test_network_computes_in_its_dtype_and_keeps_float32_parameters(network):
  build, apply, params, arguments = network
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
  half = build(dropout=0.5, dtype='bfloat16')
  kept = jax.eval_shape(half.init, jax.random.key(0), *arguments)
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(kept))
  rough, exact = jax.jit(half.apply)(params, *arguments), apply(params, *arguments)
  assert (rough.dtype, exact.dtype) == (jnp.bfloat16, jnp.float32)
  error = jnp.linalg.norm(rough.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
  assert 1e-5 < error < 0.05  # bfloat16 keeps 8 bits, 4e-3, through a dozen layers


@pytest.mark.parametrize('name', NETWORKS)
def test_network_jvp_is_the_central_difference(name, x64):
  build, shape = NETWORKS[name]
  net = build(dropout=0.3, dtype='float64')
  x, c_noise, cond = inputs(net, shape, jnp.float64)
  params = some_params(net, x, c_noise, cond, jnp.float64)
  direction = jax.random.normal(jax.random.key(6), x.shape, x.dtype)

  @jax.jit
  def along(h):
    key = jax.random.key(7)  # the same mask at every point
    return net.apply(params, x + h * direction, c_noise + h, cond, key=key)

  # Lowered, not only traced: a custom_vjp without a jvp fails only there.
  tangent = jax.jit(lambda: jax.jvp(along, (0.0,), (1.0,))[1])()
  h = 1e-5  # error h^2 f'''/6 ~ 1e-9, rounding 1e-16 / h ~ 1e-11
  difference = (along(h) - along(-h)) / (2 * h)
  assert np.linalg.norm(tangent) > 1e-3
  np.testing.assert_allclose(tangent, difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('name', UNETS)
def test_every_attention_and_remat_compute_the_same(name):
  build, shape = NETWORKS[name]
  build = functools.partial(build, channel_mult=(1,), attention_resolutions=shape[:1])
  net = build()
  arguments = inputs(net, shape)
  params = some_params(net, *arguments)

  def gradient_of_jvp(net):
    @jax.jit
    @jax.value_and_grad
    def loss(params):
      x, c_noise, cond = arguments
      point = (x, c_noise), (jnp.ones_like(x), jnp.ones_like(c_noise))
      y, dy = jax.jvp(lambda x, c: net.apply(params, x, c, cond), *point)
      return jnp.mean(y**2) + jnp.mean(dy**2)

    return loss(params)

  expected = gradient_of_jvp(net)
  for other in (
    build(attention_implementation='chunked', remat=True),
    build(attention_implementation='fused'),
  ):
    init = jax.eval_shape(other.init, jax.random.key(0), *arguments)
    assert jax.tree.structure(init) == jax.tree.structure(params)
    for a, b in zip(*map(jax.tree.leaves, (gradient_of_jvp(other), expected))):
      # The same mathematics in another order of operations, float32.
      atol = 1e-4 * float(jnp.max(jnp.abs(b)))
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=atol)


# Preconditioners and samplers ------------------------------------------------------


@pytest.mark.parametrize('name', PRECONDITIONERS)
def test_preconditioner_is_the_identity_at_its_boundary(name):
  build, boundary = PRECONDITIONERS[name]

  def wild(params, x, c_noise, cond, *, key=None):
    return 1e3 * jnp.ones_like(x)

  f = build(core.Network(None, wild))
  x = jax.random.normal(jax.random.key(8), (4, *SHAPE))
  t = jnp.full(4, max(boundary, 1e-30))
  np.testing.assert_array_equal(f(None, x, t, None), x)
  away = f(None, x, jnp.full(4, 1.0), None)
  assert np.all(np.abs(away) > 100)


@pytest.mark.parametrize('name', PRECONDITIONERS)
def test_preconditioner_nears_its_boundary_in_first_order(name, x64):
  build, boundary = PRECONDITIONERS[name]

  def some(params, x, c_noise, cond, *, key=None):
    return 1e3 * jnp.ones_like(x)

  f = build(core.Network(None, some))
  x = jax.random.normal(jax.random.key(8), (4, *SHAPE))
  far, near = (
    jnp.linalg.norm(f(None, x, jnp.full(4, boundary + h), None) - x)
    for h in (1e-4, 1e-5)
  )
  # The next terms are of the relative size of t, at most 0.002 + 1e-4.
  assert far / near == pytest.approx(10, rel=5e-3)


@pytest.mark.parametrize('name', PRECONDITIONERS)
def test_preconditioner_is_float32_outside_a_bfloat16_network(name):
  build, _ = PRECONDITIONERS[name]
  num_times = 2 if name == 'two_time' else 1
  network = mlp.mlp(
    width=16, num_blocks=1, embedding=8, num_times=num_times, dtype='bfloat16'
  )
  x, t = jnp.ones((2, *SHAPE)), jnp.ones(2)
  params = some_params(network, x, t if num_times == 1 else jnp.ones((2, 2)), None)
  assert build(network)(params, x, t, None).dtype == jnp.float32


@pytest.mark.parametrize('name', SAMPLERS)
def test_sampler_counts_its_evaluations_and_keeps_samples_apart(name):
  sampler, evaluations = SAMPLERS[name]
  calls = []

  def apply(params, x, c_noise, cond, *, key=None):
    calls.append(len(x))
    assert c_noise.shape == ((len(x), 2) if name in TWO_TIME else (len(x),))
    assert key is None
    return params * x / (1 + jnp.reshape(c_noise, (len(x), -1))[:, :1] ** 2)

  if name in TWO_TIME:
    f = precond.two_time(core.Network(None, apply, num_times=2))
  else:
    f = precond.edm(core.Network(None, apply))
  cond, params = None, 0.5
  if name == 'classifier_free':
    cond = jnp.eye(4)
  if name == 'autoguidance':
    f, params = guidance.WithGuide(f, f), guidance.GuidedParams(0.5, 0.4)
  keys = jax.random.split(jax.random.key(9), 4)
  with jax.disable_jit():  # so that a scan calls f as often as it runs
    out = sampler(f, params, keys, cond, (3,))
  assert out.evaluations == len(calls) == evaluations
  assert out.x.shape == (4, 3)
  cond = None if cond is None else cond[1:3]
  fewer = sampler(f, params, keys[1:3], cond, (3,))
  # Not bit-equal: compiled and plain arithmetic may round differently.
  np.testing.assert_allclose(out.x[1:3], fewer.x, rtol=1e-4, atol=1e-6)
