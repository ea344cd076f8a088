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
)
from cmjax.networks import mlp
from cmjax.objectives import discrete

ORACLE = oracles.gaussian(np.array([0.3, -0.2]), 0.4)
SQUARED = dict(distance=distances.squared_l2(), weighting=distances.uniform())


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


def on_pair(f, nets, x0, z, t, r, key=None, **choices):
  field = fields.conditional(process.VE, x0, z)
  x_t = process.point(process.VE, x0, z, t)
  choices = dict(solver=solvers.euler) | SQUARED | choices
  return discrete.pair(f, nets, field, x_t, t, r, None, key, **choices)


@pytest.mark.parametrize('c', [0.0, 0.03, 0.7])
def test_a_pair_of_equal_times_has_exactly_no_loss_under_dropout(c):
  network = mlp.mlp(width=16, blocks=1, embedding=8, dropout=0.5)
  shapes = jax.eval_shape(
    network.init, jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1), None
  )
  draw = np.random.default_rng(1)
  params = jax.tree.map(lambda a: jnp.asarray(draw.normal(size=a.shape)), shapes)
  f, nets, t = precond.edm(network), core.Nets(params, params), jnp.full(16, 0.9)

  def loss(params, r):
    metric = dict(
      distance=distances.pseudo_huber(c=c), weighting=distances.edm_weighting()
    )
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
    scaled, core.Nets(2.0, 0.5), x0, z, t, r, weighting=distances.inverse_gap()
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
  np.testing.assert_allclose(found[::2], to_data[::2], rtol=1e-5)  # x_t - t z rounds
  assert np.all(np.abs(found[1::2] - to_data[1::2]) > 1e-3)
  assert np.isfinite(jax.grad(lambda p: jnp.sum(loss(p)))(2.0))


def test_ect_draws_the_pairs_of_its_gap():
  gap = schedules.shrinking_gap(q=2.0, stage_images=10, batch_size=1)
  loss = discrete.ect(
    scaled, times=times.lognormal(mean=-1.1, std=2.0), gap=gap, **SQUARED
  )
  batch = core.Batch(draws(64)[0], None)
  for step, share in ((0, 0.5), (10, 0.25), (35, 1 / 16)):
    out = loss(core.Nets(1.0, 1.0), batch, step, core.streams(jax.random.key(0), step))
    t = out.aux['t']
    expected = jnp.minimum(t, t * (1 + 8 * jax.nn.sigmoid(-t)) * share)
    np.testing.assert_allclose(out.aux['gap'], expected, rtol=1e-4, atol=1e-7)


def test_ct_pairs_are_neighbours_and_its_target_is_the_target_network():
  bins = schedules.constant(value=18.0)
  loss = discrete.ct(scaled, pairs=times.karras_pairs(bins=bins), **SQUARED)
  keys = core.streams(jax.random.key(0), 0)
  batch = core.Batch(draws(64)[0], None)
  out = loss(core.Nets(1.0, 1.0), batch, 0, keys)
  grid = np.asarray(times.karras(18))
  at = np.argmin(np.abs(grid[:, None] - np.asarray(out.aux['t'])[None]), axis=0)
  np.testing.assert_allclose(out.aux['gap'], grid[at] - grid[at + 1], rtol=1e-3)
  other = loss(core.Nets(1.0, 0.9), batch, 0, core.streams(jax.random.key(0), 0))
  assert np.all(out.loss != other.loss)


def test_cd_with_exact_teacher_and_map_errs_by_the_third_power_of_a_heun_step(x64):
  worst = []
  for n in (64, 128, 256):
    pairs = times.karras_pairs(bins=schedules.constant(value=float(n)))
    loss = discrete.cd(exact_map, exact_denoiser, pairs=pairs, **SQUARED)
    x0 = oracles.sample(ORACLE, jax.random.key(1), 4096).astype(jnp.float64)
    keys = core.streams(jax.random.key(2), 0)
    out = loss(core.Nets(None, None), core.Batch(x0, None), 0, keys)
    worst.append(np.max(out.aux['defect']))
  orders = np.log2(np.array(worst[:-1]) / worst[1:])
  np.testing.assert_allclose(orders, 3.0, atol=0.25)  # the worst of 4,096 draws
