"""Fields of ODEs: dx/dt f32[B, ...] as a function of x f32[B, ...] and t f32[B].

A denoiser takes x and sigma of the VE process, as every model does; a field takes x and
t of the process that it was built for.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Array, Denoiser, Field, Key, Model, Params, expand
from cmjax.process import (
  VE,
  Process,
  change_process,
  conditional_velocity,
  marginal_velocity,
)


def conditional(process: Process, x0: Array, z: Array) -> Field:
  """The velocity of each example's path, given its data and noise f32[B, ...].

  Source: Song et al. 2023, section 5: its mean given x_t is the ODE's field.
  """
  return lambda x, t: conditional_velocity(process, x0, z, t)


def probability_flow(process: Process, denoiser: Denoiser) -> Field:
  """The probability-flow ODE of a denoiser E[x0 | x_t], such as a teacher's.

  Source: Song et al. 2021 (score SDE), eq. (13); EDM, eq. (1).
  """

  def field(x, t):
    x0 = denoiser(*change_process(process, VE, x, t))
    return marginal_velocity(process, x, x0, t)

  return field


def guided(with_label: Denoiser, without_label: Denoiser, guidance: float) -> Denoiser:
  """D_u + guidance (D_c - D_u): classifier-free guidance; D_u is without label.

  Source: Ho & Salimans 2022, eq. (6), in the convention of EDM2: guidance = 1 is D_c.
  """

  def denoiser(x, sigma):
    unconditional = without_label(x, sigma)
    return unconditional + guidance * (with_label(x, sigma) - unconditional)

  return denoiser


def teacher_denoiser(
  teacher: Model, params: Params, cond: Array | None, guidance: float = 1.0
) -> Denoiser:
  """A teacher network with labels f32[B, K] as a denoiser, guided if guidance != 1.

  Raises: ValueError if guidance is not finite, or is not 1 and there are no labels.
  """
  checks.finite(guidance=guidance)

  def with_label(x, sigma):
    return teacher(params, x, sigma, cond)

  if guidance == 1.0:
    return with_label
  if cond is None:
    raise ValueError(f'guidance={guidance} needs labels, and cond is None')
  no_label = jnp.zeros_like(cond)
  return guided(with_label, lambda x, s: teacher(params, x, s, no_label), guidance)


def model_velocity(
  average_velocity: Callable[..., Array],
  params: Params,
  cond: Array | None,
  key: Key | None,
) -> Field:
  """The marginal velocity that a two-time model has learned: u(x, t, t).

  Source: Geng et al. 2025 (improved MeanFlow).
  """
  return lambda x, t: average_velocity(params, x, t, t, cond, key=key)


class Reference(NamedTuple):
  """A reference set grouped by class, kept on the device in the dtype of the data."""

  examples: Array  # uint8 or f32[K, N, ...], each class padded with zeros to N examples
  counts: Array  # i32[K] number of examples of each class
  slots: Array  # i32[M] position in its class of each data set example, or -1
  offset: Array  # f32[]; x0 = (stored - offset) * scale
  scale: Array  # f32[]


def stable_denoiser(
  reference: Reference,
  x0: Array,
  cond: Array | None,
  indices: Array,
  *,
  sigma_threshold: float,
  block_size: int,
) -> Denoiser:
  """E[x0 | x_t] estimated on a reference set: self-normalised importance weights.

  The weights are softmax_i(-|x_t - x_i|^2 / 2 sigma^2) over the examples x_i of the
  same class and the example's own x0, which replaces its stored copy if there is one.
  Where sigma <= `sigma_threshold` the estimate is x0. To bound memory, `block_size`
  examples are converted to floats at a time (online softmax). Inner products are
  in full float32 precision on all accelerators.

  Args:
    reference: the reference set; its K is 1, or the number of classes.
    x0: f32[B, ...], the examples that x_t was made from.
    cond: one-hot labels f32[B, K]; not used if the reference set has one class.
    indices: i32[B], positions of the examples in the data set.
    sigma_threshold: noise level up to which the estimate is the example itself.
    block_size: number of reference examples per block, for each row of the batch.

  Raises: ValueError unless sigma_threshold >= 0 and block_size >= 1, or if the
    reference set has several classes and there are no labels.

  Source: Xu et al. 2023 (STF), eq. (6); Wang et al. 2024 (Stable Consistency Tuning),
    section 4.1.
  """
  checks.not_negative(sigma_threshold=sigma_threshold)
  checks.whole(1, block_size=block_size)
  num_classes, size = reference.examples.shape[:2]
  block_size = min(block_size, size)
  num_blocks = -(-size // block_size)
  if num_classes == 1:
    classes = jnp.zeros(len(x0), jnp.int32)
  elif cond is None:
    raise ValueError(f'a reference set of {num_classes} classes needs labels')
  else:
    classes = jnp.argmax(cond, axis=1)

  def denoiser(x, sigma):
    shape, dtype = x.shape, x.dtype
    flat_x, flat_x0 = (jnp.reshape(v, (len(x), -1)) for v in (x, x0))
    stored = jnp.reshape(reference.examples, (num_classes, size, -1))
    slots, counts = reference.slots[indices], reference.counts[classes]

    def logit(x, x_i, sigma):  # of one row and any number of x_i; |x|^2 cancels
      inner = jnp.matmul(x_i, x, precision='highest')
      return (inner - jnp.sum(x_i**2, axis=-1) / 2) / sigma**2

    def add_block(carry, row, block, positions):
      """The running maximum, sum of weights and weighted sum of one row."""
      (maximum, total, weighted), (x, sigma, slot, count) = carry, row
      valid = (positions < count) & (positions != slot)
      logits = jnp.where(valid, logit(x, block, sigma), -jnp.inf)
      new_maximum = jnp.maximum(maximum, jnp.max(logits))
      rescale, weights = jnp.exp(maximum - new_maximum), jnp.exp(logits - new_maximum)
      new_total = rescale * total + jnp.sum(weights)
      added = jnp.matmul(weights, block, precision='highest')
      return new_maximum, new_total, rescale * weighted + added

    def body(i, carry):
      # The last block may overlap the one before; repeated examples get an invalid
      # position.
      start = jnp.minimum(i * block_size, size - block_size)
      positions = start + jnp.arange(block_size)
      positions = jnp.where(positions >= i * block_size, positions, size)
      block = jax.lax.dynamic_slice_in_dim(stored, start, block_size, axis=1)
      block = block[0] if num_classes == 1 else block[classes]
      block = (block.astype(dtype) - reference.offset) * reference.scale
      axes = (0, 0, None if num_classes == 1 else 0, None)
      rows = flat_x, sigma, slots, counts
      return jax.vmap(add_block, axes)(carry, rows, block, positions)

    start = jax.vmap(logit)(flat_x, flat_x0, sigma), jnp.ones_like(sigma), flat_x0
    _, total, weighted = jax.lax.fori_loop(0, num_blocks, body, start)
    mean = weighted / expand(total, flat_x0)
    stable = jnp.where(expand(sigma > sigma_threshold, flat_x0), mean, flat_x0)
    return jnp.reshape(stable, shape)

  return denoiser
