"""Discrete-time consistency objectives: f must agree at two points of one ODE path.

The process is variance exploding, x_t = x0 + t z, so t and r are noise levels sigma.
All objectives are `pair_loss` with different pairs (t, r), points x_r, distances and
weightings.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import (
  Array,
  Loss,
  LossOut,
  Model,
  Nets,
  Noisy,
  Schedule,
  Solver,
  expand,
  sum_features,
)
from cmjax.distances import Distance, pseudo_huber
from cmjax.fields import probability_flow, stable_denoiser
from cmjax.objectives.paths import BatchField, draw_noise, perturb_batch, teacher_field
from cmjax.process import VE
from cmjax.solvers import by_name, euler
from cmjax.times import (
  Pairs,
  Times,
  check_edges,
  check_pairs,
  ect_pairs,
  lognormal_pairs,
)
from cmjax.weightings import Weighting, inverse_gap


def pair_loss(
  f: Model,
  nets: Nets,
  noisy: Noisy,
  x_r: Array,
  r: Array,
  *,
  distance: Distance,
  weighting: Weighting,
) -> LossOut:
  """w(t, r) d(f(x_t, t), sg f^-(x_r, r)), with x_r f32[B, ...] at 0 <= r <= t f32[B].

  Both evaluations share the dropout key, so that the loss is exactly zero where r = t.
  Where r = 0 the target is x_r, the boundary condition f(x, 0) = x; the network is not
  evaluated there, as c_noise is ln 0.

  Source: Song et al. 2023, eqs. (7) and (10); Geng et al. 2024 (ECT).
  """
  x_t, t, cond, key = noisy
  y = f(nets.online, x_t, t, cond, key=key)
  positive = r > 0
  target = f(nets.target_params(), x_r, jnp.where(positive, r, t), cond, key=key)
  target = jax.lax.stop_gradient(jnp.where(expand(positive, x_r), target, x_r))
  defect = jnp.sqrt(sum_features((y - target) ** 2))
  aux = {'sigma': t, 'gap': t - r, 'defect': defect}
  return LossOut(weighting(t, r) * distance(y, target), aux)


def ct(f: Model, *, pairs: Pairs, distance: Distance, weighting: Weighting) -> Loss:
  """Consistency training: x_t = x0 + t z and x_r = x0 + r z.

  f^- is the target network, or the stop-gradient of f without one.

  Raises: ValueError unless all pairs have 0 <= r < t.

  Source: Song et al. 2023, algorithm 3.
  """
  check_pairs(pairs)

  def loss(nets, batch, step, keys):
    x0, z = batch.x0, draw_noise(keys, batch)
    t, r = pairs(keys['time'], len(x0), step)
    x_t = x0 + expand(t, z) * z
    x_r = x0 + expand(r, z) * z
    return pair_loss(
      f,
      nets,
      Noisy(x_t, t, batch.cond, keys['dropout']),
      x_r,
      r,
      distance=distance.bind(nets.perceptual),
      weighting=weighting,
    )

  return loss


def ect(
  f: Model,
  *,
  times: Times,
  relative_gap: Schedule,
  distance: Distance,
  weighting: Weighting,
  k: float = 8.0,
  b: float = 1.0,
) -> Loss:
  """Easy Consistency Tuning: `ct` with r(t, step) that approaches t during training.

  r is `times.neighbour` of t at relative_gap(step), k and b. The paper has no target
  network: f^- is the stop-gradient of f.

  Raises: ValueError unless all pairs have 0 <= r < t.

  Source: Geng et al. 2024 (ECT); locuslab/ect `loss.py`.
  Differs: a zero distance has a zero gradient; locuslab/ect replaces NaN afterwards.
  """
  pairs = ect_pairs(times=times, relative_gap=relative_gap, k=k, b=b)
  return ct(f, pairs=pairs, distance=distance, weighting=weighting)


def ict(
  f: Model,
  *,
  num_scales: Schedule,
  c: float,
  mean: float = -1.1,
  std: float = 2.0,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Loss:
  """Improved consistency training (iCT).

  `ct` with lognormal t, the pseudo-Huber distance and w = 1 / (t - r).
  In the paper c = 0.00054 sqrt(features), and f^- is the stop-gradient of f.

  Raises: ValueError unless 0 < sigma_min < sigma_max, rho > 0, std > 0 and c >= 0.

  Source: Song & Dhariwal 2023 (iCT), table 1.
  """
  pairs = lognormal_pairs(
    num_scales=num_scales,
    mean=mean,
    std=std,
    sigma_min=sigma_min,
    sigma_max=sigma_max,
    rho=rho,
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
  """Consistency distillation: x_r is one solver step along the teacher's ODE.

  `solver` is 'heun' or 'euler'. With guidance != 1 the teacher is evaluated with and
  without labels.

  Raises: ValueError for any other solver, or unless all pairs have 0 <= r < t, for
    'heun' 0 < r < t, or if guidance is not 1 and there are no labels.

  Source: Song et al. 2023, algorithm 2, and section 6 for Heun.
  """
  check_pairs(pairs, above=solver == 'heun')
  field = teacher_field(VE, teacher, guidance)
  step = by_name(solver)
  return _along(f, field, step, pairs, distance=distance, weighting=weighting)


def stable_ct(
  f: Model,
  *,
  times: Times,
  relative_gap: Schedule,
  distance: Distance,
  weighting: Weighting,
  sigma_threshold: float,
  block_size: int = 256,
  edges: Sequence[float] = (),
  k: float = 8.0,
  b: float = 1.0,
) -> Loss:
  """Stable Consistency Tuning: `ect` with the ODE estimated on a reference set.

  x_r is an Euler step along the ODE of `fields.stable_denoiser` on `nets.reference`,
  which is the example's own path where t <= sigma_threshold.

  With `edges`, ascending noise levels, the model is phased: in each segment between
  edges it learns the ODE's solution at the lower edge. It predicts this by a DDIM step
  with f as data prediction; sample with `samplers.phased` and the same edges.

  Raises: ValueError unless all pairs have 0 <= r < t, edges are positive and ascend,
    sigma_threshold >= 0 and block_size >= 1, or without a reference set.

  Source: Wang et al. 2024 (Stable Consistency Tuning), sections 4.1 to 4.4, with the
    estimator of Xu et al. 2023 (STF), eq. (6).
  """
  check_edges(edges)
  checks.not_negative(sigma_threshold=sigma_threshold)
  checks.whole(1, block_size=block_size)
  pairs = ect_pairs(times=times, relative_gap=relative_gap, k=k, b=b)
  check_pairs(pairs)

  def stable_field(nets, batch, z):
    if nets.reference is None:
      raise ValueError('stable_ct needs a reference set, and Nets.reference is None')
    if batch.indices is None:
      raise ValueError('stable_ct needs Batch.indices, the positions of the examples')
    denoiser = stable_denoiser(
      nets.reference,
      batch.x0,
      batch.cond,
      batch.indices,
      sigma_threshold=sigma_threshold,
      block_size=block_size,
    )
    return probability_flow(VE, denoiser)

  return _along(
    f,
    stable_field,
    euler,
    pairs,
    distance=distance,
    weighting=weighting,
    edges=tuple(edges),
  )


def _along(
  f: Model,
  field: BatchField,
  solver: Solver,
  pairs: Pairs,
  *,
  distance: Distance,
  weighting: Weighting,
  edges: tuple[float, ...] = (),
) -> Loss:
  """`pair_loss` whose x_r is one solver step from x_t along a field."""

  def loss(nets, batch, step, keys):
    z = draw_noise(keys, batch)
    t, r = pairs(keys['time'], len(batch.x0), step)
    model, r = _phased(f, edges, t, r) if edges else (f, r)
    noisy = perturb_batch(VE, batch, z, t, keys)
    x_r = solver(field(nets, batch, z), noisy.x, t, r)
    return pair_loss(
      model,
      nets,
      noisy,
      x_r,
      r,
      distance=distance.bind(nets.perceptual),
      weighting=weighting,
    )

  return loss


def _phased(
  f: Model, edges: tuple[float, ...], t: Array, r: Array
) -> tuple[Model, Array]:
  """The DDIM step by f from t to the lower edge s of its segment, and max(r, s) f32[B].

  Source: Wang et al. 2024 (phased consistency models), eq. (8).
  """
  bounds = jnp.asarray((0.0, *edges), t.dtype)
  s = bounds[jnp.sum(t[:, None] > bounds[None, :], axis=1) - 1]

  def to_edge(params, x, t, cond, *, key=None):
    ratio = expand(s / t, x)
    return ratio * x + (1.0 - ratio) * f(params, x, t, cond, key=key)

  return to_edge, jnp.maximum(r, s)
