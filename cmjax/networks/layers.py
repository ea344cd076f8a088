"""Layers and the one way in which a linen module becomes a `Network`."""

import flax.linen as nn
import jax.numpy as jnp

from cmjax.core import Array, Network


def as_network(module: nn.Module) -> Network:
  """Wraps a linen module called as `module(x, c_noise, cond, deterministic)`."""

  def init(key, x, c_noise, cond):
    return module.init(key, x, c_noise, cond, deterministic=True)['params']

  def apply(params, x, c_noise, cond, *, key=None):
    rngs = None if key is None else {'dropout': key}
    return module.apply(
      {'params': params}, x, c_noise, cond, deterministic=key is None, rngs=rngs
    )

  return Network(init, apply)


def positional_embedding(c_noise: Array, channels: int) -> Array:
  """Sinusoids of the noise level, always in float32: f32[B] -> f32[B, channels].

  Frequencies run from 1 down to 1e-4, both included; sines come first.
  Source: NVlabs/edm `PositionalEmbedding(endpoint=True)` as `SongUNet` uses it.
  """
  half = channels // 2
  frequencies = (1e-4) ** (jnp.arange(half, dtype=jnp.float32) / (half - 1))
  angles = c_noise.astype(jnp.float32)[:, None] * frequencies[None, :]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
