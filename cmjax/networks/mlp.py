"""A residual MLP with adaptive normalisation, for digits and 2-D points."""

import math

import flax.linen as nn
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Network
from cmjax.networks import adapter, embeddings


class _Mlp(nn.Module):
  width: int
  num_blocks: int
  embedding: int
  dropout: float
  noise_scale: float
  dtype: str

  @nn.compact
  def __call__(self, x, c_noise, cond, deterministic):
    adapter.check_labels(self, cond, 'map_label')
    emb = embeddings.positional(self.noise_scale * c_noise, self.embedding)
    if cond is not None:
      emb += nn.Dense(emb.shape[-1], name='map_label')(cond)
    emb = nn.silu(nn.Dense(self.embedding, name='map_layer0')(emb))
    emb = nn.silu(nn.Dense(self.embedding, name='map_layer1')(emb)).astype(self.dtype)
    h = jnp.reshape(x, (x.shape[0], -1)).astype(self.dtype)
    h = nn.Dense(self.width, dtype=self.dtype, name='input')(h)
    for i in range(self.num_blocks):
      h += self._branch(f'block{i}', h, emb, deterministic)
    h = nn.LayerNorm(dtype=self.dtype, name='output_norm')(h)
    h = nn.Dense(
      math.prod(x.shape[1:]), dtype=self.dtype, kernel_init=nn.zeros, name='output'
    )(nn.silu(h))
    return jnp.reshape(h, x.shape)

  def _branch(self, name, h, emb, deterministic):
    affine = nn.Dense(2 * self.width, dtype=self.dtype, name=f'{name}_affine')(emb)
    scale, shift = jnp.split(affine, 2, axis=-1)
    h = nn.LayerNorm(
      use_scale=False, use_bias=False, dtype=self.dtype, name=f'{name}_norm'
    )(h)
    h = nn.silu(h * (1 + scale) + shift)
    h = nn.silu(nn.Dense(self.width, dtype=self.dtype, name=f'{name}_dense0')(h))
    h = nn.Dropout(self.dropout)(h, deterministic)
    return nn.Dense(
      self.width, dtype=self.dtype, kernel_init=nn.zeros, name=f'{name}_dense1'
    )(h)


def mlp(
  *,
  width: int = 512,
  num_blocks: int = 4,
  embedding: int = 128,
  dropout: float = 0.0,
  noise_scale: float = 100.0,
  num_times: int = 1,
  log_weight: bool = False,
  dtype: str = 'float32',
) -> Network:
  """A residual MLP on flattened inputs, conditioned on c_noise and label.

  Args:
    width: features of the residual stream.
    num_blocks: residual blocks of two dense layers each.
    embedding: features of the c_noise and label embedding.
    dropout: dropout rate in the blocks, active only if `apply` gets a key.
    noise_scale: multiplies c_noise before its sinusoids, whose fastest has period 2 pi.
    num_times: times that condition the network; 2 for flow maps.
    log_weight: whether to add a learned weighting, for objectives that use one.
    dtype: compute dtype; the embedding and all parameters stay float32.

  Returns:
    A `Network` with apply(params, x f32[B, ...], c_noise f32[B], cond f32[B, K])
    -> dtype[B, ...].

  Raises: ValueError naming a setting that is invalid.

  Source: cmjax choice; adaptive normalisation after Peebles & Xie 2023, section 3.2.
  """
  adapter.check_settings(
    num_blocks=num_blocks,
    dropout=dropout,
    noise_scale=noise_scale,
    num_times=num_times,
    log_weight=log_weight,
    dtype=dtype,
  )
  checks.whole(1, adapter.MAX_WIDTH, width=width, embedding=embedding)
  if embedding < 4 or embedding % 2:
    raise ValueError(f'embedding must be even and at least 4, got {embedding}')
  return adapter.as_network(
    _Mlp(
      width=width,
      num_blocks=num_blocks,
      embedding=embedding,
      dropout=dropout,
      noise_scale=noise_scale,
      dtype=dtype,
    ),
    num_times=num_times,
    log_weight=log_weight,
  )
