"""ADM, the U-Net of guided diffusion, as EDM and OpenAI's consistency models use it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Network
from cmjax.networks import layers


def _uniform_bias(fan_in):
  edge = fan_in**-0.5
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -edge, edge)


_WEIGHT = layers.variance(1 / 3, 'fan_in', 'uniform')
_INITS = layers.Inits(_WEIGHT, layers.variance(0.0, '', ''), _WEIGHT, _uniform_bias)


class _Adm(nn.Module):
  channels: int
  channel_mult: tuple[int, ...]
  blocks: int
  attention: tuple[int, ...]
  head_channels: int
  noise_scale: float
  remat: bool
  style: layers.Style

  @nn.compact
  def __call__(self, x, c_noise, cond, deterministic):
    levels = len(self.channel_mult)
    layers.check_images(x, levels)
    emb = self._embed(c_noise, cond)
    out_channels, resolution, dtype = x.shape[-1], x.shape[1], self.style.dtype

    def block(place, x, channels, attends):
      heads = channels // self.head_channels if attends else 0
      made = layers.residual_block(place, channels, heads, self.style, self.remat)
      return made(x, emb, deterministic)

    def conv(name, x, channels, weight, bias):
      init = dict(kernel_init=weight, bias_init=bias)
      return nn.Conv(channels, (3, 3), dtype=dtype, name=name, **init)(x)

    x, skips = x.astype(dtype), []
    for place in layers.encoder(resolution, levels, self.blocks):
      channels = self.channel_mult[place.level] * self.channels
      attends = resolution >> place.level in self.attention
      if place.kind == 'conv':
        x = conv(place.name, x, channels, _WEIGHT, _uniform_bias(9 * x.shape[-1]))
      elif place.kind == 'down':
        x = block(place, x, x.shape[-1], False)
      else:
        x = block(place, x, channels, attends)
      skips.append(x)

    for place in layers.decoder(resolution, levels, self.blocks):
      if place.kind == 'block':
        x = jnp.concatenate([x, skips.pop()], axis=-1)
        channels = self.channel_mult[place.level] * self.channels
        x = block(place, x, channels, resolution >> place.level in self.attention)
      else:
        x = block(place, x, x.shape[-1], place.kind == 'in0')

    x = layers.group_norm('out_norm', x, self.style.epsilon, dtype)
    zero = nn.initializers.zeros_init()
    return conv('out_conv', nn.silu(x), out_channels, zero, zero)

  def _embed(self, c_noise, cond):
    layers.refuse_missing_labels(self, cond)
    clock = self.noise_scale * c_noise
    emb = layers.positional_embedding(clock, self.channels, endpoint=False)

    def dense(name, x):
      init = dict(kernel_init=_WEIGHT, bias_init=_uniform_bias(x.shape[-1]))
      return nn.Dense(4 * self.channels, name=name, **init)(x)

    emb = dense('map_layer1', nn.silu(dense('map_layer0', emb)))
    if cond is not None:
      init = nn.initializers.normal(1.0)
      emb += nn.Dense(
        emb.shape[-1], use_bias=False, kernel_init=init, name='map_label'
      )(cond)
    return nn.silu(emb)


def adm(
  *,
  channels: int = 192,
  channel_mult: tuple[int, ...] = (1, 2, 3, 4),
  blocks: int = 3,
  attention: tuple[int, ...] = (32, 16, 8),
  head_channels: int = 64,
  film: bool = True,
  dropout: float = 0.1,
  noise_scale: float = 1.0,
  clocks: int = 1,
  log_weight: bool = False,
  attend: str = 'exact',
  remat: bool = False,
  dtype: str = 'float32',
) -> Network:
  """ADM, by default that for ImageNet 64x64: 295,899,267 parameters with 1000 classes.

  Args:
    channels: base width; a level is channel_mult times as wide.
    channel_mult: one entry a resolution, each half the one before.
    blocks: residual blocks a resolution in the encoder, one more in the decoder.
    attention: resolutions with self-attention.
    head_channels: channels of an attention head.
    film: whether the embedding also scales, in EDM and OpenAI's ImageNet networks, or
      only shifts, in OpenAI's for LSUN.
    dropout: rate inside the blocks, active only under a key.
    noise_scale: multiplies c_noise before its sinusoids; 1 in EDM, 1000 in OpenAI's.
    clocks: how many times condition the network; 2 for a map between two.
    log_weight: whether it also holds a learned weighting, for objectives that use one.
    attend: 'exact' attention, 'chunked' to save memory, or 'fused' for that of
      `jax.nn`, which rounds float64 to float32.
    remat: compute each block again on the way back instead of keeping it.
    dtype: compute dtype; embedding, statistics and parameters stay float32.

  Returns:
    A `Network` with apply(params, x f32[B, H, W, C], c_noise f32[B], cond f32[B, K])
    -> dtype[B, H, W, C].

  Raises: ValueError for sizes that cannot work, or that images do not divide by.

  Source: Dhariwal & Nichol 2021; NVlabs/edm `DhariwalUNet`; openai/consistency_models
    `unet.py`, the same function of other names and another order of q, k and v.
  Differs: without the augmentation input, which no released network has; the sines of
    the embedding come before its cosines.
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
  checks.choice((False, True), film=film)
  if channels % head_channels and head_channels % channels:
    raise ValueError(f'needs channels a multiple of {head_channels=}, got {channels}')
  style = layers.Style(
    epsilon=1e-5,
    skip_scale=1.0,
    film=film,
    project=False,
    taps=(1, 1),
    inits=_INITS,
    attend=attend,
    dropout=dropout,
    dtype=dtype,
  )
  return layers.as_network(
    _Adm(
      channels,
      tuple(channel_mult),
      blocks,
      tuple(attention),
      head_channels,
      noise_scale,
      remat,
      style,
    ),
    clocks=clocks,
    log_weight=log_weight,
  )
