"""Discrete consistency objectives: two neighbours on one ODE path must agree.

Each builder chooses which pairs of times, which field, which solver step, which
distance and which weighting; the kernel `pair` is shared by all.
"""

from collections.abc import Callable, Sequence

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
  Solver,
  expand,
  sum_features,
)
from cmjax.distances import Distance, Weighting, inverse_gap, pseudo_huber
from cmjax.fields import (
  conditional,
  probability_flow,
  stable_denoiser,
  teacher_denoiser,
)
from cmjax.process import VE, point
from cmjax.solvers import by_name, euler
from cmjax.times import (
  Pairs,
  Times,
  check_edges,
  check_pairs,
  ect_pairs,
  lognormal_pairs,
)

FieldOf = Callable[[Nets, Batch, Array], Field]  # (nets, batch, z) -> field


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
  target = f(nets.fixed(), x_r, jnp.where(inside, r, t), cond, key=key)
  target = jax.lax.stop_gradient(jnp.where(expand(inside, x_r), target, x_r))
  aux = {'t': t, 'gap': t - r, 'defect': jnp.sqrt(sum_features((y - target) ** 2))}
  return LossOut(weighting(t, r) * distance(y, target), aux)


def _on_pairs(
  f: Model,
  pairs: Pairs,
  solver: Solver,
  distance: Distance,
  weighting: Weighting,
  field_of: FieldOf,
  edges: Sequence[float] = (),
) -> Loss:
  """Draws times and noise, and hands the pair to the kernel."""
  check_pairs(pairs)

  def loss(nets, batch, step, keys):
    x0 = batch.x0
    t, r = pairs(keys['time'], len(x0), step)
    z = jax.random.normal(keys['noise'], x0.shape)
    model, r = _phased(f, edges, t, r) if edges else (f, r)
    return pair(
      model,
      nets,
      field_of(nets, batch, z),
      point(VE, x0, z, t),
      t,
      r,
      batch.cond,
      keys['dropout'],
      solver=solver,
      distance=distance.given(nets.perceptual),
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

  Raises: ValueError where the gap does not make r < t.

  Source: Geng et al. 2024 (ECT); locuslab/ect `loss.py`.
  Differs: a zero distance has a zero gradient there, not NaN cleaned afterwards.
  """
  pairs = ect_pairs(times=times, gap=gap, k=k, b=b)
  return _on_pairs(f, pairs, euler, distance, weighting, _own_path)


def ct(f: Model, *, pairs: Pairs, distance: Distance, weighting: Weighting) -> Loss:
  """Consistency training: neighbours of a grid that grows with the step.

  Both points share data and noise; the target network is `nets.target`.

  Raises: ValueError unless the pairs have r < t.

  Source: Song et al. 2023, algorithm 3.
  """
  return _on_pairs(f, pairs, euler, distance, weighting, _own_path)


def ict(
  f: Model,
  *,
  bins: Schedule,
  c: float,
  mean: float = -1.1,
  std: float = 2.0,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Loss:
  """Improved consistency training: `ct` with lognormal bins, pseudo-Huber, 1 / (t - r).

  c is 0.00054 sqrt(features) in the paper; the target is the stop-gradient of online.

  Raises: ValueError unless the pairs have r < t.

  Source: Song & Dhariwal 2023 (iCT), table 1.
  """
  pairs = lognormal_pairs(
    bins=bins, mean=mean, std=std, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho
  )
  return ct(f, pairs=pairs, distance=pseudo_huber(c=c), weighting=inverse_gap())


def cd(
  f: Model,
  teacher: Model,
  *,
  pairs: Pairs,
  distance: Distance,
  weighting: Weighting,
  solver: str = 'heun',
  guidance: float = 1.0,
) -> Loss:
  """Consistency distillation: one solver step of the teacher's ODE to the neighbour.

  `solver` is 'heun' or 'euler'; a `guidance` other than 1 asks the teacher with and
  without the label.

  Raises: ValueError for another solver, pairs without r < t or, by Heun, with r = 0,
    where the field does not exist, or guidance of a model without labels.

  Source: Song et al. 2023, algorithm 2, and section 6 for Heun.
  """
  checks.finite(guidance=guidance)

  def teacher_flow(nets, batch, z):
    return probability_flow(
      VE, teacher_denoiser(teacher, nets.teacher, batch.cond, guidance)
    )

  check_pairs(pairs, above=solver == 'heun')
  return _on_pairs(f, pairs, by_name(solver), distance, weighting, teacher_flow)


def stable_ct(
  f: Model,
  *,
  times: Times,
  gap: Schedule,
  distance: Distance,
  weighting: Weighting,
  threshold: float,
  block: int = 256,
  edges: Sequence[float] = (),
  k: float = 8.0,
  b: float = 1.0,
) -> Loss:
  """Stable Consistency Tuning: `ect` along the averaged path of a reference set.

  Needs `config.reference`. Where t > `threshold` the step follows the posterior mean
  over the reference examples of the class, else the example's own path; `block`
  examples are worked through at a time (`fields.stable_denoiser`).

  With `edges`, ascending noise levels, the model is phased: in each segment it is
  trained to agree on the point at the segment's lower edge, for `samplers.phased` with
  the same edges. f is then the jump's data prediction, with its boundary at zero.

  Raises: ValueError where the gap does not make r < t, for edges that do not ascend or
    are not positive, or without a reference set.

  Source: Wang et al. 2024 (Stable Consistency Tuning), sections 4.1 to 4.4; their
    equations are not public, the estimator is that of Xu et al. 2023 (STF), eq. (6).
  """
  check_edges(edges)
  checks.not_negative(threshold=threshold)
  checks.whole(1, block=block)

  def stable_flow(nets, batch, z):
    if nets.reference is None:
      raise ValueError(
        'stable_ct needs a reference set; give config.reference, such as '
        "dict(fn='cmjax.data:reference')"
      )
    denoiser = stable_denoiser(
      nets.reference,
      batch.x0,
      batch.cond,
      batch.index,
      threshold=threshold,
      block=block,
    )
    return probability_flow(VE, denoiser)

  pairs = ect_pairs(times=times, gap=gap, k=k, b=b)
  return _on_pairs(f, pairs, euler, distance, weighting, stable_flow, tuple(edges))


def _phased(
  f: Model, edges: tuple[float, ...], t: Array, r: Array
) -> tuple[Model, Array]:
  """The jump to the segment's lower edge s, and r not below it.

  Source: Wang et al. 2024 (phased consistency models), eq. (8), with DDIM's jump.
  """
  bounds = jnp.asarray((0.0, *edges), t.dtype)
  s = bounds[jnp.sum(t[:, None] > bounds[None, :], axis=1) - 1]

  def jump(params, x, t, cond, *, key=None):
    share = expand(s / t, x)
    return share * x + (1.0 - share) * f(params, x, t, cond, key=key)

  return jump, jnp.maximum(r, s)
