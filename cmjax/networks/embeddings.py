"""Embeddings of c_noise, of one time or of several."""

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.core import Array


def positional(c_noise: Array, channels: int, *, endpoint: bool = True) -> Array:
  """Sinusoidal embedding, in float32 or finer: f32[B] -> f32[B, channels].

  The K times of f32[B, K] are embedded separately and concatenated: f32[B, K *
  channels]. Frequencies run from 1 down to 1e-4, which is included with `endpoint`;
  sines come first.
  Source: NVlabs/edm `PositionalEmbedding` as `SongUNet` uses it.
  """
  half = channels // 2
  dtype = jnp.promote_types(c_noise.dtype, jnp.float32)
  frequencies = 1e-4 ** (jnp.arange(half, dtype=dtype) / (half - endpoint))
  return _sines_and_cosines(c_noise.astype(dtype), frequencies)


def fourier(c_noise: Array, frequencies: Array) -> Array:
  """Random Fourier features: f32[B] or f32[B, K], f32[F] -> f32[B, K * 2 F].

  Sines come first. The frequencies are constants: their gradient is zero.
  Source: Song et al. 2021 (score SDE), NCSN++.
  """
  frequencies = jax.lax.stop_gradient(frequencies)
  dtype = jnp.promote_types(c_noise.dtype, frequencies.dtype)
  return _sines_and_cosines(
    2 * np.pi * c_noise.astype(dtype), frequencies.astype(dtype)
  )


def magnitude_preserving(c_noise: Array, frequencies: Array, phases: Array) -> Array:
  """EDM2's Fourier features: f32[B] or f32[B, K], f32[F] twice -> f32[B, K * F].

  The frequencies and phases are constants: their gradients are zero.
  Source: Karras et al. 2024 (EDM2), eq. (75).
  """
  f, p = jax.lax.stop_gradient((frequencies, phases))
  dtype = jnp.promote_types(c_noise.dtype, f.dtype)
  times = jnp.reshape(c_noise.astype(dtype), (len(c_noise), -1, 1))
  angles = times * f.astype(dtype)[None, None, :] + p.astype(dtype)[None, None, :]
  return jnp.reshape(jnp.cos(angles) * 2**0.5, (len(c_noise), -1))


def _sines_and_cosines(times, frequencies):
  angles = jnp.reshape(times, (len(times), -1, 1)) * frequencies[None, None, :]
  embedded = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=2)
  return jnp.reshape(embedded, (len(times), -1))
