"""The pair kernel and its builders, against oracles and formulas written out."""

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
from cmjax.core import expand
from cmjax.data.reference import reference
from cmjax.data.source import Source
from cmjax.networks import mlp
from cmjax.objectives import consistency
from cmjax.runtime.config import load
from tests.conftest import ROOT

ORACLE = oracles.gaussian(np.array([0.3, -0.2]), 0.4)
MIXTURE = oracles.Mixture(
  np.array([0.5, 0.3, 0.2]),
  np.array([[0.7, 0.1], [-0.5, 0.4], [0.0, -0.6]]),
  np.array([0.3, 0.25, 0.4]),
)
SQUARED = dict(distance=distances.squared_l2(), weighting=weightings.uniform())


def exact_map(params, x, t, cond, *, key=None):
  return oracles.consistency(ORACLE, x, t, 0.002)


def exact_denoiser(params, x, t, cond, *, key=None):
  return oracles.denoiser(ORACLE, x, t)


def scaled(params, x, t, cond, *, key=None):
  """A model whose parameter shows in what it returns; not a number at t = 0."""
  return params * x / (1 + jnp.log(core.expand(t, x)) ** 2)


def draws(n=16, dtype=jnp.float32):
  draw = np.random.default_rng(0)
  return [jnp.asarray(draw.normal(size=(n, 2)), dtype) for _ in range(2)]


def losses(loss, nets, batch):
  """What an objective gives at step 3, with the keys of that step."""
  return jax.jit(loss)(nets, batch, 3, core.streams(jax.random.key(1), 3))


def on_pair(f, nets, x0, z, t, r, key=None, **choices):
  x_t, x_r = (process.perturb(process.VE, x0, z, s) for s in (t, r))
  noisy = core.Noisy(x_t, t, None, key)
  return consistency.pair_loss(f, nets, noisy, x_r, r, **SQUARED | choices)


@pytest.mark.parametrize('c', [0.0, 0.03, 0.7])
def test_a_pair_of_equal_times_has_exactly_no_loss_under_dropout(c):
  network = mlp.mlp(width=16, num_blocks=1, embedding=8, dropout=0.5)
  shapes = jax.eval_shape(
    network.init, jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1), None
  )
  draw = np.random.default_rng(1)
  params = jax.tree.map(lambda a: jnp.asarray(draw.normal(size=a.shape)), shapes)
  f, nets, t = precond.edm(network), core.Nets(params, params), jnp.full(16, 0.9)

  def loss(params, r):
    metric = dict(distance=distances.pseudo_huber(c=c), weighting=weightings.edm())
    nets = core.Nets(params, jax.lax.stop_gradient(params))
    return on_pair(f, nets, *draws(), t, r, jax.random.key(2), **metric).loss

  assert np.all(loss(nets.online, t) == 0)
  gradient = jax.grad(lambda p: jnp.sum(loss(p, t)))(params)
  assert all(np.all(g == 0) for g in jax.tree.leaves(gradient))
  # The mask is there: without it, or at another r, the outputs differ.
  assert np.all(loss(nets.online, 0.5 * t) > 0)
  x = draws()[0]
  plain, dropped = (f(params, x, t, None, key=k) for k in (None, jax.random.key(2)))
  assert not np.allclose(plain, dropped)


def test_the_loss_is_the_weighted_distance_to_the_target_network():
  x0, z = draws()
  t, r = jnp.linspace(0.5, 3.0, 16), jnp.linspace(0.2, 2.0, 16)
  out = on_pair(
    scaled, core.Nets(2.0, 0.5), x0, z, t, r, weighting=weightings.inverse_gap()
  )
  a, b, t, r = (np.asarray(v, np.float64) for v in (x0, z, t, r))
  y = 2.0 * (a + t[:, None] * b) / (1 + np.log(t)[:, None] ** 2)
  target = 0.5 * (a + r[:, None] * b) / (1 + np.log(r)[:, None] ** 2)
  squared = np.sum((y - target) ** 2, axis=1)
  np.testing.assert_allclose(out.loss, squared / (t - r), rtol=1e-4)  # float32
  np.testing.assert_allclose(out.aux['defect'], np.sqrt(squared), rtol=1e-4)
  np.testing.assert_allclose(out.aux['gap'], t - r, rtol=1e-5)


def test_where_r_is_zero_the_target_is_the_data_and_nothing_is_nan():
  x0, z = draws()
  t = jnp.full(16, 0.9)
  r = jnp.where(jnp.arange(16) % 2 == 0, 0.0, 0.3)

  def loss(online):
    return on_pair(scaled, core.Nets(online, 5.0), x0, z, t, r).loss

  y = scaled(2.0, x0 + 0.9 * z, t, None)
  to_data = distances.squared_l2()(y, x0)
  found = loss(2.0)
  np.testing.assert_allclose(
    found[::2], to_data[::2], rtol=1e-5
  )  # two float32 roundings
  assert np.all(np.abs(found[1::2] - to_data[1::2]) > 1e-3)
  assert np.isfinite(jax.grad(lambda p: jnp.sum(loss(p)))(2.0))


def test_ect_draws_the_pairs_of_its_gap():
  gap = schedules.relative_gap(q=2.0, stage_images=10, batch_size=1)
  loss = consistency.ect(
    scaled, times=times.lognormal(mean=-1.1, std=2.0), relative_gap=gap, **SQUARED
  )
  batch = core.Batch(draws(64)[0], None)
  for step, fraction in ((0, 0.5), (10, 0.25), (35, 1 / 16)):
    out = loss(core.Nets(1.0, 1.0), batch, step, core.streams(jax.random.key(0), step))
    t = out.aux['sigma']
    expected = jnp.minimum(t, t * (1 + 8 * jax.nn.sigmoid(-t)) * fraction)
    np.testing.assert_allclose(out.aux['gap'], expected, rtol=1e-4, atol=1e-7)


def test_ct_pairs_are_neighbours_and_its_target_is_the_target_network():
  num_scales = schedules.constant(value=18.0)
  loss = consistency.ct(
    scaled, pairs=times.karras_pairs(num_scales=num_scales), **SQUARED
  )
  keys = core.streams(jax.random.key(0), 0)
  batch = core.Batch(draws(64)[0], None)
  out = loss(core.Nets(1.0, 1.0), batch, 0, keys)
  grid = np.asarray(times.karras(18))
  at = np.argmin(np.abs(grid[:, None] - np.asarray(out.aux['sigma'])[None]), axis=0)
  np.testing.assert_allclose(out.aux['gap'], grid[at] - grid[at + 1], rtol=1e-3)
  other = loss(core.Nets(1.0, 0.9), batch, 0, core.streams(jax.random.key(0), 0))
  assert np.all(out.loss != other.loss)


# Improved consistency training -----------------------------------------------------


def test_ict_is_ct_with_its_parts_written_out():
  num_scales = schedules.doubling_num_scales(
    start=10, end=80, batch_size=1, total_images=40
  )
  written_out = consistency.ct(
    scaled,
    pairs=times.lognormal_pairs(num_scales=num_scales, mean=-1.1, std=2.0),
    distance=distances.pseudo_huber(c=0.03),
    weighting=weightings.inverse_gap(),
  )
  loss = consistency.ict(scaled, num_scales=num_scales, c=0.03)
  batch = core.Batch(draws(64)[0], None)
  for step in (0, 35):
    arguments = core.Nets(1.0), batch, jnp.int32(step)
    found, expected = (
      f(*arguments, core.streams(jax.random.key(0), step)) for f in (loss, written_out)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
      np.testing.assert_array_equal(a, b)
    assert np.all(found.loss > 0)


def test_ict_passes_on_its_grid_and_its_num_scales():
  grid = dict(sigma_min=0.1, sigma_max=2.0, rho=3.0)
  loss = consistency.ict(
    scaled, num_scales=schedules.constant(value=4.0), c=0.03, mean=2.0, std=0.4, **grid
  )
  keys = core.streams(jax.random.key(0), 0)
  out = loss(core.Nets(1.0), core.Batch(draws()[0], None), 0, keys)
  # A mean of ln t so far up leaves the noisiest of three bins but 4e-4.
  top = times.karras(4, **grid)[:2]
  np.testing.assert_allclose(out.aux['sigma'], np.full(16, top[0]), rtol=1e-5)
  np.testing.assert_allclose(out.aux['gap'], np.full(16, top[0] - top[1]), rtol=1e-4)


@pytest.mark.parametrize(
  ('name', 'features'), [('toy2d', 2), ('digits', 64), ('cifar10', 3072)]
)
def test_configs_of_ict_grow_c_with_the_features(name, features):
  c = load(ROOT / 'configs' / f'ict.py:{name}').objective.c
  digits = len(str(c)) - 2
  assert c == pytest.approx(0.00054 * features**0.5, abs=0.51 * 10**-digits)


# Consistency distillation ----------------------------------------------------------


def worst_defect(solver, n):
  """Of |f(x_r, r) - f(x_t, t)| at exact f and teacher, over a Karras grid of n points.

  At each point x_t lies at the same eight quantiles of its marginal.
  """
  z = np.random.default_rng(0).normal(size=(8, 1, 2))
  grid = np.asarray(times.karras(n))
  t, r = (np.resize(v, 1023) for v in (grid[:-1], grid[1:]))  # one shape for all n
  x_t = ORACLE.means + np.sqrt(0.4**2 + t[:, None] ** 2) * z

  @jax.jit
  def defect(x_t, t, r):
    x_r = solvers.by_name(solver)(oracles.field(ORACLE), x_t, t, r)
    noisy = core.Noisy(x_t, t, None, None)
    out = consistency.pair_loss(exact_map, core.Nets(None), noisy, x_r, r, **SQUARED)
    return out.aux['defect']

  return max(np.max(defect(x, t, r)) for x in x_t)


@pytest.mark.parametrize(('solver', 'power'), [('euler', 2), ('heun', 3)])
def test_the_defect_of_a_pair_falls_as_a_power_of_the_step(solver, power, x64):
  sizes = np.array([64, 128, 256, 512, 1024])
  defects = [worst_defect(solver, n) for n in sizes]
  orders = np.diff(np.log(defects)) / np.diff(-np.log(sizes - 1))
  # Measured 1.996 to 2.000, and 3.003 to 3.020: the next term is 2 % at 64 points.
  np.testing.assert_allclose(orders, np.full(4, power), atol=0.1)


@pytest.mark.parametrize('top', [10.0, 80.0])
@pytest.mark.parametrize(('solver', 'order'), [('euler', 1), ('heun', 2)])
def test_the_fixed_point_of_distillation_has_the_order_of_theorem_1(solver, order, top):
  with jax.enable_x64(True):
    # f(x_t, t) = f(x_r, r) along the grid, down to f(x, sigma_min) = x, composes the
    # solver's steps; here on a mixture, whose exact map is integrated.
    z = np.random.default_rng(0).normal(size=(16, 2))
    x = jnp.asarray(z) * np.sqrt(0.25 + top**2)
    exact = jax.jit(lambda x: oracles.consistency(MIXTURE, x, jnp.full(16, top)))(x)
    step, flow = solvers.by_name(solver), oracles.field(MIXTURE)

    @jax.jit
    def composed(x, grid):
      def one(x, pair):
        return step(flow, x, *(jnp.full(16, level) for level in pair)), None

      return jax.lax.scan(one, x, (grid[:-1], grid[1:]))[0]

    sizes = np.array([32, 64, 128, 256, 512])
    errors = [
      np.linalg.norm(composed(x, times.karras(n, sigma_max=top)) - exact) for n in sizes
    ]
    slope = np.polyfit(-np.log(sizes - 1), np.log(errors), 1)[0]
    # Measured 0.99 and 2.02: at 32 points the next term is 10 % of a Heun error.
    assert slope == pytest.approx(order, abs=0.1)
    assert errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize('solver', ['euler', 'heun'])
def test_cd_is_the_pair_along_the_guided_teacher_by_its_solver(solver, x64):
  def teacher(params, x, t, cond, *, key=None):
    assert key is None  # a teacher has no dropout
    return exact_denoiser(None, x, t, None) * params + cond[:, :2]

  grid = jnp.geomspace(80.0, 0.002, 17)

  def pairs(key, n, step):
    return jnp.resize(grid[:-1], n), jnp.resize(grid[1:], n)

  loss = consistency.cd(
    scaled, teacher, pairs=pairs, solver=solver, guidance=1.5, **SQUARED
  )
  x0, nets = draws(dtype=jnp.float64)[0], core.Nets(2.0, 0.5, teacher=0.9)
  out = losses(loss, nets, core.Batch(x0, jnp.ones((16, 3))))
  z = jax.random.normal(core.streams(jax.random.key(1), 3)['noise'], x0.shape)
  t, r = grid[:-1], grid[1:]
  x_t = process.perturb(process.VE, x0, z, t)

  def flow(x, t):  # of D_u + 1.5 (D_c - D_u)
    return (x - 0.9 * exact_denoiser(None, x, t, None) - 1.5) / expand(t, x)

  slope = flow(x_t, t)
  x_r = x_t + expand(r - t, x_t) * slope
  if solver == 'heun':
    x_r = x_t + expand(r - t, x_t) * (slope + flow(x_r, r)) / 2
  defect = scaled(2.0, x_t, t, None) - scaled(0.5, x_r, r, None)
  # Float64; the smallest t to divide by is 0.002.
  np.testing.assert_allclose(out.loss, jnp.sum(defect**2, axis=1), rtol=1e-9)


def test_cd_refuses_unknown_solvers():
  pairs = times.karras_pairs(num_scales=schedules.constant(value=18.0))
  with pytest.raises(ValueError, match="'euler' or 'heun', got 'rk4'"):
    consistency.cd(scaled, scaled, pairs=pairs, solver='rk4', **SQUARED)


# Stable consistency tuning ---------------------------------------------------------


def reference_of(x0, labels):
  """The examples f[N, ...] in buckets by their labels."""
  source = Source(
    'points', np.asarray(x0), labels, max(labels) + 1, -9.0, 9.0, 0.0, 1.0, False
  )
  return fields.Reference(*map(jnp.asarray, reference(source)))


def tuned(build, **choices):
  gap = schedules.constant(value=0.15)
  return build(
    scaled,
    times=times.lognormal(mean=-0.5, std=1.0),
    relative_gap=gap,
    distance=distances.pseudo_huber(c=0.03),
    weighting=weightings.inverse_gap(),
    **choices,
  )


def test_stable_ct_with_one_reference_example_is_ect(x64):
  x0 = draws(dtype=jnp.float64)[0]
  alone = reference_of(x0, np.arange(16))  # each example is a class of its own
  batch = core.Batch(x0, jnp.eye(16), jnp.arange(16))
  plain = losses(tuned(consistency.ect), core.Nets(2.0, 0.5), batch)
  nets = core.Nets(2.0, 0.5, reference=alone)
  found = losses(tuned(consistency.stable_ct, sigma_threshold=0.0), nets, batch)
  # (x_t - x0) / t for z: one rounding.
  np.testing.assert_allclose(found.loss, plain.loss, rtol=1e-11)
  together = reference_of(x0, np.arange(16) // 8)
  batch = batch._replace(cond=jax.nn.one_hot(jnp.arange(16) // 8, 2))
  nets = nets._replace(reference=together)
  other = losses(tuned(consistency.stable_ct, sigma_threshold=0.7), nets, batch)
  far = np.asarray(other.aux['sigma']) > 0.7
  assert 3 < np.sum(far) < 13
  np.testing.assert_allclose(other.loss[~far], plain.loss[~far], rtol=1e-11)
  assert np.all(np.abs(other.loss - plain.loss)[far] > 1e-6)


def test_stable_ct_steps_towards_the_mean_of_its_class(x64):
  x0 = draws(dtype=jnp.float64)[0]
  labels = np.arange(16) % 2
  nets = core.Nets(2.0, 0.5, reference=reference_of(x0, labels))
  batch = core.Batch(x0, jnp.eye(2)[labels], jnp.arange(16))
  z = jax.random.normal(core.streams(jax.random.key(1), 3)['noise'], x0.shape)
  out = losses(
    tuned(consistency.stable_ct, sigma_threshold=0.0, block_size=3), nets, batch
  )
  t = out.aux['sigma']
  r, x_t = t - out.aux['gap'], x0 + expand(t, z) * z
  means = jnp.stack(
    [
      oracles.denoiser(oracles.points(x0[labels == k]), x_t[i : i + 1], t[i : i + 1])
      for i, k in enumerate(labels)
    ]
  )[:, 0]
  x_r = means + expand(r / t, x_t) * (x_t - means)
  defect = scaled(2.0, x_t, t, None) - scaled(0.5, x_r, r, None)
  # Float64; r is read from t - gap.
  length = jnp.sqrt(jnp.sum(defect**2, axis=1))
  np.testing.assert_allclose(out.aux['defect'], length, rtol=1e-9)


def test_stable_ct_without_a_reference_set_is_refused():
  loss = tuned(consistency.stable_ct, sigma_threshold=0.0)
  batch = core.Batch(draws()[0], None, jnp.arange(16))
  with pytest.raises(ValueError, match='stable_ct needs a reference set'):
    loss(core.Nets(2.0), batch, 0, core.streams(jax.random.key(0), 0))


@pytest.mark.parametrize('edges', [(2.0, 0.5), (0.5, 0.5), (0.0, 1.0), (-1.0,)])
def test_edges_that_do_not_ascend_from_above_zero_are_refused(edges):
  with pytest.raises(ValueError, match='edges must'):
    tuned(consistency.stable_ct, sigma_threshold=0.0, edges=edges)


@pytest.mark.parametrize(
  'choices', [dict(sigma_threshold=-1.0), dict(sigma_threshold=0, block_size=0)]
)
def test_invalid_thresholds_and_block_sizes_are_refused(choices):
  with pytest.raises(ValueError, match=r'(sigma_threshold|block_size) must'):
    tuned(consistency.stable_ct, **choices)


EDGES = (0.3, 0.8, 2.0)


def lower_edge(t):
  """The edge below t; an edge itself belongs to the segment that it ends."""
  return np.array([max(s for s in (0.0, *EDGES) if s < level) for level in t])


@pytest.mark.parametrize('fraction', [1.0, 0.15])
def test_phased_pairs_stay_in_their_segment(fraction):
  level = np.array([0.05, 0.3, 0.31, 0.5, 0.8, 0.81, 1.2, 2.0, 2.01, 80.0], np.float32)
  loss = consistency.stable_ct(
    scaled,
    times=lambda key, n: jnp.resize(jnp.asarray(level), n),
    relative_gap=schedules.constant(value=fraction),
    sigma_threshold=1e9,
    edges=EDGES,
    **SQUARED,
  )
  x0 = draws(len(level))[0]
  nets = core.Nets(2.0, reference=reference_of(x0, np.zeros(len(level), int)))
  out = losses(loss, nets, core.Batch(x0, None, jnp.arange(len(level))))
  edge, t = lower_edge(level), out.aux['sigma']
  np.testing.assert_array_equal(t, level)
  free = np.asarray(times.neighbour(t, jnp.float32(fraction)))
  # r is read from the gap: float32, of the size of t.
  expected = level - np.maximum(free, edge)
  np.testing.assert_allclose(out.aux['gap'], expected, rtol=1e-5)
  assert np.all(out.aux['gap'] > 0)
  assert np.any(free > edge) == (fraction < 1)
  assert np.any(free < edge)


def test_the_phased_jump_is_the_identity_at_its_edge(x64):
  # With pairs as wide as their segment the target is the jump at its edge, which must
  # give x_s whatever the network says; the loss is then that of the jump's data.
  loss = consistency.stable_ct(
    scaled,
    times=times.lognormal(mean=0.0, std=1.0),
    relative_gap=schedules.constant(value=1.0),
    sigma_threshold=1e9,
    edges=EDGES,
    **SQUARED,
  )
  x0 = draws(dtype=jnp.float64)[0]
  nets = core.Nets(2.0, 1e3, reference=reference_of(x0, np.zeros(16, int)))
  out = losses(loss, nets, core.Batch(x0, None, jnp.arange(16)))
  t = np.asarray(out.aux['sigma'])
  s = lower_edge(t)
  assert len(set(s)) == 4
  z = jax.random.normal(core.streams(jax.random.key(1), 3)['noise'], x0.shape)
  y = scaled(2.0, x0 + expand(jnp.asarray(t), z) * z, jnp.asarray(t), None)
  # s / t x_t + (1 - s / t) y - x_s = (1 - s / t) (y - x0).
  expected = (1 - s / t) ** 2 * np.sum((np.asarray(y) - np.asarray(x0)) ** 2, axis=1)
  np.testing.assert_allclose(out.loss, expected, rtol=1e-9)


def test_a_heun_step_to_zero_is_refused():
  pairs = times.ect_pairs(
    times=times.lognormal(mean=-1.1, std=2.0),
    relative_gap=schedules.constant(value=0.5),
  )
  consistency.cd(scaled, scaled, pairs=pairs, solver='euler', **SQUARED)
  with pytest.raises(ValueError, match=r'needs pairs with 0 < r < t, got r=0 '):
    consistency.cd(scaled, scaled, pairs=pairs, **SQUARED)
