"""Progressive distillation: one step of the student matches two steps of its teacher.

The process is variance exploding, x_t = x0 + t z, so t and r are noise levels sigma.
"""

import jax
import jax.numpy as jnp

from cmjax.core import Array, Loss, LossOut, Model, Nets, Noisy, Schedule, expand
from cmjax.distances import Distance
from cmjax.fields import probability_flow
from cmjax.objectives.paths import draw_noise, perturb_batch
from cmjax.process import VE, data_of_velocity
from cmjax.solvers import euler
from cmjax.times import check_grid, karras_at
from cmjax.weightings import Weighting


def progressive_loss(
  f: Model,
  nets: Nets,
  noisy: Noisy,
  middle: Array,
  r: Array,
  *,
  distance: Distance,
  weighting: Weighting,
) -> LossOut:
  """w(t, r) d(D(x_t, t), sg x0'), where one Euler step with x0' as D leads to x_r.

  x_r results from two Euler steps of the teacher, `nets.target`, from t to `middle` and
  from there to r, all f32[B] with r < middle < t.

  Source: Salimans & Ho 2022, algorithm 2; Song et al. 2023, appendix on baselines.
  """
  x_t, t, cond, key = noisy
  teacher = probability_flow(VE, lambda x, t: f(nets.target, x, t, cond))
  x_r = euler(teacher, euler(teacher, x_t, t, middle), middle, r)
  slope = (x_r - x_t) / expand(r - t, x_t)
  target = jax.lax.stop_gradient(data_of_velocity(VE, x_t, slope, t))
  y = f(nets.online, x_t, t, cond, key=key)
  return LossOut(weighting(t, r) * distance(y, target), {'sigma': t, 'gap': t - r})


def pd(
  f: Model,
  *,
  num_steps: Schedule,
  distance: Distance,
  weighting: Weighting,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Loss:
  """Progressive distillation on Karras grids of num_steps(step) sampling steps.

  The teacher is the target network, whose decay must be `schedules.copy_at_stages`
  with the same stages as `num_steps`. Start from the parameters of a diffusion model. f
  is a denoiser; sample it by `diffusion_samplers.ode` with solver 'euler'.

  Raises: ValueError unless 0 < sigma_min < sigma_max and rho > 0, or without a target
    network.

  Source: Salimans & Ho 2022, algorithm 2.
  Differs: the state of the optimiser is not reset between stages.
  """
  check_grid(sigma_min, sigma_max, rho)
  grid = dict(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)

  def loss(nets, batch, step, keys):
    if nets.target is None:
      raise ValueError(
        'pd needs a target network, and Nets.target is None; use '
        'schedules.copy_at_stages as the target decay'
      )
    n = num_steps(step)
    index = jax.random.randint(keys['time'], (len(batch.x0),), 0, n.astype(jnp.int32))
    t, middle, r = (karras_at(index + part, n + 1, **grid) for part in (0.0, 0.5, 1.0))
    z = draw_noise(keys, batch)
    return progressive_loss(
      f,
      nets,
      perturb_batch(VE, batch, z, t, keys),
      middle,
      r,
      distance=distance.bind(nets.perceptual),
      weighting=weighting,
    )

  return loss
