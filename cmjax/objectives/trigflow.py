"""Simplified continuous-time consistency models (sCM): training and distillation.

The tangent is taken of the raw network F on the TrigFlow process, where its parts that
grow near t = 0 and t = pi / 2 can be written so that they do not.
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
  Schedule,
  expand,
  sum_features,
)
from cmjax.fields import conditional, probability_flow, teacher_denoiser
from cmjax.precond import TrigFlow
from cmjax.process import VE, change_clock, point
from cmjax.times import Times


def simplified(
  f: TrigFlow,
  nets: Nets,
  field: Field,
  x_t: Array,
  t: Array,
  cond: Array | None,
  key: Key | None,
  *,
  share: Array | float = 1.0,
  normaliser: float | None = 0.1,
) -> LossOut:
  """e^w / D |F - F^- - g / (|g| + c)|^2 - w, at angles t f32[B], x_t f32[B, ...].

  g = -cos^2 t (sigma_data F^- - dx/dt) - share cos t sin t (x_t + sigma_data dF^-/dt):
  the tangent df^-/dt times cos t, with the prior weight 1 / (sigma_data tan t) in it.
  The jvp of F takes tangents times cos t sin t, so that nothing overflows. `share`
  warms up the part that is unstable at first. c is `normaliser`; with None, g is taken
  as it is, and the gradient is that of Theorem 6. A target network, which the paper
  does without, gives F^-, and pulls F towards it besides. w is the network's learned
  log_weight at t, or zero for a network without one.

  Source: Lu & Song 2024 (sCM), eqs. (6) to (8) and algorithm 1; the Euclidean norm.
  Differs: the tangent given to the jvp is cos t sin t dx/dt / sigma_data; as printed,
    without the division, it returns sigma_data times the wanted derivative.
  """
  sigma_data = f.sigma_data
  cos, sin = jnp.cos(t), jnp.sin(t)
  v, k = jax.lax.stop_gradient(field(x_t, t)), cos * sin

  def raw(params, x, t):
    return f.raw(params, x, t, cond, key=key)

  y, moved = jax.jvp(
    lambda x, t: raw(nets.online if nets.target is None else nets.target, x, t),
    (x_t / sigma_data, t),
    (expand(k, v) * v / sigma_data, k),
  )
  still, moved = jax.lax.stop_gradient((y, moved))
  if nets.target is not None:  # else y is that of the online network already
    y = raw(nets.online, x_t / sigma_data, t)
  settle = -expand(cos**2, v) * (sigma_data * still - v)
  curve = expand(k, x_t) * x_t + sigma_data * moved
  g = jax.lax.stop_gradient(settle - share * curve)
  length = jnp.sqrt(sum_features(g**2))
  if normaliser is not None:
    g = g / (expand(length, g) + normaliser)
  loss = sum_features((y - still - g) ** 2) / (y.size / len(y))
  if f.network.log_weight is not None:
    w = f.network.log_weight(nets.online, t)
    loss = jnp.exp(w) * loss - w
  return LossOut(loss, {'t': sigma_data * jnp.tan(t), 'tangent': length})


def _at_angles(
  f: Model,
  times: Times,
  warmup: Schedule,
  normaliser: float,
  field_of: Callable[[TrigFlow, Nets, Batch, Array], Field],
) -> Loss:
  if not isinstance(f, TrigFlow):
    raise ValueError('needs config.precond.fn=cmjax.precond:trigflow')
  checks.positive(normaliser=normaliser)

  def loss(nets, batch, step, keys):
    levels = times(keys['time'], len(batch.x0))
    z = jax.random.normal(keys['noise'], batch.x0.shape)
    x_t, t = change_clock(VE, f.process, point(VE, batch.x0, z, levels), levels)
    return simplified(
      f,
      nets,
      field_of(f, nets, batch, z),
      x_t,
      t,
      batch.cond,
      keys['dropout'],
      share=warmup(step),
      normaliser=normaliser,
    )

  return loss


def sct(f: Model, *, times: Times, warmup: Schedule, normaliser: float = 0.1) -> Loss:
  """Simplified consistency training, from data alone.

  `times` draws noise levels, which are turned into angles; `warmup` goes from 0 to 1.
  A network with `log_weight` learns its weighting.

  Raises: ValueError unless f is a `precond.trigflow` and the normaliser is positive.

  Source: Lu & Song 2024 (sCM), algorithm 1 (sCT), normaliser 0.1.
  """

  def own_path(f, nets, batch, z):
    return conditional(f.process, batch.x0, z)

  return _at_angles(f, times, warmup, normaliser, own_path)


def scd(
  f: Model,
  teacher: Model,
  *,
  times: Times,
  warmup: Schedule,
  normaliser: float = 0.1,
  guidance: float = 1.0,
) -> Loss:
  """Simplified consistency distillation: along the ODE of a teacher, of any process.

  Raises: ValueError unless f is a `precond.trigflow` and the normaliser is positive, or
    for guidance of a model without labels.

  Source: Lu & Song 2024 (sCM), algorithm 1 (sCD).
  """
  checks.finite(guidance=guidance)

  def teacher_flow(f, nets, batch, z):
    return probability_flow(
      f.process, teacher_denoiser(teacher, nets.teacher, batch.cond, guidance)
    )

  return _at_angles(f, times, warmup, normaliser, teacher_flow)
