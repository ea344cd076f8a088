"""One step for two: targets written out, exact students, and what a stage hands on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import (
  core,
  distances,
  fields,
  oracles,
  process,
  schedules,
  solvers,
  times,
  weightings,
)
from cmjax.core import expand
from cmjax.objectives import progressive

STD = 0.4
ORACLE = oracles.gaussian(np.array([0.3, -0.2]), STD)
SQUARED = dict(distance=distances.squared_l2(), weighting=weightings.uniform())
GRID = dict(sigma_min=0.01, sigma_max=10.0, rho=3.0)


def wavy(params, x, t, cond, *, key=None):
  """A model whose parameter and label show, and that is not linear in x."""
  label = 0.0 if cond is None else cond[:, :1]
  return jnp.sin(params * x) / (1 + expand(t, x)) + label


def draws(n=16):
  """Noisy points, and three levels a row that descend."""
  draw = np.random.default_rng(0)
  t = np.geomspace(0.05, 20.0, n)
  fraction = draw.uniform(0.2, 0.9, size=(2, n))
  x = draw.normal(size=(n, 2)) * np.sqrt(0.25 + t[:, None] ** 2)
  return [
    jnp.asarray(v) for v in (x, t, fraction[0] * t, fraction[0] * fraction[1] * t)
  ]


def progressive_loss(f, nets, x, t, middle, r, cond=None, key=None, **choices):
  noisy = core.Noisy(x, t, cond, key)
  return progressive.progressive_loss(f, nets, noisy, middle, r, **SQUARED | choices)


def test_the_target_is_what_one_step_to_where_two_end_must_aim_at(x64):
  x, t, middle, r = draws()
  cond = jnp.eye(16)
  weighting = weightings.inverse_gap()
  out = progressive_loss(
    wavy, core.Nets(2.0, 0.5), x, t, middle, r, cond, weighting=weighting
  )
  x, t, middle, r = (np.asarray(v) for v in (x, t, middle, r))
  label = np.eye(16)[:, :1]
  columns = t[:, None], middle[:, None], r[:, None]

  def denoised(parameter, x, t):
    return np.sin(parameter * x) / (1 + t) + label

  x_middle = x + (columns[1] / columns[0] - 1) * (x - denoised(0.5, x, columns[0]))
  x_r = x_middle + (columns[2] / columns[1] - 1) * (
    x_middle - denoised(0.5, x_middle, columns[1])
  )
  target = x - columns[0] * (x_r - x) / (columns[2] - columns[0])
  squared = np.sum((denoised(2.0, x, columns[0]) - target) ** 2, axis=1)
  # Float64, with quotients of differences of levels no smaller than a tenth.
  np.testing.assert_allclose(out.loss, squared / (t - r), rtol=1e-10)
  np.testing.assert_allclose(out.aux['gap'], t - r, rtol=1e-12)
  np.testing.assert_array_equal(out.aux['sigma'], t)


def test_a_student_that_steps_where_its_teacher_ends_has_no_loss(x64):
  # Euler steps along a Gaussian's flow shrink x - mean by 1 - (t - r) t / (std^2 + t^2)
  # each; the student's denoiser is the one whose single step shrinks it by both.
  x, t, middle, r = draws()

  def shrink(t, r):
    return 1 - (t - r) * t / (STD**2 + t**2)

  def f(params, x, t, cond, *, key=None):
    teacher = oracles.denoiser(ORACLE, x, t)
    both = shrink(t, middle) * shrink(middle, r)
    slope = expand((both - 1) / (r - t), x) * (x - jnp.asarray(ORACLE.means))
    return jnp.where(params == 1, x - expand(t, x) * slope, teacher)

  # x of 20 and its mean cancel: 1e-15 squared.
  out = progressive_loss(f, core.Nets(1, 0), x, t, middle, r)
  np.testing.assert_allclose(out.loss, np.zeros(16), atol=1e-26)
  behind = progressive_loss(f, core.Nets(0, 0), x, t, middle, r)
  assert np.min(behind.loss) > 1e-8  # the teacher itself is not the student
  student = fields.probability_flow(process.VE, lambda x, t: f(1, x, t, None))
  teacher = oracles.field(ORACLE)
  once = solvers.euler(student, x, t, r)
  twice = solvers.euler(teacher, solvers.euler(teacher, x, t, middle), middle, r)
  np.testing.assert_allclose(once, twice, rtol=1e-12, atol=1e-13)


def test_where_the_flow_is_straight_the_teacher_is_the_student(x64):
  x, t, middle, r = draws()
  corner = jnp.array([[0.3, -0.2]])

  def point(params, x, t, cond, *, key=None):  # the denoiser of data that is one point
    return params * jnp.tile(corner, (len(x), 1))

  out = progressive_loss(point, core.Nets(1.0, 1.0), x, t, middle, r)
  np.testing.assert_allclose(out.loss, np.zeros(16), atol=1e-26)  # as above


def test_for_ever_shorter_steps_the_target_is_the_teacher_in_first_order(x64):
  x, t, _, _ = draws()

  def exact(params, x, t, cond, *, key=None):
    return oracles.denoiser(ORACLE, x, t)

  def defect(h):
    out = progressive_loss(exact, core.Nets(0, 0), x, t, t * (1 - h / 2), t * (1 - h))
    return np.sqrt(out.loss)

  orders = np.log2(defect(0.02) / defect(0.01))
  np.testing.assert_allclose(orders, np.ones(16), atol=0.03)  # next term: of size h


def test_only_the_student_is_differentiated_and_only_it_drops():
  seen = []

  def f(params, x, t, cond, *, key=None):
    seen.append(key)
    return params * x

  def loss(online, target):
    x, t, middle, r = (v.astype(jnp.float32) for v in draws())
    nets = core.Nets(online, target)
    out = progressive_loss(f, nets, x, t, middle, r, key='key')
    return jnp.sum(out.loss)

  student, teacher = jax.grad(loss, argnums=(0, 1))(0.5, 0.2)
  assert student != 0
  assert teacher == 0
  assert sorted(map(str, seen)) == ['None', 'None', 'key']


# The objective ---------------------------------------------------------------------


def test_pd_draws_whole_steps_of_its_grid_and_their_middle(x64):
  loss = progressive.pd(
    wavy,
    num_steps=schedules.halving_steps(start=4, stage_images=10, batch_size=1),
    **SQUARED,
    **GRID,
  )
  draw = np.random.default_rng(1)
  x0 = jnp.asarray(draw.normal(size=(256, 2)))
  nets = core.Nets(2.0, 0.5)
  for step, n in ((0, 4), (19, 2), (20, 1), (99, 1)):
    out = jax.jit(loss)(
      nets, core.Batch(x0, None), step, core.streams(jax.random.key(0), step)
    )
    grid = np.asarray(times.karras(n + 1, **GRID))
    at = np.argmin(np.abs(grid[:, None] - np.asarray(out.aux['sigma'])[None]), axis=0)
    assert set(at) == set(range(n))  # 256 draws miss one of four with 1e-32
    assert np.all(np.abs(np.bincount(at) - 256 / n) < 4.5 * np.sqrt(256 / n))
    # The grid in float32; and its half-way points on the clock, not in t.
    np.testing.assert_allclose(out.aux['sigma'], grid[at], rtol=1e-5)
    np.testing.assert_allclose(out.aux['gap'], grid[at] - grid[at + 1], rtol=1e-4)
    fine = np.asarray(times.karras(2 * n + 1, **GRID))
    z = jax.random.normal(
      core.streams(jax.random.key(0), step)['noise'], x0.shape, x0.dtype
    )
    x_t = x0 + expand(out.aux['sigma'], z) * z
    levels = (jnp.asarray(fine[2 * at + i], jnp.float64) for i in range(3))
    expected = progressive_loss(wavy, nets, x_t, *levels)
    np.testing.assert_allclose(out.loss, expected.loss, rtol=1e-3, atol=1e-6)


def test_pd_without_a_teacher_is_refused():
  loss = progressive.pd(wavy, num_steps=schedules.constant(value=4.0), **SQUARED)
  batch = core.Batch(jnp.zeros((4, 2)), None)
  with pytest.raises(ValueError, match=r'needs a target network.*copy_at_stages'):
    loss(core.Nets(1.0), batch, 0, core.streams(jax.random.key(0), 0))
