"""Two-time objectives on the linear process: the average velocity between t and r."""

import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import (
  Array,
  Field,
  Key,
  Loss,
  LossOut,
  Model,
  Nets,
  drop_labels,
  expand,
  sum_features,
)
from cmjax.fields import conditional, own_velocity
from cmjax.precond import TwoTime
from cmjax.process import LINEAR, point
from cmjax.times import Pairs, check_pairs, dyadic_times


def mean_velocity(
  f: TwoTime,
  nets: Nets,
  field: Field,
  x_t: Array,
  t: Array,
  r: Array,
  cond: Array | None,
  key: Key | None,
  *,
  along: Field | None = None,
  power: float = 1.0,
  c: float = 0.01,
) -> LossOut:
  """|u - sg(v - (t - r) du/dt)|^2, divided by sg(its value + c)^power.

  x_t f32[B, ...], 0 <= r <= t <= 1 f32[B]; v is the field's, and du/dt the derivative
  of u(x_t, t, r) along it, or `along` another. Where r = t it is flow matching; at
  r = 0 with power = 0 the gradient is Theorem 6's with squared_l2 and weight 1 / t.

  Source: Geng et al. 2025 (MeanFlow), eqs. (9), (10) and (22).
  """
  v = field(x_t, t)
  u, du = jax.jvp(
    lambda x, t, r: f.average_velocity(nets.online, x, t, r, cond, key=key),
    (x_t, t, r),
    ((along or field)(x_t, t), jnp.ones_like(t), jnp.zeros_like(r)),
  )
  return _regress(u, v - expand(t - r, v) * du, t, r, power, c)


def half_steps(
  f: TwoTime,
  nets: Nets,
  field: Field,
  x_t: Array,
  t: Array,
  r: Array,
  cond: Array | None,
  key: Key | None,
  *,
  shortest: float = 0.0,
) -> LossOut:
  """One step from t to r must equal two of half its length, without dropout.

  Where t - r <= `shortest` it is flow matching: no half steps shorter than that are
  asked for. x_t f32[B, ...], 0 <= r <= t <= 1 f32[B].

  Source: Frans et al. 2024 (shortcut models), eq. (5); kvfrans/shortcut-models.
  Differs: half steps and targets are not clipped to [-4, 4].
  """

  def half(x, t, r):
    return f.average_velocity(nets.fixed(), x, t, r, cond)

  middle = (t + r) / 2
  first = half(x_t, t, middle)
  second = half(x_t - expand(t - middle, x_t) * first, middle, r)
  flows = expand(t - r <= shortest, x_t)
  target = jnp.where(flows, field(x_t, t), (first + second) / 2)
  u = f.average_velocity(nets.online, x_t, t, r, cond, key=key)
  return _regress(u, target, t, r, 0.0, 1.0)


def _regress(u, target, t, r, power, c) -> LossOut:
  squared = sum_features((u - jax.lax.stop_gradient(target)) ** 2)
  loss = squared / jax.lax.stop_gradient(squared + c) ** power
  # The noise level, 80 at t = 80 / 81; from there to 81, where it is infinite at t = 1.
  level = LINEAR.sigma(t) / jnp.maximum(LINEAR.alpha(t), 1 / 81)
  return LossOut(loss, {'t': level, 'gap': t - r, 'squared': squared})


def _check_model(f: Model) -> None:
  if not isinstance(f, TwoTime):
    raise ValueError('needs config.precond.fn=cmjax.precond:two_time')


def meanflow(
  f: Model,
  *,
  pairs: Pairs,
  power: float = 1.0,
  c: float = 0.01,
  guidance: float = 1.0,
  label_dropout: float = 0.0,
  own_tangent: bool = False,
) -> Loss:
  """MeanFlow: from data alone, the average velocity by its differential identity.

  `power` and `c` weigh a row by its own error. A `guidance` other than 1 puts
  v = guidance v + (1 - guidance) u(x, t, t | no label) into target and tangent, where
  the label is not dropped. `own_tangent` follows u(x, t, t) instead of the example's
  own velocity in the derivative, which has less variance.

  Raises: ValueError unless f is a `precond.two_time` and pairs have r <= t; for a label
    dropout outside [0, 1); for guidance without labels or without label dropout; unless
    power >= 0 and c > 0.

  Source: Geng et al. 2025 (MeanFlow), algorithm 1 and eq. (17) with kappa = 0;
    `own_tangent`: Geng et al. 2025 (improved MeanFlow).
  """
  _check_model(f)
  check_pairs(pairs, equal=True)
  checks.not_negative(power=power)
  checks.positive(c=c)
  checks.finite(guidance=guidance)
  if not 0 <= label_dropout < 1:
    raise ValueError(f'needs label_dropout in [0, 1), got {label_dropout}')
  if guidance != 1.0 and label_dropout == 0:
    raise ValueError(
      f'guidance={guidance} needs label_dropout > 0: without it the network never '
      'learns to go without a label'
    )

  def loss(nets, batch, step, keys):
    t, r = pairs(keys['time'], len(batch.x0), step)
    z = jax.random.normal(keys['noise'], batch.x0.shape)
    cond = drop_labels(batch.cond, keys['label'], label_dropout)
    path, key = conditional(LINEAR, batch.x0, z), keys['dropout']

    def own(cond):
      return own_velocity(f.average_velocity, nets.fixed(), cond, key)

    def guided_path(x, t):
      v, free = path(x, t), own(jnp.zeros_like(cond))(x, t)
      mixed = guidance * v + (1.0 - guidance) * free
      return jnp.where(expand(jnp.any(cond != 0, axis=1), v), mixed, v)

    return mean_velocity(
      f,
      nets,
      path if guidance == 1.0 else guided_path,
      point(LINEAR, batch.x0, z, t),
      t,
      r,
      cond,
      key,
      along=own(cond) if own_tangent else None,
      power=power,
      c=c,
    )

  return loss


def shortcut(f: Model, *, finest: int = 128, flow_share: float = 0.75) -> Loss:
  """Shortcut models: two half steps of the target network teach one whole step.

  The shortest step, 1 / `finest`, is learnt by flow matching, from `flow_share` of the
  rows; those of twice, four times, ... its length from two steps of half their length.

  Raises: ValueError unless f is a `precond.two_time`, `finest` is a power of two from 2
    to 65,536 and the share in [0, 1].

  Source: Frans et al. 2024 (shortcut models), section 3; the length given with flow
    matching: kvfrans/shortcut-models.
  Differs: the network is given t - r, not its logarithm.
  """
  _check_model(f)
  pairs = dyadic_times(finest=finest, flow_share=flow_share)

  def loss(nets, batch, step, keys):
    t, r = pairs(keys['time'], len(batch.x0), step)
    z = jax.random.normal(keys['noise'], batch.x0.shape)
    return half_steps(
      f,
      nets,
      conditional(LINEAR, batch.x0, z),
      point(LINEAR, batch.x0, z, t),
      t,
      r,
      batch.cond,
      keys['dropout'],
      shortest=1.0 / finest,
    )

  return loss
