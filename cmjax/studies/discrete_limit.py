"""Discrete gradients against their continuous-time limit."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from cmjax import checks, distances, fields, times, weightings
from cmjax.core import LossOut, Nets, Noisy
from cmjax.objectives import consistency, continuous
from cmjax.process import VE, perturb
from cmjax.studies.study import Study, Subject, study


def discrete_limit(
  subject: Subject,
  *,
  num_scales: Sequence[int] = (64, 256, 1024, 4096, 16384),
  num_samples: int = 64,
  sigma_min: float = 0.01,
  sigma_max: float = 10.0,
) -> Study:
  """Relative distance between the discrete gradient and its limit, by grid size N.

  The discrete gradient is that of consistency training on a Karras grid of N noise
  levels, for the same data and noise at every N. With squared l2, N - 1 times it is
  compared with the gradient of Theorem 6 at the lower time of the pair; with the l2
  norm, the gradient itself is compared with that along the normalised tangent. For
  large N, float32 rounding dominates.

  Raises: ValueError if num_scales is empty or has an N below 2, if num_samples < 1, or
    unless 0 < sigma_min < sigma_max.

  Source: Song et al. 2023, theorem 6.
  """
  checks.whole(1, num_samples=num_samples)
  if not num_scales:
    raise ValueError('num_scales must not be empty')
  for n in num_scales:
    checks.whole(2, num_scales=n)
  times.check_grid(sigma_min, sigma_max, rho=7.0)
  keys = jax.random.split(jax.random.key(3), 3)
  index = jax.random.randint(keys[0], (num_samples,), 0, len(subject.x0))
  cond = None if subject.cond is None else subject.cond[index]
  x0, z = subject.x0[index], jax.random.normal(keys[2], subject.x0[index].shape)
  u = jax.random.uniform(keys[1], (num_samples,), maxval=0.99)
  field = fields.conditional(VE, x0, z)

  def time(u):
    return times.karras_time(u, sigma_min=sigma_min, sigma_max=sigma_max)

  def noisy(t):
    return Noisy(perturb(VE, x0, z, t), t, cond, None)

  def gradient(loss: Callable[[Nets], LossOut]):
    def value(params):
      return jnp.mean(loss(subject.nets._replace(online=params, target=None)).loss)

    return jax.jit(jax.grad(value))(subject.nets.online)

  r, dt_du = jax.jvp(time, (u,), (jnp.ones_like(u),))
  # Column, distance, weighting of the limit, and the scale of the discrete gradient.
  cases = (
    ('squared_l2', distances.squared_l2(), lambda t, r: dt_du, lambda n: n - 1),
    ('l2', distances.pseudo_huber(), weightings.uniform(), lambda n: 1),
  )
  rows: list[dict[str, float]] = [{'N': int(n)} for n in num_scales]
  for name, distance, weighting, factor in cases:
    limit = gradient(
      lambda nets, d=distance, w=weighting: continuous.pseudo_loss(
        subject.f, nets, field, noisy(r), distance=d, weighting=w
      )
    )
    for n, row in zip(num_scales, rows):
      t = time(u + 1 / (n - 1))
      discrete = gradient(
        lambda nets, t=t, d=distance: consistency.pair_loss(
          subject.f,
          nets,
          noisy(t),
          noisy(r).x,
          r,
          distance=d,
          weighting=weightings.uniform(),
        )
      )
      scaled = optax.tree.scale(factor(n), discrete)
      difference = optax.tree.norm(optax.tree.sub(scaled, limit))
      row[name] = float(difference / optax.tree.norm(limit))
  return study(
    'Discrete gradient against its continuous-time limit',
    rows,
    'N',
    ('squared_l2', 'l2'),
    {
      'N': 'noise levels of the Karras grid',
      'squared_l2': 'squared l2: relative distance of (N - 1) times the gradient '
      'from that of Theorem 6',
      'l2': 'l2 norm: relative distance of the gradient from that along the normalised '
      'tangent',
    },
  )
