"""The DDPM++ U-Net of score-based diffusion, as EDM and ECT use it for CIFAR-10."""

import flax.linen as nn
import jax.numpy as jnp

from cmjax.core import Array, Network
from cmjax.networks import layers


def _init(scale: float = 1.0):
  """Xavier uniform, its standard deviation multiplied by `scale`."""
  return nn.initializers.variance_scaling(scale**2, 'fan_avg', 'uniform')


def _half(x: Array) -> Array:
  b, h, w, c = x.shape
  return jnp.mean(jnp.reshape(x, (b, h // 2, 2, w // 2, 2, c)), axis=(2, 4))


def _double(x: Array) -> Array:
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


_RESAMPLE = {'keep': lambda x: x, 'down': _half, 'up': _double}


class _Block(nn.Module):
  """Residual block: resample, two convolutions, optional self-attention."""

  channels: int
  resample: str
  attention: bool
  dropout: float
  dtype: str

  def _norm(self, name, x):
    groups = min(32, x.shape[-1] // 4)
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=self.dtype, name=name)(x)

  def _conv(self, name, x, channels, kernel=3, scale=1.0):
    return nn.Conv(
      channels, (kernel, kernel), dtype=self.dtype, kernel_init=_init(scale), name=name
    )(x)

  @nn.compact
  def __call__(self, x, emb, deterministic):
    resample = _RESAMPLE[self.resample]
    h = self._conv('conv0', resample(nn.silu(self._norm('norm0', x))), self.channels)
    shift = nn.Dense(
      self.channels, dtype=self.dtype, kernel_init=_init(), name='affine'
    )(emb)
    h = nn.silu(self._norm('norm1', h + shift[:, None, None, :]))
    h = nn.Dropout(self.dropout)(h, deterministic)
    h = self._conv('conv1', h, self.channels, scale=1e-5)
    if self.resample != 'keep' or x.shape[-1] != self.channels:
      x = self._conv('skip', resample(x), self.channels, kernel=1)
    x = (h + x) * 0.5**0.5
    if self.attention:
      x = (self._attend(x) + x) * 0.5**0.5
    return x

  def _attend(self, x):
    b, h, w, c = x.shape
    qkv = self._conv('qkv', self._norm('norm2', x), 3 * c, kernel=1, scale=0.2**0.5)
    q, k, v = jnp.moveaxis(jnp.reshape(qkv, (b, h * w, 1, c, 3)), -1, 0)
    out = layers.attention(q, k, v)
    return self._conv('proj', jnp.reshape(out, x.shape), c, kernel=1, scale=1e-5)


class _SongUNet(nn.Module):
  channels: int
  channel_mult: tuple[int, ...]
  blocks: int
  attention: tuple[int, ...]
  dropout: float
  noise_scale: float
  dtype: str

  @nn.compact
  def __call__(self, x, c_noise, cond, deterministic):
    factor = 2 ** (len(self.channel_mult) - 1)
    if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
      raise ValueError(
        f'needs images [H, W, C], H and W multiples of {factor} for '
        f'channel_mult={self.channel_mult}; got {x.shape[1:]}'
      )
    emb = self._embed(c_noise, cond)
    out_channels, resolution = x.shape[-1], x.shape[1]

    def block(name, x, channels, resample='keep', attention=False):
      return _Block(channels, resample, attention, self.dropout, self.dtype, name=name)(
        x, emb, deterministic
      )

    def conv(name, x, channels, scale=1.0):
      return nn.Conv(
        channels, (3, 3), dtype=self.dtype, kernel_init=_init(scale), name=name
      )(x)

    skips = []
    for level, mult in enumerate(self.channel_mult):
      size = resolution >> level
      if level == 0:
        x = conv(f'enc_{size}x{size}_conv', x.astype(self.dtype), self.channels)
      else:
        x = block(f'enc_{size}x{size}_down', x, x.shape[-1], 'down')
      skips.append(x)
      for i in range(self.blocks):
        name = f'enc_{size}x{size}_block{i}'
        x = block(name, x, mult * self.channels, attention=size in self.attention)
        skips.append(x)

    for level, mult in reversed(list(enumerate(self.channel_mult))):
      size = resolution >> level
      if level == len(self.channel_mult) - 1:
        x = block(f'dec_{size}x{size}_in0', x, x.shape[-1], attention=True)
        x = block(f'dec_{size}x{size}_in1', x, x.shape[-1])
      else:
        x = block(f'dec_{size}x{size}_up', x, x.shape[-1], 'up')
      for i in range(self.blocks + 1):
        name = f'dec_{size}x{size}_block{i}'
        last = i == self.blocks and size in self.attention
        x = jnp.concatenate([x, skips.pop()], axis=-1)
        x = block(name, x, mult * self.channels, attention=last)

    name = f'dec_{resolution}x{resolution}'
    groups = min(32, x.shape[-1] // 4)
    x = nn.GroupNorm(groups, epsilon=1e-6, dtype=self.dtype, name=f'{name}_aux_norm')(x)
    return conv(f'{name}_aux_conv', nn.silu(x), out_channels, scale=1e-5)

  def _embed(self, c_noise, cond):
    layers.refuse_missing_labels(self, cond)
    emb = layers.positional_embedding(self.noise_scale * c_noise, self.channels)
    if cond is not None:
      scaled = cond * cond.shape[-1] ** 0.5
      emb += nn.Dense(emb.shape[-1], kernel_init=_init(), name='map_label')(scaled)
    for name in ('map_layer0', 'map_layer1'):
      emb = nn.silu(nn.Dense(4 * self.channels, kernel_init=_init(), name=name)(emb))
    return emb


def songunet(
  *,
  channels: int = 128,
  channel_mult: tuple[int, ...] = (2, 2, 2),
  blocks: int = 4,
  attention: tuple[int, ...] = (16,),
  dropout: float = 0.13,
  noise_scale: float = 1.0,
  clocks: int = 1,
  log_weight: bool = False,
  dtype: str = 'float32',
) -> Network:
  """DDPM++ in EDM's form, by default that for CIFAR-10: 55,732,739 parameters.

  Args:
    channels: base width; a level is channel_mult times as wide.
    channel_mult: one entry a resolution, each half the one before.
    blocks: residual blocks a resolution in the encoder, one more in the decoder.
    attention: resolutions with self-attention.
    dropout: rate inside the blocks, active only under a key.
    noise_scale: multiplies c_noise before its sinusoids; 1 in EDM and ECT.
    clocks: how many times the network is told; 2 for a map between two times.
    log_weight: whether it also holds a learned weighting, for objectives that use one.
    dtype: compute dtype; embedding, statistics and parameters stay float32.

  Returns:
    A `Network` with apply(params, x f32[B, H, W, C], c_noise f32[B], cond f32[B, K])
    -> dtype[B, H, W, C].

  Raises: ValueError for sizes that cannot work, or that images do not divide by.

  Source: Song et al. 2021 (score SDE), DDPM++; NVlabs/edm `SongUNet`.
  Differs: without the augmentation input.
  """
  layers.check(
    channels=channels,
    blocks=blocks,
    **{f'channel_mult[{i}]': mult for i, mult in enumerate(channel_mult)},
    dropout=dropout,
    dtype=dtype,
  )
  if not channel_mult or channels % 8:
    raise ValueError(
      f'needs a channel_mult and channels a multiple of 8, got {channel_mult=}, '
      f'{channels=}'
    )
  return layers.as_network(
    _SongUNet(
      channels,
      tuple(channel_mult),
      blocks,
      tuple(attention),
      dropout,
      noise_scale,
      dtype,
    ),
    clocks=clocks,
    log_weight=log_weight,
  )
