"""Flow maps: models of the average velocity between two times t >= r.

The process is linear, x_t = (1 - t) x0 + t z with t in [0, 1].
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
  drop_labels,
  expand,
  sum_features,
)
from cmjax.fields import conditional, model_velocity
from cmjax.objectives.paths import draw_noise, perturb_batch
from cmjax.precond import TwoTime
from cmjax.process import LINEAR
from cmjax.times import Pairs, check_pairs, dyadic_pairs


def meanflow_loss(
  f: TwoTime,
  nets: Nets,
  field: Field,
  noisy: Noisy,
  r: Array,
  *,
  tangent_field: Field | None = None,
  power: float = 1.0,
  c: float = 0.01,
) -> LossOut:
  """e / sg(e + c)^power, with e = |u(x_t, t, r) - sg(v - (t - r) du/dt)|^2.

  0 <= r <= t <= 1 f32[B]; v is the velocity of `field`, and du/dt is the derivative
  along `tangent_field`, by default `field`. Where r = t it is flow matching; for r = 0
  and power = 0 the gradient is that of Theorem 6 with squared_l2 and weighting 1 / t.

  Source: Geng et al. 2025 (MeanFlow), eqs. (9), (10) and (22).
  """
  x_t, t, cond, key = noisy
  v = field(x_t, t)
  u, du = jax.jvp(
    lambda x, t, r: f.average_velocity(nets.online, x, t, r, cond, key=key),
    (x_t, t, r),
    ((tangent_field or field)(x_t, t), jnp.ones_like(t), jnp.zeros_like(r)),
  )
  return _regression(u, v - expand(t - r, v) * du, t, r, power=power, c=c)


def shortcut_loss(
  f: TwoTime,
  nets: Nets,
  field: Field,
  noisy: Noisy,
  r: Array,
  *,
  min_gap: float = 0.0,
) -> LossOut:
  """|u(x_t, t, r) - sg(target)|^2: one step from t to r must equal two half steps.

  0 <= r <= t <= 1 f32[B]. The target is the mean of the target network's average
  velocities in two steps of length (t - r) / 2, without dropout. Where
  t - r <= `min_gap` it is the velocity of `field`: flow matching.

  Source: Frans et al. 2024 (shortcut models), eq. (5); kvfrans/shortcut-models.
  Differs: half steps and targets are not clipped to [-4, 4].
  """
  x_t, t, cond, key = noisy

  def half(x, t, r):
    return f.average_velocity(nets.target_params(), x, t, r, cond)

  middle = (t + r) / 2
  first = half(x_t, t, middle)
  second = half(x_t - expand(t - middle, x_t) * first, middle, r)
  flow_matching = expand(t - r <= min_gap, x_t)
  target = jnp.where(flow_matching, field(x_t, t), (first + second) / 2)
  u = f.average_velocity(nets.online, x_t, t, r, cond, key=key)
  return _regression(u, target, t, r)


def _regression(
  u: Array, target: Array, t: Array, r: Array, *, power: float = 0.0, c: float = 1.0
) -> LossOut:
  squared = sum_features((u - jax.lax.stop_gradient(target)) ** 2)
  loss = squared / jax.lax.stop_gradient(squared + c) ** power
  # sigma is infinite at t = 1, so 1 - t is bounded below by its value at sigma = 80.
  sigma = LINEAR.sigma(t) / jnp.maximum(LINEAR.alpha(t), 1 / 81)
  return LossOut(loss, {'sigma': sigma, 'gap': t - r, 'squared': squared})


def _two_time(f: Model) -> TwoTime:
  if not isinstance(f, TwoTime):
    raise ValueError(f'needs a model of precond.two_time, got {type(f).__name__}')
  return f


def meanflow(
  f: Model,
  *,
  pairs: Pairs,
  power: float = 1.0,
  c: float = 0.01,
  guidance: float = 1.0,
  label_dropout: float = 0.0,
  marginal_tangent: bool = False,
) -> Loss:
  """MeanFlow: learns the average velocity from data by the MeanFlow identity.

  Args:
    f: a model of `precond.two_time`.
    pairs: t and r <= t.
    power: exponent of the adaptive weighting, see `meanflow_loss`.
    c: offset of the adaptive weighting.
    guidance: if not 1, v becomes guidance v + (1 - guidance) u(x, t, t | no label)
      for examples whose label is not dropped.
    label_dropout: probability of dropping a label.
    marginal_tangent: differentiate along u(x, t, t), the model's estimate of the
      marginal velocity, which has less variance than the conditional velocity.

  Raises: ValueError unless f is a `precond.two_time`, all pairs have 0 <= r <= t,
    power >= 0, c > 0 and 0 <= label_dropout < 1; if guidance is not 1 and label_dropout
    is 0; or if label_dropout > 0 and there are no labels.

  Source: Geng et al. 2025 (MeanFlow), algorithm 1 and eq. (17) with kappa = 0;
    `marginal_tangent`: Geng et al. 2025 (improved MeanFlow).
  """
  f = _two_time(f)
  check_pairs(pairs, equal=True)
  checks.not_negative(power=power)
  checks.positive(c=c)
  checks.finite(guidance=guidance)
  if not 0 <= label_dropout < 1:
    raise ValueError(f'needs label_dropout in [0, 1), got {label_dropout}')
  if guidance != 1.0 and label_dropout == 0:
    raise ValueError(
      f'guidance={guidance} needs label_dropout > 0, to train the unconditional '
      'velocity'
    )

  def loss(nets, batch, step, keys):
    t, r = pairs(keys['time'], len(batch.x0), step)
    z = draw_noise(keys, batch)
    cond = drop_labels(batch.cond, keys['label'], label_dropout)
    key = keys['dropout']
    data_field = conditional(LINEAR, batch.x0, z)

    def model_field(cond):
      return model_velocity(f.average_velocity, nets.target_params(), cond, key)

    def guided_field(x, t):
      if cond is None:
        raise ValueError(f'guidance={guidance} needs labels, and cond is None')
      v, unconditional = data_field(x, t), model_field(jnp.zeros_like(cond))(x, t)
      mixed = guidance * v + (1.0 - guidance) * unconditional
      return jnp.where(expand(jnp.any(cond != 0, axis=1), v), mixed, v)

    return meanflow_loss(
      f,
      nets,
      data_field if guidance == 1.0 else guided_field,
      perturb_batch(LINEAR, batch._replace(cond=cond), z, t, keys),
      r,
      tangent_field=model_field(cond) if marginal_tangent else None,
      power=power,
      c=c,
    )

  return loss


def shortcut(f: Model, *, num_steps: int = 128, flow_fraction: float = 0.75) -> Loss:
  """Shortcut models: one step must equal two half steps of the target network.

  Steps of length 1 / num_steps are trained by flow matching, on `flow_fraction` of the
  batch; steps of 2, 4, ... times that length by self-consistency.

  Raises: ValueError unless f is a `precond.two_time`, num_steps is a power of two from
    2 to 65,536 and flow_fraction is in [0, 1].

  Source: Frans et al. 2024 (shortcut models), section 3; kvfrans/shortcut-models for
    the step length in flow matching.
  Differs: the input of the network is t - r, not its logarithm.
  """
  f = _two_time(f)
  pairs = dyadic_pairs(num_steps=num_steps, flow_fraction=flow_fraction)

  def loss(nets, batch, step, keys):
    t, r = pairs(keys['time'], len(batch.x0), step)
    z = draw_noise(keys, batch)
    return shortcut_loss(
      f,
      nets,
      conditional(LINEAR, batch.x0, z),
      perturb_batch(LINEAR, batch, z, t, keys),
      r,
      min_gap=1.0 / num_steps,
    )

  return loss
