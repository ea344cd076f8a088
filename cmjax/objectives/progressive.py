"""Progressive distillation: one step of the student for two of its teacher."""

import jax
import jax.numpy as jnp

from cmjax.core import Array, Key, Loss, LossOut, Model, Nets, Schedule, expand
from cmjax.distances import Distance, Weighting
from cmjax.fields import probability_flow
from cmjax.process import VE, data_of_velocity, point
from cmjax.solvers import euler
from cmjax.times import check_grid, karras_at


def two_for_one(
  f: Model,
  nets: Nets,
  x_t: Array,
  t: Array,
  middle: Array,
  r: Array,
  cond: Array | None,
  key: Key | None,
  *,
  distance: Distance,
  weighting: Weighting,
) -> LossOut:
  """w(t) d(D(x_t, t), the data that an Euler step to x_r must have aimed at).

  x_r is two Euler steps of the teacher, `nets.target`, from t over `middle` to r, all
  f32[B] with r < middle < t; x_t f32[B, ...].

  Source: Salimans & Ho 2022, algorithm 2; Song et al. 2023, appendix on baselines.
  """
  teacher = probability_flow(VE, lambda x, t: f(nets.target, x, t, cond))
  x_r = euler(teacher, euler(teacher, x_t, t, middle), middle, r)
  slope = (x_r - x_t) / expand(r - t, x_t)
  target = jax.lax.stop_gradient(data_of_velocity(VE, x_t, slope, t))
  y = f(nets.online, x_t, t, cond, key=key)
  return LossOut(weighting(t, r) * distance(y, target), {'t': t, 'gap': t - r})


def pd(
  f: Model,
  *,
  steps: Schedule,
  distance: Distance,
  weighting: Weighting,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Loss:
  """Progressive distillation on Karras grids of steps(step) sampling steps.

  The teacher is the target network: give `config.target_rate` as
  `schedules:copy_at_stages`, of the same stages as `steps`, and start from a diffusion
  model by `config.init_from`. f is a denoiser; sample it with `samplers.ode`, by Euler.

  Raises: ValueError unless 0 < sigma_min < sigma_max and rho > 0, or without a target
    network.

  Source: Salimans & Ho 2022, algorithm 2.
  Differs: the optimiser's state is kept from stage to stage.
  """
  check_grid(sigma_min, sigma_max, rho)
  grid = dict(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)

  def loss(nets, batch, step, keys):
    if nets.target is None:
      raise ValueError(
        'pd needs a target network, its teacher; give config.target_rate as '
        'cmjax.schedules:copy_at_stages'
      )
    n = steps(step)
    index = jax.random.randint(keys['time'], (len(batch.x0),), 0, n.astype(jnp.int32))
    t, middle, r = (karras_at(index + part, n + 1, **grid) for part in (0.0, 0.5, 1.0))
    z = jax.random.normal(keys['noise'], batch.x0.shape)
    return two_for_one(
      f,
      nets,
      point(VE, batch.x0, z, t),
      t,
      middle,
      r,
      batch.cond,
      keys['dropout'],
      distance=distance.given(nets.perceptual),
      weighting=weighting,
    )

  return loss
