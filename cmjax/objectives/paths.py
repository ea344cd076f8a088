"""Noise, noisy examples and ODE fields, shared by the objectives."""

from collections.abc import Callable, Mapping

import jax

from cmjax import checks
from cmjax.core import Array, Batch, Field, Key, Model, Nets, Noisy
from cmjax.fields import conditional, probability_flow, teacher_denoiser
from cmjax.process import Process, perturb

BatchField = Callable[[Nets, Batch, Array], Field]  # (nets, batch, z) -> field


def draw_noise(keys: Mapping[str, Key], batch: Batch) -> Array:
  """z ~ N(0, I) f32[B, ...] for each example of the batch."""
  return jax.random.normal(keys['noise'], batch.x0.shape)


def perturb_batch(
  process: Process, batch: Batch, z: Array, t: Array, keys: Mapping[str, Key]
) -> Noisy:
  """The batch with noise z f32[B, ...] at times t f32[B] of a process."""
  return Noisy(perturb(process, batch.x0, z, t), t, batch.cond, keys['dropout'])


def conditional_field(process: Process) -> BatchField:
  """The conditional velocity of each example's own data and noise."""
  return lambda nets, batch, z: conditional(process, batch.x0, z)


def teacher_field(process: Process, teacher: Model, guidance: float) -> BatchField:
  """The probability-flow ODE of a teacher, guided unless guidance is 1.

  Raises: ValueError if guidance is not finite.
  """
  checks.finite(guidance=guidance)

  def batch_field(nets, batch, z):
    denoiser = teacher_denoiser(teacher, nets.teacher, batch.cond, guidance)
    return probability_flow(process, denoiser)

  return batch_field
