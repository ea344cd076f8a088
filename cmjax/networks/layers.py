"""Layers and the one way in which a linen module becomes a `Network`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cmjax.core import LOG_WEIGHT, Array, Network

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


def as_network(
  module: nn.Module, *, clocks: int = 1, log_weight: bool = False
) -> Network:
  """Wraps a linen module called as `module(x, c_noise, cond, deterministic)`.

  With `log_weight` the parameters hold one more entry, `log_weight` f32[32]: a Fourier
  series in c_noise that an objective may learn as the logarithm of its weighting, zero
  at first.

  Raises: ValueError for fewer than one clock, or a weighting of several.
  """
  if clocks < 1 or (log_weight and clocks > 1):
    raise ValueError(f'clocks must be 1, or more without {log_weight=}; got {clocks=}')

  def init(key, x, c_noise, cond):
    params = module.init(key, x, c_noise, cond, deterministic=True)['params']
    return params | {LOG_WEIGHT: jnp.zeros(32)} if log_weight else params

  def apply(params, x, c_noise, cond, *, key=None):
    rngs = None if key is None else {'dropout': key}
    return module.apply(
      {'params': params}, x, c_noise, cond, deterministic=key is None, rngs=rngs
    )

  return Network(init, apply, clocks, _series if log_weight else None)


def _series(params, c_noise):
  """Source: the form is a cmjax choice; the idea Karras et al. 2024 (EDM2), sec. B."""
  angles = c_noise[:, None] * jnp.arange(1.0, 17.0)[None, :]
  waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
  return jnp.matmul(waves, params[LOG_WEIGHT])


def check(*, dropout: float, dtype: str, **sizes: int) -> None:
  """Refuses what would build a network that cannot work.

  Raises: ValueError for a size below 1, dropout outside [0, 1), or an unknown dtype.
  """
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f'{name} must be at least 1, got {size}')
  if not 0 <= dropout < 1:
    raise ValueError(f'dropout must be in [0, 1), got {dropout}')
  if dtype not in DTYPES:
    raise ValueError(f'dtype must be one of {", ".join(DTYPES)}, got {dtype!r}')


def refuse_missing_labels(module: nn.Module, cond: Array | None) -> None:
  """Raises ValueError where parameters for labels exist, and no labels are given."""
  if cond is None and module.has_variable('params', 'map_label'):
    raise ValueError('this network was trained with labels, and none are given')


def positional_embedding(c_noise: Array, channels: int) -> Array:
  """Sinusoids of the noise level, never below float32: f32[B] -> f32[B, channels].

  Of f32[B, K] the K embeddings one after the other: f32[B, K * channels]. Frequencies
  run from 1 down to 1e-4, both included; sines come first.
  Source: NVlabs/edm `PositionalEmbedding(endpoint=True)` as `SongUNet` uses it.
  """
  half = channels // 2
  dtype = jnp.promote_types(c_noise.dtype, jnp.float32)
  frequencies = 1e-4 ** (jnp.arange(half, dtype=dtype) / (half - 1))
  clocks = jnp.reshape(c_noise.astype(dtype), (c_noise.shape[0], -1, 1))
  angles = clocks * frequencies[None, None, :]
  embedded = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=2)
  return jnp.reshape(embedded, (c_noise.shape[0], -1))


def attention(q: Array, k: Array, v: Array) -> Array:
  """softmax(q k / sqrt(C)) v: q, k and v [B, T, heads, C] -> [B, T, heads, C].

  Source: Vaswani et al. 2017, eq. (1).
  Differs: from `jax.nn.dot_product_attention`, whose softmax rounds float64 to float32
    and which may choose a kernel that `jax.jvp` refuses.
  """
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.einsum('btnc,bsnc->bnts', q, k, preferred_element_type=dtype)
  shares = jax.nn.softmax(logits / q.shape[-1] ** 0.5, axis=-1).astype(q.dtype)
  return jnp.einsum('bnts,bsnc->btnc', shares, v)
