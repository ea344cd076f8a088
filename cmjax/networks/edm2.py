"""The magnitude-preserving U-Net of EDM2."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Array, Network
from cmjax.networks import layers

# Source of all equations: Karras et al. 2024 (EDM2).


def normalize(x: Array, axis: tuple[int, ...]) -> Array:
  """x divided by its root mean square over the axes, and a floor: eqs. (47) and (66).

  The floor of 1e-4 is added to the root; at x = 0 the gradient is finite.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.mean(wide**2, axis=axis, keepdims=True)
  positive = square > 0
  root = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
  return x / (1e-4 + root).astype(x.dtype)


def _silu(x):
  """Eq. (81)."""
  return nn.silu(x) / 0.596


def _sum(a, b, t):
  """Eq. (88)."""
  return (a + t * (b - a)) / ((1 - t) ** 2 + t**2) ** 0.5


def _cat(a, b, t):
  """Eq. (103)."""
  both = ((a.shape[-1] + b.shape[-1]) / ((1 - t) ** 2 + t**2)) ** 0.5
  weight_a = both * (1 - t) / a.shape[-1] ** 0.5
  weight_b = both * t / b.shape[-1] ** 0.5
  return jnp.concatenate([weight_a * a, weight_b * b], axis=-1)


def _scaled(weight, gain, dtype):
  """A weight [..., in, out] of unit magnitude, over the root of its fan-in."""
  axis = tuple(range(weight.ndim - 1))
  fan_in = weight.size // weight.shape[-1]
  weight = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
  return (normalize(weight, axis) * (gain / fan_in**0.5)).astype(dtype)


def _fourier(clock, frequencies, phases):
  """Eq. (75), its frequencies and phases constants: no gradient reaches them."""
  f, p = jax.lax.stop_gradient((frequencies, phases))
  dtype = jnp.promote_types(clock.dtype, f.dtype)
  clocks = jnp.reshape(clock.astype(dtype), (len(clock), -1, 1))
  angles = clocks * f.astype(dtype)[None, None, :] + p.astype(dtype)[None, None, :]
  return jnp.reshape(jnp.cos(angles) * 2**0.5, (len(clock), -1))


def _init_frequencies(key, shape):
  return 2 * jnp.pi * jax.random.normal(key, shape)


def _init_phases(key, shape):
  return 2 * jnp.pi * jax.random.uniform(key, shape)


class _Linear(nn.Module):
  """A magnitude-preserving layer without bias: eq. (47)."""

  channels: int
  kernel: tuple[int, ...] = ()

  @nn.compact
  def __call__(self, x, gain=1.0):
    shape = (*self.kernel, x.shape[-1], self.channels)
    weight = self.param('weight', nn.initializers.normal(1.0), shape)
    weight = _scaled(weight, gain, x.dtype)
    if not self.kernel:
      return jnp.matmul(x, weight)
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
      x, weight, (1, 1), 'SAME', dimension_numbers=numbers
    )


class _Block(nn.Module):
  """Figure 21, with `encodes` on the way down."""

  channels: int
  mode: str
  encodes: bool
  heads: int
  dropout: float
  balance: float
  clip: float
  attend: str

  @nn.compact
  def __call__(self, x, emb, deterministic):
    x = layers.resample(x, self.mode)
    widened = x.shape[-1] != self.channels
    if self.encodes:
      if widened:
        x = _Linear(self.channels, (1, 1), name='conv_skip')(x)
      x = normalize(x, (-1,))
    y = _Linear(self.channels, (3, 3), name='conv_res0')(_silu(x))
    gain = self.param('emb_gain', nn.initializers.zeros_init(), ())
    scale = _Linear(self.channels, name='emb_linear')(emb, gain) + 1
    y = _silu(y * scale[:, None, None, :].astype(y.dtype))
    y = nn.Dropout(self.dropout)(y, deterministic)
    y = _Linear(self.channels, (3, 3), name='conv_res1')(y)
    if not self.encodes and widened:
      x = _Linear(self.channels, (1, 1), name='conv_skip')(x)
    x = _sum(x, y, self.balance)
    if self.heads:
      x = _sum(x, self._attend(x), self.balance)
    return jnp.clip(x, -self.clip, self.clip)

  def _attend(self, x):
    qkv = _Linear(3 * self.channels, (1, 1), name='attn_qkv')(x)
    q, k, v = normalize(layers.split_heads(qkv, self.heads), (-1,))
    out = jnp.reshape(layers.ATTENTION[self.attend](q, k, v), x.shape)
    return _Linear(self.channels, (1, 1), name='attn_proj')(out)


class _Edm2(nn.Module):
  channels: int
  channel_mult: tuple[int, ...]
  blocks: int
  attention: tuple[int, ...]
  head_channels: int
  dropout: float
  dropout_resolution: int
  balance: float
  clip: float
  noise_scale: float
  attend: str
  remat: bool
  dtype: str

  @nn.compact
  def __call__(self, x, c_noise, cond, deterministic):
    levels = len(self.channel_mult)
    layers.check_images(x, levels)
    emb = self._embed(c_noise, cond)
    out_channels, resolution = x.shape[-1], x.shape[1]
    kind = nn.remat(_Block, static_argnums=(3,)) if self.remat else _Block

    def block(place, x, channels, attends):
      size = resolution >> place.level
      return kind(
        channels=channels,
        mode=place.mode,
        encodes=place.name.startswith('enc'),
        heads=channels // self.head_channels if attends else 0,
        dropout=self.dropout if size <= self.dropout_resolution else 0.0,
        balance=self.balance,
        clip=self.clip,
        attend=self.attend,
        name=place.name,
      )(x, emb, deterministic)

    x, skips = x.astype(self.dtype), []
    x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
    for place in layers.encoder(resolution, levels, self.blocks):
      channels = self.channel_mult[place.level] * self.channels
      if place.kind == 'conv':
        x = _Linear(channels, (3, 3), name=place.name)(x)
      elif place.kind == 'down':
        x = block(place, x, x.shape[-1], False)
      else:
        x = block(place, x, channels, resolution >> place.level in self.attention)
      skips.append(x)

    for place in layers.decoder(resolution, levels, self.blocks):
      if place.kind == 'block':
        x = _cat(x, skips.pop(), 0.5)
        channels = self.channel_mult[place.level] * self.channels
        x = block(place, x, channels, resolution >> place.level in self.attention)
      else:
        x = block(place, x, x.shape[-1], place.kind == 'in0')
    gain = self.param('out_gain', nn.initializers.zeros_init(), ())
    return _Linear(out_channels, (3, 3), name='out_conv')(x, gain)

  def _embed(self, c_noise, cond):
    layers.refuse_missing_labels(self, cond, 'emb_label')
    size = (self.channel_mult[0] * self.channels,)
    frequencies = self.param('emb_fourier_freqs', _init_frequencies, size)
    phases = self.param('emb_fourier_phases', _init_phases, size)
    emb = _fourier(self.noise_scale * c_noise, frequencies, phases)
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
  waves = _fourier(c_noise, params['freqs'], params['phases'])
  return -jnp.matmul(waves, _scaled(params['weight'], 1.0, waves.dtype))[:, 0]


def edm2(
  *,
  channels: int = 192,
  channel_mult: tuple[int, ...] = (1, 2, 3, 4),
  blocks: int = 3,
  attention: tuple[int, ...] = (16, 8),
  head_channels: int = 64,
  dropout: float = 0.0,
  dropout_resolution: int = 1024,
  balance: float = 0.3,
  clip: float = 256.0,
  noise_scale: float = 1.0,
  clocks: int = 1,
  log_weight: bool = False,
  attend: str = 'exact',
  remat: bool = False,
  dtype: str = 'float32',
) -> Network:
  """EDM2's U-Net, by default size S for ImageNet 64x64: 280.2 M parameters.

  XS, M, L, XL and XXL have 128, 256, 320, 384 and 448 channels. Train it with
  `cmjax.optimizers:unit_weights`, which keeps every weight at unit magnitude.

  Args:
    channels: base width; a level is channel_mult times as wide.
    channel_mult: one entry a resolution, each half the one before.
    blocks: residual blocks a resolution in the encoder, one more in the decoder.
    attention: resolutions with self-attention.
    head_channels: channels of an attention head.
    dropout: rate inside the blocks, active only under a key.
    dropout_resolution: the largest resolution with dropout; 16 in ECT.
    balance: share of the residual and attention branches.
    clip: largest size of an activation.
    noise_scale: multiplies c_noise before its Fourier features.
    clocks: how many times condition the network; 2 for a map between two.
    log_weight: whether it also holds the uncertainty u(sigma), as -u.
    attend: 'exact' attention, 'chunked' to save memory, or 'fused' for that of
      `jax.nn`, which rounds float64 to float32.
    remat: compute each block again on the way back instead of keeping it.
    dtype: compute dtype; embedding, norms and parameters stay float32.

  Returns:
    A `Network` with apply(params, x f32[B, H, W, C], c_noise f32[B], cond f32[B, K])
    -> dtype[B, H, W, C].

  Raises: ValueError for sizes that cannot work, or that images do not divide by.

  Source: Karras et al. 2024 (EDM2), config G; NVlabs/edm2 `networks_edm2.py`.
  Differs: weights are kept at unit magnitude by the optimiser, not by the network.
  """
  layers.check_unet(
    channels=channels,
    channel_mult=channel_mult,
    blocks=blocks,
    attention=attention,
    attend=attend,
    remat=remat,
    dropout=dropout,
    noise_scale=noise_scale,
    clocks=clocks,
    log_weight=log_weight,
    dtype=dtype,
  )
  checks.whole(1, layers.MOST_WIDTH, head_channels=head_channels)
  checks.whole(0, layers.MOST_WIDTH, dropout_resolution=dropout_resolution)
  checks.real(0, 1, balance=balance)
  checks.real(0, 1e9, clip=clip)
  if channels % head_channels and head_channels % channels:
    raise ValueError(f'needs channels a multiple of {head_channels=}, got {channels}')
  if not balance or not clip:
    raise ValueError(f'needs {balance=} in (0, 1) and {clip=} > 0')
  return layers.as_network(
    _Edm2(
      channels,
      tuple(channel_mult),
      blocks,
      tuple(attention),
      head_channels,
      dropout,
      dropout_resolution,
      balance,
      clip,
      noise_scale,
      attend,
      remat,
      dtype,
    ),
    clocks=clocks,
    log_weight=log_weight,
    series=layers.Series(_init_uncertainty, _uncertainty),
  )
