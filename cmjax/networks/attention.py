"""Self-attention that can be differentiated in forward and reverse mode."""

import jax
import jax.numpy as jnp

from cmjax.core import Array


def exact(q: Array, k: Array, v: Array) -> Array:
  """softmax(q k^T / sqrt(C)) v: q, k, v f32[B, T, heads, C] -> f32[B, T, heads, C].

  Source: Vaswani et al. 2017, eq. (1).
  Differs: from `jax.nn.dot_product_attention`, whose softmax rounds float64 to float32
    and which may choose a kernel without forward-mode derivatives.
  """
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.einsum('btnc,bsnc->bnts', q, k, preferred_element_type=dtype)
  weights = jax.nn.softmax(logits / q.shape[-1] ** 0.5, axis=-1).astype(q.dtype)
  return jnp.einsum('bnts,bsnc->btnc', weights, v)


def chunked(q: Array, k: Array, v: Array, *, chunk_size: int = 256) -> Array:
  """`exact` for one chunk of queries at a time, recomputed in the backward pass.

  Memory grows with chunk_size * T instead of T^2: forward, under `jax.jvp`, and in the
  gradient of either. Shapes as in `exact`.
  """
  b, t, heads, c = q.shape
  num_chunks = -(-t // chunk_size)
  padding = num_chunks * chunk_size - t
  padded = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
  chunks = jnp.reshape(padded, (b, num_chunks, chunk_size, heads, c))
  attend = jax.checkpoint(lambda q: exact(q, k, v))
  out = jnp.moveaxis(jax.lax.map(attend, jnp.moveaxis(chunks, 1, 0)), 0, 1)
  return jnp.reshape(out, (b, num_chunks * chunk_size, heads, c))[:, :t]


# The choices of `attention_implementation` of every U-Net.
IMPLEMENTATIONS = {
  'exact': exact,
  'chunked': chunked,
  'fused': jax.nn.dot_product_attention,
}


def split_heads(qkv: Array, heads: int) -> Array:
  """f32[B, H, W, 3 C] -> stacked q, k and v: f32[3, B, H W, heads, C / heads].

  Source: NVlabs/edm `UNetBlock`: q, k and v are interleaved along the channels.
  """
  b, h, w, c = qkv.shape
  return jnp.moveaxis(jnp.reshape(qkv, (b, h * w, heads, c // heads // 3, 3)), -1, 0)
