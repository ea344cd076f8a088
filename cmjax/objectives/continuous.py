"""Continuous-time consistency objectives: f must be constant along the ODE, exactly.

The defect is df/dt along a field, by one `jax.jvp`. These are the limits of the
discrete objectives for endless grids, in the sense of Theorems 3 to 6.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import (
  Array,
  Batch,
  Field,
  Key,
  Loss,
  LossOut,
  Model,
  Nets,
  Params,
  sum_features,
)
from cmjax.distances import Distance, Weighting, limit_cotangent
from cmjax.fields import conditional, probability_flow, teacher_denoiser
from cmjax.process import VE, point
from cmjax.times import Times


def tangent(
  f: Model,
  params: Params,
  field: Field,
  x_t: Array,
  t: Array,
  cond: Array | None,
  key: Key | None,
) -> tuple[Array, Array]:
  """y = f(x_t, t) and dy/dt along the field, both f32[B, ...]: one `jax.jvp`."""
  v = jax.lax.stop_gradient(field(x_t, t))
  return jax.jvp(
    lambda x, t: f(params, x, t, cond, key=key), (x_t, t), (v, jnp.ones_like(t))
  )


def true_loss(
  f: Model,
  nets: Nets,
  field: Field,
  x_t: Array,
  t: Array,
  cond: Array | None,
  key: Key | None,
  *,
  distance: Distance,
  weighting: Weighting,
) -> LossOut:
  """The limit of the loss itself: zero only where f is constant along the field.

  For a distance of degree 2, w(t) (df/dt)^T G(f) (df/dt) / 2, the limit of
  (N - 1)^2 L (Theorem 3); for a norm, w(t) |df/dt|, that of (N - 1) L (Theorem 4). The
  gradient goes through the jvp. x_t f32[B, ...], t f32[B].

  Source: Song et al. 2023, theorems 3 and 4, with w = lambda tau'^2 and lambda tau'.
  """
  y, dy = tangent(f, nets.online, field, x_t, t, cond, key)
  if distance.degree == 2:
    loss = sum_features(dy * limit_cotangent(distance, y, dy)) / 2
  else:
    loss = distance(dy, jnp.zeros_like(dy))
  return LossOut(weighting(t, t) * loss, {'t': t, 'tangent': _length(dy)})


def pseudo_loss(
  f: Model,
  nets: Nets,
  field: Field,
  x_t: Array,
  t: Array,
  cond: Array | None,
  key: Key | None,
  *,
  distance: Distance,
  weighting: Weighting,
) -> LossOut:
  """A loss whose gradient is the limit of the discrete one: w(t) <G df^-/dt, grad f>.

  Only f at x_t is differentiated. The value is w(t) <df/dt, G df/dt>, which is zero
  where the defect is; it is no loss that the gradient belongs to. x_t f32[B, ...].

  Source: Song et al. 2023, theorems 5 and 6, with w = lambda tau'.
  Differs: norms have a limit too, `distances.limit_cotangent`; with a target network G
    is taken at f, where the gradient is, and not at f^-.
  """
  y, dy = tangent(
    f, nets.online if nets.target is None else nets.target, field, x_t, t, cond, key
  )
  dy = jax.lax.stop_gradient(dy)
  if nets.target is not None:  # else y is that of the online network already
    y = f(nets.online, x_t, t, cond, key=key)
  still = jax.lax.stop_gradient(y)
  pull = jax.lax.stop_gradient(limit_cotangent(distance, still, dy))
  loss = weighting(t, t) * sum_features((y - still + dy) * pull)
  return LossOut(loss, {'t': t, 'tangent': _length(dy)})


def _length(x: Array) -> Array:
  return jnp.sqrt(sum_features(jax.lax.stop_gradient(x) ** 2))


def _at_times(
  kernel: Callable[..., LossOut],
  f: Model,
  times: Times,
  distance: Distance,
  weighting: Weighting,
  field_of: Callable[[Nets, Batch, Array], Field],
) -> Loss:
  """Draws times and noise, and hands them to the kernel."""
  one = jnp.ones(1)
  if not 0 < float(weighting(one, one)[0]) < float('inf'):
    raise ValueError(
      'the weighting vanishes where r = t, which is everywhere in continuous time; '
      'take cmjax.distances:uniform'
    )

  def loss(nets, batch, step, keys):
    t = times(keys['time'], len(batch.x0))
    z = jax.random.normal(keys['noise'], batch.x0.shape)
    return kernel(
      f,
      nets,
      field_of(nets, batch, z),
      point(VE, batch.x0, z, t),
      t,
      batch.cond,
      keys['dropout'],
      distance=distance.given(nets.perceptual),
      weighting=weighting,
    )

  return loss


def _teacher_flow(teacher, guidance):
  checks.finite(guidance=guidance)

  def field_of(nets, batch, z):
    return probability_flow(
      VE, teacher_denoiser(teacher, nets.teacher, batch.cond, guidance)
    )

  return field_of


def theorem3(
  f: Model,
  teacher: Model,
  *,
  times: Times,
  distance: Distance,
  weighting: Weighting,
  guidance: float = 1.0,
) -> Loss:
  """Distillation by the true loss of a metric with second derivatives.

  Raises: ValueError for a metric without them, a weighting that vanishes at r = t, or
    guidance of a model without labels.

  Source: Song et al. 2023, theorem 3.
  """
  if distance.degree != 2:
    raise ValueError(
      'Theorem 3 needs a metric that has second derivatives where its points agree; '
      'take squared_l2 or pseudo_huber with c > 0, or theorem4'
    )
  flow = _teacher_flow(teacher, guidance)
  return _at_times(true_loss, f, times, distance, weighting, flow)


def theorem4(
  f: Model,
  teacher: Model,
  *,
  times: Times,
  distance: Distance,
  weighting: Weighting,
  guidance: float = 1.0,
) -> Loss:
  """Distillation by the true loss of a norm: l1, or l2 as pseudo_huber with c = 0.

  Raises: ValueError for a metric that is no norm, a weighting that vanishes at r = t,
    or guidance of a model without labels.

  Source: Song et al. 2023, theorem 4 for l1; its l2 is what their released code trains.
  """
  if distance.degree != 1:
    raise ValueError(
      'Theorem 4 needs a norm, for other metrics its limit is zero; take l1 or '
      'pseudo_huber with c = 0, or theorem3'
    )
  flow = _teacher_flow(teacher, guidance)
  return _at_times(true_loss, f, times, distance, weighting, flow)


def cd(
  f: Model,
  teacher: Model,
  *,
  times: Times,
  distance: Distance,
  weighting: Weighting,
  guidance: float = 1.0,
) -> Loss:
  """Continuous-time consistency distillation: the pseudo-objective of Theorem 5.

  Raises: ValueError for a weighting that vanishes at r = t, or guidance of a model
    without labels.

  Source: Song et al. 2023, theorem 5.
  """
  flow = _teacher_flow(teacher, guidance)
  return _at_times(pseudo_loss, f, times, distance, weighting, flow)


def ct(f: Model, *, times: Times, distance: Distance, weighting: Weighting) -> Loss:
  """Continuous-time consistency training: the pseudo-objective of Theorem 6.

  Raises: ValueError for a weighting that vanishes at r = t.

  Source: Song et al. 2023, theorem 6.
  """

  def own_path(nets, batch, z):
    return conditional(VE, batch.x0, z)

  return _at_times(pseudo_loss, f, times, distance, weighting, own_path)
