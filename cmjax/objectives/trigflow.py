"""Simplified continuous-time consistency models (sCM): training and distillation.

Times t are angles of the TrigFlow process, in [0, pi / 2]. The tangent is written in
terms of the raw network F, so that no term is singular at t = 0 or t = pi / 2.
"""

import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import (
  Array,
  Field,
  Loss,
  LossOut,
  Model,
  Nets,
  Noisy,
  Schedule,
  expand,
  sum_features,
)
from cmjax.objectives.paths import (
  BatchField,
  conditional_field,
  draw_noise,
  teacher_field,
)
from cmjax.precond import TrigFlow
from cmjax.process import VE, change_process, perturb
from cmjax.times import Times


def scm_loss(
  f: TrigFlow,
  nets: Nets,
  field: Field,
  noisy: Noisy,
  *,
  warmup: Array | float = 1.0,
  normaliser: float | None = 0.1,
) -> LossOut:
  """e^w / D |F - F^- - g / (|g| + c)|^2 - w at angles t f32[B], x_t f32[B, ...].

  g = -cos^2 t (sigma_data F^- - dx/dt) - warmup cos t sin t (x_t + sigma_data dF^-/dt)

  is cos t times the tangent df^-/dt, with the prior weighting 1 / (sigma_data tan t).
  The tangents of the jvp of F are scaled by cos t sin t, which avoids overflow.

  `warmup` in [0, 1] scales the term that is unstable early in training. c is
  `normaliser`; None disables normalisation, and the gradient is that of Theorem 6. w is
  the network's log_weight at t, or 0 if it has none.

  The paper has no target network: F^- is the stop-gradient of F. With a target network,
  F is regressed on F^- + g / (|g| + c) of the target.

  Source: Lu & Song 2024 (sCM), eqs. (6) to (8) and algorithm 1; |g| is the Euclidean
    norm.
  Differs: the tangent of the jvp is cos t sin t dx/dt / sigma_data; the paper omits the
    division, which gives sigma_data times the intended derivative.
  """
  x_t, t, cond, key = noisy
  sigma_data = f.sigma_data
  cos, sin = jnp.cos(t), jnp.sin(t)
  v, scale = jax.lax.stop_gradient(field(x_t, t)), cos * sin

  def raw(params, x, t):
    return f.raw(params, x, t, cond, key=key)

  target_params = nets.online if nets.target is None else nets.target
  y, dy = jax.jvp(
    lambda x, t: raw(target_params, x, t),
    (x_t / sigma_data, t),
    (expand(scale, v) * v / sigma_data, scale),
  )
  y_target, dy = jax.lax.stop_gradient((y, dy))
  if nets.target is not None:  # otherwise y is F of the online network already
    y = raw(nets.online, x_t / sigma_data, t)
  velocity_error = -expand(cos**2, v) * (sigma_data * y_target - v)
  curvature = expand(scale, x_t) * x_t + sigma_data * dy
  g = jax.lax.stop_gradient(velocity_error - warmup * curvature)
  norm = jnp.sqrt(sum_features(g**2))
  if normaliser is not None:
    g = g / (expand(norm, g) + normaliser)
  loss = sum_features((y - y_target - g) ** 2) / (y.size / len(y))
  if f.network.log_weight is not None:
    w = f.network.log_weight(nets.online, t)
    loss = jnp.exp(w) * loss - w
  return LossOut(loss, {'sigma': sigma_data * jnp.tan(t), 'tangent': norm})


def _trigflow(f: Model) -> TrigFlow:
  if not isinstance(f, TrigFlow):
    raise ValueError(f'needs a model of precond.trigflow, got {type(f).__name__}')
  return f


def _scm(
  f: TrigFlow, field: BatchField, times: Times, warmup: Schedule, normaliser: float
) -> Loss:
  """`scm_loss` with random noise levels and noise."""
  checks.positive(normaliser=normaliser)

  def loss(nets, batch, step, keys):
    sigma = times(keys['time'], len(batch.x0))
    z = draw_noise(keys, batch)
    x_t, t = change_process(VE, f.process, perturb(VE, batch.x0, z, sigma), sigma)
    return scm_loss(
      f,
      nets,
      field(nets, batch, z),
      Noisy(x_t, t, batch.cond, keys['dropout']),
      warmup=warmup(step),
      normaliser=normaliser,
    )

  return loss


def sct(f: Model, *, times: Times, warmup: Schedule, normaliser: float = 0.1) -> Loss:
  """Simplified consistency training (sCT).

  `times` draws noise levels sigma, which are converted to angles. `warmup` rises from 0
  to 1, see `scm_loss`. If the network has a `log_weight`, the weighting is learned.

  Raises: ValueError unless f is a `precond.trigflow` and normaliser > 0.

  Source: Lu & Song 2024 (sCM), algorithm 1 (sCT), normaliser 0.1.
  """
  f = _trigflow(f)
  return _scm(f, conditional_field(f.process), times, warmup, normaliser)


def scd(
  f: Model,
  teacher: Model,
  *,
  times: Times,
  warmup: Schedule,
  normaliser: float = 0.1,
  guidance: float = 1.0,
) -> Loss:
  """Simplified consistency distillation (sCD), of a teacher on any process.

  Other arguments are those of `sct`.

  Raises: ValueError unless f is a `precond.trigflow` and normaliser > 0, or if guidance
    is not 1 and there are no labels.

  Source: Lu & Song 2024 (sCM), algorithm 1 (sCD).
  """
  f = _trigflow(f)
  field = teacher_field(f.process, teacher, guidance)
  return _scm(f, field, times, warmup, normaliser)
