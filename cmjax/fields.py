"""Which ODE: dx/dt f32[B, ...] as a function of x f32[B, ...] and t f32[B].

Denoisers are called on the variance-exploding process, like every model; a field is of
the process it is asked for.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax import process as processes
from cmjax.core import Array, Denoiser, Field, Key, Model, Params, expand


def conditional(process: processes.Process, x0: Array, z: Array) -> Field:
  """The straight path of one example: its own data and noise f32[B, ...].

  Source: Song et al. 2023, section 5: unbiased for the ODE's field given x_t.
  """
  return lambda x, t: processes.rate(process, x0, z, t)


def probability_flow(process: processes.Process, denoiser: Denoiser) -> Field:
  """The ODE of a denoiser E[x0 | x_t]: a teacher's, an oracle's or the model's own.

  Source: Song et al. 2021 (score SDE), eq. (13); EDM, eq. (1).
  """

  def field(x, t):
    x0 = denoiser(*processes.change_clock(process, processes.VE, x, t))
    return processes.velocity(process, x, x0, t)

  return field


def guided(conditional: Denoiser, unconditional: Denoiser, scale: float) -> Denoiser:
  """D_u + scale (D_c - D_u): a teacher with classifier-free guidance.

  Source: Ho & Salimans 2022, eq. (6), as EDM2 counts: 1 is no guidance.
  """

  def denoiser(x, t):
    without = unconditional(x, t)
    return without + scale * (conditional(x, t) - without)

  return denoiser


def teacher_denoiser(
  teacher: Model, params: Params, cond: Array | None, guidance: float = 1.0
) -> Denoiser:
  """The denoiser of a teacher network with labels f32[B, K], guided unless it is 1.

  Raises: ValueError for guidance without labels, or that is not finite.
  """
  checks.finite(guidance=guidance)

  def with_labels(x, t):
    return teacher(params, x, t, cond)

  if guidance == 1.0:
    return with_labels
  if cond is None:
    raise ValueError(f'guidance={guidance} needs labels; the data has none')
  dropped = jnp.zeros_like(cond)
  return guided(with_labels, lambda x, t: teacher(params, x, t, dropped), guidance)


def own_velocity(
  average_velocity: Callable[..., Array],
  params: Params,
  cond: Array | None,
  key: Key | None,
) -> Field:
  """The ODE of a two-time model itself, on its process: u(x, t, t).

  Source: Geng et al. 2025 (improved MeanFlow).
  """
  return lambda x, t: average_velocity(params, x, t, t, cond, key=key)


class Reference(NamedTuple):
  """Examples as stored, in one bucket a class; all of it lies on the device."""

  examples: Array  # uint8 or f32[K, N, ...], buckets filled up with zeros
  counts: Array  # i32[K] examples in a bucket
  slots: Array  # i32[M] place of each example of the source in its bucket, or -1
  offset: Array  # f32[]; x0 = (stored - offset) * scale
  scale: Array  # f32[]


def stable_denoiser(
  reference: Reference,
  x0: Array,
  cond: Array | None,
  index: Array,
  *,
  threshold: float,
  block: int,
) -> Denoiser:
  """E[x0 | x_t] estimated on a reference set: self-normalised importance weights.

  The weights are softmax_i(-|x_t - x_i|^2 / 2 t^2) over the bucket of the example's
  class. The example's own x0 is always among the x_i, in the place of its stored copy;
  where t <= `threshold` it is the only one. Works through `block` examples at a time
  with a running maximum, in float32 or better whatever the accelerator's default.

  Args:
    reference: the set; one bucket, or one a class.
    x0: the examples f32[B, ...] that x_t was made from.
    cond: one-hot labels f32[B, K]; None with a single bucket.
    index: i32[B] of the examples in the source.
    threshold: noise level below which the posterior is taken to be the example itself.
    block: how many examples are in memory as floats at a time, for each row.

  Raises: ValueError unless threshold >= 0 and block >= 1.

  Source: Xu et al. 2023 (STF), eq. (6); Wang et al. 2024 (Stable Consistency Tuning),
    section 4.1.
  """
  checks.not_negative(threshold=threshold)
  checks.whole(1, block=block)
  buckets, size = reference.examples.shape[:2]
  block = min(block, size)
  last = -(-size // block)

  def denoiser(x, t):
    shape, dtype = x.shape, x.dtype
    rows, own = (jnp.reshape(v, (len(x), -1)) for v in (x, x0))
    bucket = jnp.zeros(len(x), jnp.int32) if buckets == 1 else jnp.argmax(cond, axis=1)
    stored = jnp.reshape(reference.examples, (buckets, size, -1))
    slot, count = reference.slots[index], reference.counts[bucket]

    def logit(x, x_i, t):  # of one row and any number of x_i: |x|^2 drops out
      inner = jnp.matmul(x_i, x, precision='highest')
      return (inner - jnp.sum(x_i**2, axis=-1) / 2) / t**2

    def row_of_block(carry, x, t, block_of_row, slot, count, places):
      top, total, mean = carry
      inside = (places < count) & (places != slot)
      logits = jnp.where(inside, logit(x, block_of_row, t), -jnp.inf)
      higher = jnp.maximum(top, jnp.max(logits))
      kept, weights = jnp.exp(top - higher), jnp.exp(logits - higher)
      both = kept * total + jnp.sum(weights)
      added = jnp.matmul(weights, block_of_row, precision='highest')
      return higher, both, kept * mean + added

    def advance(i, carry):
      start = jnp.minimum(i * block, size - block)  # the last block may overlap
      places = start + jnp.arange(block)
      fresh = jnp.where(places >= i * block, places, size)
      found = jax.lax.dynamic_slice_in_dim(stored, start, block, axis=1)
      found = found[0] if buckets == 1 else found[bucket]
      found = (found.astype(dtype) - reference.offset) * reference.scale
      each = (0, 0, 0, None if buckets == 1 else 0, 0, 0, None)
      return jax.vmap(row_of_block, each)(carry, rows, t, found, slot, count, fresh)

    alone = jax.vmap(logit)(rows, own, t), jnp.ones_like(t), own
    _, total, mean = jax.lax.fori_loop(0, last, advance, alone)
    stable = jnp.where(expand(t > threshold, own), mean / expand(total, own), own)
    return jnp.reshape(stable, shape)

  return denoiser
