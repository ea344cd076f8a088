"""Which ODE: dx/dt f32[B, ...] as a function of x f32[B, ...] and t f32[B]."""

from cmjax import process as processes
from cmjax.core import Array, Denoiser, Field


def conditional(process: processes.Process, x0: Array, z: Array) -> Field:
  """The straight path of one example: its own data and noise f32[B, ...].

  Source: Song et al. 2023, section 5: unbiased for the ODE's field given x_t.
  """
  return lambda x, t: processes.rate(process, x0, z, t)


def probability_flow(process: processes.Process, denoiser: Denoiser) -> Field:
  """The ODE of a denoiser E[x0 | x_t]: a teacher's, an oracle's or the model's own.

  Source: Song et al. 2021 (score SDE), eq. (13); EDM, eq. (1).
  """
  return lambda x, t: processes.velocity(process, x, denoiser(x, t), t)
