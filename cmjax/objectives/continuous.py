"""Continuous-time consistency objectives: df/dt must vanish along the ODE.

df/dt along a field is one `jax.jvp`. These are the limits of the discrete-time
objectives as the grid grows, in the sense of Theorems 3 to 6 of Song et al. 2023. The
process is variance exploding, x_t = x0 + t z, so t is the noise level sigma.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from cmjax.core import (
  Array,
  Field,
  Loss,
  LossOut,
  Model,
  Nets,
  Noisy,
  Params,
  sum_features,
)
from cmjax.distances import Distance, limit_cotangent
from cmjax.objectives.paths import (
  BatchField,
  conditional_field,
  draw_noise,
  perturb_batch,
  teacher_field,
)
from cmjax.process import VE
from cmjax.times import Times
from cmjax.weightings import Weighting


def tangent(
  f: Model, params: Params, field: Field, noisy: Noisy
) -> tuple[Array, Array]:
  """y = f(x_t, t) and dy/dt along the field, both f32[B, ...]: one `jax.jvp`."""
  x_t, t, cond, key = noisy
  v = jax.lax.stop_gradient(field(x_t, t))
  return jax.jvp(
    lambda x, t: f(params, x, t, cond, key=key), (x_t, t), (v, jnp.ones_like(t))
  )


def true_loss(
  f: Model,
  nets: Nets,
  field: Field,
  noisy: Noisy,
  *,
  distance: Distance,
  weighting: Weighting,
) -> LossOut:
  """The limit of the discrete-time loss, differentiated through the jvp.

  For a distance of degree 2 it is w(t) (df/dt)^T G(f) (df/dt) / 2, the limit of
  (N - 1)^2 L (Theorem 3); for a norm w(t) |df/dt|, that of (N - 1) L (Theorem 4).

  Source: Song et al. 2023, theorems 3 and 4, with w = lambda tau'^2 and lambda tau'.
  """
  y, dy = tangent(f, nets.online, field, noisy)
  if distance.degree == 2:
    loss = sum_features(dy * limit_cotangent(distance, y, dy)) / 2
  else:
    loss = distance(dy, jnp.zeros_like(dy))
  aux = {'sigma': noisy.t, 'tangent': _length(dy)}
  return LossOut(weighting(noisy.t, noisy.t) * loss, aux)


def pseudo_loss(
  f: Model,
  nets: Nets,
  field: Field,
  noisy: Noisy,
  *,
  distance: Distance,
  weighting: Weighting,
) -> LossOut:
  """A pseudo-loss whose gradient is the limit of the discrete-time gradient.

  The gradient is w(t) <G df^-/dt, grad f>, through f(x_t, t) only. The value is
  w(t) <df^-/dt, G df^-/dt>, which vanishes with df^-/dt; it is not an antiderivative of
  the gradient.

  Source: Song et al. 2023, theorems 5 and 6, with w = lambda tau'.
  Differs: norms are allowed, see `distances.limit_cotangent`; with a target network G
    is evaluated at f, not at f^-.
  """
  x_t, t, cond, key = noisy
  params = nets.online if nets.target is None else nets.target
  y, dy = tangent(f, params, field, noisy)
  dy = jax.lax.stop_gradient(dy)
  if nets.target is not None:  # otherwise y is f of the online network already
    y = f(nets.online, x_t, t, cond, key=key)
  y_stopped = jax.lax.stop_gradient(y)
  cotangent = jax.lax.stop_gradient(limit_cotangent(distance, y_stopped, dy))
  loss = weighting(t, t) * sum_features((y - y_stopped + dy) * cotangent)
  return LossOut(loss, {'sigma': t, 'tangent': _length(dy)})


def _length(x: Array) -> Array:
  return jnp.sqrt(sum_features(jax.lax.stop_gradient(x) ** 2))


class _Kernel(Protocol):
  """The signature of `true_loss` and `pseudo_loss`."""

  def __call__(
    self,
    f: Model,
    nets: Nets,
    field: Field,
    noisy: Noisy,
    *,
    distance: Distance,
    weighting: Weighting,
  ) -> LossOut: ...


def _continuous(
  kernel: _Kernel,
  f: Model,
  field: BatchField,
  *,
  times: Times,
  distance: Distance,
  weighting: Weighting,
) -> Loss:
  """The loss of a kernel at random times and noise.

  Raises: ValueError unless the weighting is positive and finite at r = t.
  """
  one = jnp.ones(1)
  if not 0 < float(weighting(one, one)[0]) < float('inf'):
    raise ValueError(
      'the weighting vanishes or is infinite where r = t, which is everywhere in '
      'continuous time; use weightings.uniform'
    )

  def loss(nets, batch, step, keys):
    t = times(keys['time'], len(batch.x0))
    z = draw_noise(keys, batch)
    return kernel(
      f,
      nets,
      field(nets, batch, z),
      perturb_batch(VE, batch, z, t, keys),
      distance=distance.bind(nets.perceptual),
      weighting=weighting,
    )

  return loss


def theorem3(
  f: Model,
  teacher: Model,
  *,
  times: Times,
  distance: Distance,
  weighting: Weighting,
  guidance: float = 1.0,
) -> Loss:
  """Continuous-time distillation by `true_loss` with a distance of degree 2.

  Raises: ValueError for a distance of degree 1, unless the weighting is positive and
    finite at r = t, or if guidance is not 1 and there are no labels.

  Source: Song et al. 2023, theorem 3.
  """
  if distance.degree != 2:
    raise ValueError(
      'Theorem 3 needs a distance with second derivatives at a = b: squared_l2 or '
      'pseudo_huber with c > 0; for norms use theorem4'
    )
  return _continuous(
    true_loss,
    f,
    teacher_field(VE, teacher, guidance),
    times=times,
    distance=distance,
    weighting=weighting,
  )


def theorem4(
  f: Model,
  teacher: Model,
  *,
  times: Times,
  distance: Distance,
  weighting: Weighting,
  guidance: float = 1.0,
) -> Loss:
  """Continuous-time distillation by `true_loss` with a norm, l1 or l2.

  l2 is `pseudo_huber` with c = 0.

  Raises: ValueError for a distance of degree 2, unless the weighting is positive and
    finite at r = t, or if guidance is not 1 and there are no labels.

  Source: Song et al. 2023, theorem 4 for l1; their released code uses l2.
  """
  if distance.degree != 1:
    raise ValueError(
      'Theorem 4 needs a norm, as its limit is zero for other distances: l1 or '
      'pseudo_huber with c = 0; for other distances use theorem3'
    )
  return _continuous(
    true_loss,
    f,
    teacher_field(VE, teacher, guidance),
    times=times,
    distance=distance,
    weighting=weighting,
  )


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

  Raises: ValueError unless the weighting is positive and finite at r = t, or if
    guidance is not 1 and there are no labels.

  Source: Song et al. 2023, theorem 5.
  """
  return _continuous(
    pseudo_loss,
    f,
    teacher_field(VE, teacher, guidance),
    times=times,
    distance=distance,
    weighting=weighting,
  )


def ct(f: Model, *, times: Times, distance: Distance, weighting: Weighting) -> Loss:
  """Continuous-time consistency training: the pseudo-objective of Theorem 6.

  Raises: ValueError unless the weighting is positive and finite at r = t.

  Source: Song et al. 2023, theorem 6.
  """
  return _continuous(
    pseudo_loss,
    f,
    conditional_field(VE),
    times=times,
    distance=distance,
    weighting=weighting,
  )
