"""Discrete consistency objectives: two neighbours on one ODE path must agree.

Each builder chooses which pairs of times, which field, which solver step, which
distance and which weighting; the kernel `pair` is shared by all.
"""

import jax
import jax.numpy as jnp

from cmjax.core import (
  Array,
  Batch,
  Field,
  Key,
  Loss,
  LossOut,
  Model,
  Nets,
  Schedule,
  Solver,
  expand,
  sum_features,
)
from cmjax.distances import Distance, Weighting
from cmjax.fields import conditional, probability_flow
from cmjax.process import VE, point
from cmjax.solvers import euler, heun
from cmjax.times import Pairs, Times, ect_pairs


def pair(
  f: Model,
  nets: Nets,
  field: Field,
  x_t: Array,
  t: Array,
  r: Array,
  cond: Array | None,
  key: Key | None,
  *,
  solver: Solver,
  distance: Distance,
  weighting: Weighting,
) -> LossOut:
  """w(t, r) d(f(x_t, t), sg f^-(x_r, r)), x_r one solver step from x_t along the field.

  x_t f32[B, ...], t and r f32[B] with 0 <= r <= t. Both evaluations share the dropout
  key, so that r = t gives exactly zero. Where r = 0 the target is x_r itself: the
  boundary f(x, 0) = x, without a network evaluation at ln 0.

  Source: Song et al. 2023, eqs. (7) and (10); Geng et al. 2024 (ECT).
  """
  x_r = solver(field, x_t, t, r)
  y = f(nets.online, x_t, t, cond, key=key)
  inside = r > 0
  target = f(nets.target, x_r, jnp.where(inside, r, t), cond, key=key)
  target = jax.lax.stop_gradient(jnp.where(expand(inside, x_r), target, x_r))
  aux = {'t': t, 'gap': t - r, 'defect': jnp.sqrt(sum_features((y - target) ** 2))}
  return LossOut(weighting(t, r) * distance(y, target), aux)


def _on_pairs(f, pairs, solver, distance, weighting, field_of) -> Loss:
  """Draws times and noise, and hands the pair to the kernel."""

  def loss(nets, batch, step, keys):
    x0 = batch.x0
    t, r = pairs(keys['time'], len(x0), step)
    z = jax.random.normal(keys['noise'], x0.shape)
    return pair(
      f,
      nets,
      field_of(nets, batch, z),
      point(VE, x0, z, t),
      t,
      r,
      batch.cond,
      keys['dropout'],
      solver=solver,
      distance=distance,
      weighting=weighting,
    )

  return loss


def _own_path(nets: Nets, batch: Batch, z: Array) -> Field:
  return conditional(VE, batch.x0, z)


def ect(
  f: Model,
  *,
  times: Times,
  gap: Schedule,
  distance: Distance,
  weighting: Weighting,
  k: float = 8.0,
  b: float = 1.0,
) -> Loss:
  """Easy Consistency Tuning: from diffusion to consistency by shrinking r(t, step).

  Both points share data and noise. The target is `nets.target`: in the paper, and here
  unless the run has a `target_rate`, the stop-gradient of the online network. `gap` is
  the relative gap by step; k and b shape it by t (`times.neighbour`).

  Source: Geng et al. 2024 (ECT); locuslab/ect `loss.py`.
  Differs: a zero distance has a zero gradient there, not NaN cleaned afterwards.
  """
  pairs = ect_pairs(times=times, gap=gap, k=k, b=b)
  return _on_pairs(f, pairs, euler, distance, weighting, _own_path)


def ct(f: Model, *, pairs: Pairs, distance: Distance, weighting: Weighting) -> Loss:
  """Consistency training: neighbours of a grid that grows with the step.

  Both points share data and noise; the target network is `nets.target`.

  Source: Song et al. 2023, algorithm 3.
  """
  return _on_pairs(f, pairs, euler, distance, weighting, _own_path)


def cd(
  f: Model,
  teacher: Model,
  *,
  pairs: Pairs,
  distance: Distance,
  weighting: Weighting,
) -> Loss:
  """Consistency distillation: one Heun step of the teacher's ODE to the neighbour.

  Source: Song et al. 2023, algorithm 2, and section 6 for Heun.
  """

  def teacher_flow(nets, batch, z):
    return probability_flow(VE, lambda x, t: teacher(nets.teacher, x, t, batch.cond))

  return _on_pairs(f, pairs, heun, distance, weighting, teacher_flow)
