"""The magnitude-preserving U-Net of EDM2; equations refer to Karras et al. 2024."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Array, Network
from cmjax.networks import adapter, attention, embeddings, unet


def normalize(x: Array, axis: tuple[int, ...]) -> Array:
  """Divides x by its root mean square over the axes, plus 1e-4: eqs. (47) and (66).

  The gradient is finite at x = 0.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.mean(wide**2, axis=axis, keepdims=True)
  positive = square > 0
  root = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
  return x / (1e-4 + root).astype(x.dtype)


def _silu(x):
  """SiLU, scaled to preserve magnitude: eq. (81)."""
  return nn.silu(x) / 0.596


def _sum(a, b, t):
  """Magnitude-preserving (1 - t) a + t b: eq. (88)."""
  return (a + t * (b - a)) / ((1 - t) ** 2 + t**2) ** 0.5


def _cat(a, b, t):
  """Magnitude-preserving concatenation along the channels: eq. (103)."""
  scale = ((a.shape[-1] + b.shape[-1]) / ((1 - t) ** 2 + t**2)) ** 0.5
  weight_a = scale * (1 - t) / a.shape[-1] ** 0.5
  weight_b = scale * t / b.shape[-1] ** 0.5
  return jnp.concatenate([weight_a * a, weight_b * b], axis=-1)


def _scaled(weight, gain, dtype):
  """Normalises a weight [..., in, out] and divides it by the root of its fan-in."""
  axis = tuple(range(weight.ndim - 1))
  fan_in = weight.size // weight.shape[-1]
  weight = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
  return (normalize(weight, axis) * (gain / fan_in**0.5)).astype(dtype)


def _init_frequencies(key, shape):
  return 2 * jnp.pi * jax.random.normal(key, shape)


def _init_phases(key, shape):
  return 2 * jnp.pi * jax.random.uniform(key, shape)


class _Linear(nn.Module):
  """A magnitude-preserving dense or convolutional layer without bias: eq. (47)."""

  channels: int
  kernel: tuple[int, ...] = ()

  @nn.compact
  def __call__(self, x, gain: float | Array = 1.0):
    shape = (*self.kernel, x.shape[-1], self.channels)
    weight = self.param('weight', nn.initializers.normal(1.0), shape)
    weight = _scaled(weight, gain, x.dtype)
    if not self.kernel:
      return jnp.matmul(x, weight)
    if self.kernel == (1, 1):
      return unet.pointwise(x, weight)
    layout = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
      x, weight, (1, 1), 'SAME', dimension_numbers=layout
    )


class _Block(nn.Module):
  """A residual block of the encoder or the decoder: figure 21."""

  channels: int
  mode: str
  in_encoder: bool
  heads: int
  dropout: float
  balance: float
  clip: float
  attention_implementation: str

  @nn.compact
  def __call__(self, x, emb, deterministic):
    x = unet.resample(x, self.mode)
    widened = x.shape[-1] != self.channels
    if self.in_encoder:
      if widened:
        x = _Linear(self.channels, (1, 1), name='conv_skip')(x)
      x = normalize(x, (-1,))
    y = _Linear(self.channels, (3, 3), name='conv_res0')(_silu(x))
    gain = self.param('emb_gain', nn.initializers.zeros_init(), ())
    scale = _Linear(self.channels, name='emb_linear')(emb, gain) + 1
    y = _silu(y * scale[:, None, None, :].astype(y.dtype))
    y = nn.Dropout(self.dropout)(y, deterministic)
    y = _Linear(self.channels, (3, 3), name='conv_res1')(y)
    if not self.in_encoder and widened:
      x = _Linear(self.channels, (1, 1), name='conv_skip')(x)
    x = _sum(x, y, self.balance)
    if self.heads:
      x = _sum(x, self._attend(x), self.balance)
    return jnp.clip(x, -self.clip, self.clip)

  def _attend(self, x):
    qkv = _Linear(3 * self.channels, (1, 1), name='attn_qkv')(x)
    q, k, v = normalize(attention.split_heads(qkv, self.heads), (-1,))
    attend = attention.IMPLEMENTATIONS[self.attention_implementation]
    out = jnp.reshape(attend(q, k, v), x.shape)
    return _Linear(self.channels, (1, 1), name='attn_proj')(out)


class _Edm2(nn.Module):
  channels: int
  channel_mult: tuple[int, ...]
  num_blocks: int
  attention_resolutions: tuple[int, ...]
  head_channels: int
  dropout: float
  dropout_resolution: int
  balance: float
  clip: float
  noise_scale: float
  attention_implementation: str
  remat: bool
  dtype: str

  @nn.compact
  def __call__(self, x, c_noise, cond, deterministic):
    levels = len(self.channel_mult)
    unet.check_images(x, levels)
    emb = self._embed(c_noise, cond)
    out_channels, resolution = x.shape[-1], x.shape[1]
    kind = nn.remat(_Block, static_argnums=(3,)) if self.remat else _Block

    def apply_block(block, x, channels, attends):
      size = resolution >> block.level
      return kind(
        channels=channels,
        mode=block.mode,
        in_encoder=block.name.startswith('enc'),
        heads=channels // self.head_channels if attends else 0,
        dropout=self.dropout if size <= self.dropout_resolution else 0.0,
        balance=self.balance,
        clip=self.clip,
        attention_implementation=self.attention_implementation,
        name=block.name,
      )(x, emb, deterministic)

    x, skips = x.astype(self.dtype), []
    x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
    for block in unet.encoder(resolution, levels, self.num_blocks):
      channels = self.channel_mult[block.level] * self.channels
      if block.kind == 'conv':
        x = _Linear(channels, (3, 3), name=block.name)(x)
      elif block.kind == 'down':
        x = apply_block(block, x, x.shape[-1], False)
      else:
        attends = resolution >> block.level in self.attention_resolutions
        x = apply_block(block, x, channels, attends)
      skips.append(x)

    for block in unet.decoder(resolution, levels, self.num_blocks):
      if block.kind == 'block':
        x = _cat(x, skips.pop(), 0.5)
        channels = self.channel_mult[block.level] * self.channels
        attends = resolution >> block.level in self.attention_resolutions
        x = apply_block(block, x, channels, attends)
      else:
        x = apply_block(block, x, x.shape[-1], block.kind == 'in0')
    gain = self.param('out_gain', nn.initializers.zeros_init(), ())
    return _Linear(out_channels, (3, 3), name='out_conv')(x, gain)

  def _embed(self, c_noise, cond):
    adapter.check_labels(self, cond, 'emb_label')
    size = (self.channel_mult[0] * self.channels,)
    frequencies = self.param('emb_fourier_freqs', _init_frequencies, size)
    phases = self.param('emb_fourier_phases', _init_phases, size)
    c_noise = self.noise_scale * c_noise
    emb = embeddings.magnitude_preserving(c_noise, frequencies, phases)
    width = max(self.channel_mult) * self.channels
    emb = _Linear(width, name='emb_noise')(emb)
    if cond is not None:
      scaled = cond.astype(emb.dtype) * cond.shape[-1] ** 0.5
      emb = _sum(emb, _Linear(width, name='emb_label')(scaled), 0.5)
    return _silu(emb)


def _init_uncertainty(key):
  keys = jax.random.split(key, 3)
  return {
    'freqs': _init_frequencies(keys[0], (128,)),
    'phases': _init_phases(keys[1], (128,)),
    'weight': jax.random.normal(keys[2], (128, 1)),
  }


def _uncertainty(params, c_noise):
  """-u(sigma): eqs. (14) and (21) multiply a loss by exp(-u)."""
  emb = embeddings.magnitude_preserving(c_noise, params['freqs'], params['phases'])
  return -jnp.matmul(emb, _scaled(params['weight'], 1.0, emb.dtype))[:, 0]


def edm2(
  *,
  channels: int = 192,
  channel_mult: tuple[int, ...] = (1, 2, 3, 4),
  num_blocks: int = 3,
  attention_resolutions: tuple[int, ...] = (16, 8),
  head_channels: int = 64,
  dropout: float = 0.0,
  dropout_resolution: int = 1024,
  balance: float = 0.3,
  clip: float = 256.0,
  noise_scale: float = 1.0,
  num_times: int = 1,
  log_weight: bool = False,
  attention_implementation: str = 'exact',
  remat: bool = False,
  dtype: str = 'float32',
) -> Network:
  """EDM2's U-Net, by default size S for ImageNet 64x64: 280.2 M parameters.

  XS, M, L, XL and XXL have 128, 256, 320, 384 and 448 channels. Train it with
  `cmjax.optimizers:unit_weights`, which keeps every weight at unit magnitude.

  Args:
    channels: base width, multiplied by channel_mult at each level.
    channel_mult: one entry per level; each level but the first halves the resolution.
    num_blocks: residual blocks per level of the encoder; the decoder has one more.
    attention_resolutions: resolutions with self-attention.
    head_channels: channels per attention head.
    dropout: dropout rate in the blocks, active only if `apply` gets a key.
    dropout_resolution: the largest resolution with dropout; 16 in ECT.
    balance: t of eq. (88) for the residual and attention branches.
    clip: activations are clipped to [-clip, clip].
    noise_scale: multiplies c_noise before its Fourier features.
    num_times: times that condition the network; 2 for flow maps.
    log_weight: whether to add the learned uncertainty u(sigma), as log weight -u.
    attention_implementation: 'exact', 'chunked' to save memory, or 'fused' for
      `jax.nn.dot_product_attention`, which rounds float64 to float32.
    remat: recompute each block in the backward pass instead of storing it.
    dtype: compute dtype; embedding, norms and parameters stay float32.

  Returns:
    A `Network` with apply(params, x f32[B, H, W, C], c_noise f32[B], cond f32[B, K])
    -> dtype[B, H, W, C].

  Raises: ValueError naming a setting that is invalid; `apply` if H or W cannot be
    halved at each level but the first.

  Source: Karras et al. 2024 (EDM2), config G; NVlabs/edm2 `networks_edm2.py`.
  Differs: the optimiser keeps weights at unit magnitude, not the network.
  """
  unet.check_settings(
    channels=channels,
    channel_mult=channel_mult,
    num_blocks=num_blocks,
    attention_resolutions=attention_resolutions,
    attention_implementation=attention_implementation,
    remat=remat,
    dropout=dropout,
    noise_scale=noise_scale,
    num_times=num_times,
    log_weight=log_weight,
    dtype=dtype,
  )
  unet.check_heads(channels, head_channels)
  checks.whole(0, adapter.MAX_WIDTH, dropout_resolution=dropout_resolution)
  checks.real(0, 1, balance=balance)
  checks.real(0, 1e9, clip=clip)
  if not balance or not clip:
    raise ValueError(f'balance and clip must be above 0, got {balance} and {clip}')
  return adapter.as_network(
    _Edm2(
      channels=channels,
      channel_mult=tuple(channel_mult),
      num_blocks=num_blocks,
      attention_resolutions=tuple(attention_resolutions),
      head_channels=head_channels,
      dropout=dropout,
      dropout_resolution=dropout_resolution,
      balance=balance,
      clip=clip,
      noise_scale=noise_scale,
      attention_implementation=attention_implementation,
      remat=remat,
      dtype=dtype,
    ),
    num_times=num_times,
    log_weight=log_weight,
    weighting=adapter.Weighting(_init_uncertainty, _uncertainty),
  )
