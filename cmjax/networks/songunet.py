"""The U-Nets of score-based diffusion, DDPM++ and NCSN++, as EDM and ECT use them."""

import flax.linen as nn
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Network
from cmjax.networks import layers


def _xavier(gain=1.0):
  """Xavier uniform, its standard deviation multiplied by `gain`."""
  return layers.variance(gain**2, 'fan_avg', 'uniform')


_INITS = layers.Inits(
  weight=_xavier(),
  last=_xavier(1e-5),
  qkv=_xavier(0.2**0.5),
  bias=lambda fan_in: nn.initializers.zeros_init(),
)


class _SongUNet(nn.Module):
  channels: int
  channel_mult: tuple[int, ...]
  blocks: int
  attention: tuple[int, ...]
  embedding: str
  residual_input: bool
  augment: int
  noise_scale: float
  remat: bool
  style: layers.Style

  @nn.compact
  def __call__(self, x, c_noise, cond, deterministic):
    levels = len(self.channel_mult)
    layers.check_images(x, levels)
    emb = self._embed(c_noise, cond)
    image, resolution, dtype = x, x.shape[1], self.style.dtype
    x = x.astype(dtype)

    def block(place, x, channels, attends):
      made = layers.residual_block(
        place, channels, int(attends), self.style, self.remat
      )
      return made(x, emb, deterministic)

    def conv(name, x, channels, init=_INITS.weight):
      return nn.Conv(channels, (3, 3), dtype=dtype, kernel_init=init, name=name)(x)

    skips, pyramid = [], x
    for place in layers.encoder(resolution, levels, self.blocks):
      if place.kind == 'conv':
        x = conv(place.name, x, self.channels)
      elif place.kind == 'down':
        x = block(place, x, x.shape[-1], False)
        if self.residual_input:
          name = place.name.replace('down', 'aux_residual')
          x = pyramid = (x + self._halved(name, pyramid, x.shape[-1])) * 0.5**0.5
      else:
        attends = resolution >> place.level in self.attention
        x = block(place, x, self.channel_mult[place.level] * self.channels, attends)
      skips.append(x)

    for place in layers.decoder(resolution, levels, self.blocks):
      channels, attends = x.shape[-1], place.kind == 'in0'
      if place.kind == 'block':
        x = jnp.concatenate([x, skips.pop()], axis=-1)
        channels = self.channel_mult[place.level] * self.channels
        last = place.index == self.blocks
        attends = last and resolution >> place.level in self.attention
      x = block(place, x, channels, attends)

    name = f'dec_{resolution}x{resolution}'
    x = layers.group_norm(f'{name}_aux_norm', x, self.style.epsilon, dtype)
    return conv(f'{name}_aux_conv', nn.silu(x), image.shape[-1], _INITS.last)

  def _halved(self, name, x, channels):
    """A convolution without bias, the filter, every second pixel, and the bias.

    Source: NVlabs/edm `Conv2d(fused_resample=True)`, which pads once for both.
    """
    taps = self.style.taps
    pad = 1 + (len(taps) - 1) // 2
    x = nn.Conv(
      channels,
      (3, 3),
      padding=pad,
      use_bias=False,
      dtype=self.style.dtype,
      kernel_init=_INITS.weight,
      name=name,
    )(x)
    x = layers.depthwise(x, 'down', taps, padding=0)
    bias = self.param(f'{name}_bias', nn.initializers.zeros_init(), (channels,))
    return x + bias.astype(x.dtype)[None, None, None, :]

  def _embed(self, c_noise, cond):
    layers.refuse_missing_labels(self, cond)
    clock = self.noise_scale * c_noise
    if self.embedding == 'positional':
      emb = layers.positional_embedding(clock, self.channels)
    else:
      normal = nn.initializers.normal(16.0)
      frequencies = self.param('map_noise', normal, (self.channels,))
      emb = layers.fourier_embedding(clock, frequencies)

    def dense(name, x, channels, bias=True):
      return nn.Dense(channels, bias, kernel_init=_INITS.weight, name=name)(x)

    labels, augmentation = self._told(cond, len(c_noise))
    if labels is not None:
      scaled = labels * labels.shape[-1] ** 0.5
      emb += dense('map_label', scaled, emb.shape[-1])
    if augmentation is not None:
      emb += dense('map_augment', augmentation, emb.shape[-1], bias=False)
    for name in ('map_layer0', 'map_layer1'):
      emb = nn.silu(dense(name, emb, 4 * self.channels))
    return emb

  def _told(self, cond, rows):
    """Labels and augmentation of cond, whose last columns may tell the latter."""
    if not self.augment:
      return cond, None
    plain = jnp.zeros((rows, self.augment))
    if self.is_initializing():
      return cond, plain
    classes = 0
    if self.has_variable('params', 'map_label'):
      classes = self.get_variable('params', 'map_label')['kernel'].shape[0]
    width = 0 if cond is None else cond.shape[-1]
    if width == classes:
      return cond, plain
    if width != classes + self.augment:
      raise ValueError(
        f'cond must have {classes} columns of labels, or {self.augment} more that tell '
        f'the augmentation; got {width}'
      )
    return (cond[:, :classes] if classes else None), cond[:, classes:]


def songunet(
  *,
  channels: int = 128,
  channel_mult: tuple[int, ...] = (2, 2, 2),
  blocks: int = 4,
  attention: tuple[int, ...] = (16,),
  embedding: str = 'positional',
  residual_input: bool = False,
  taps: tuple[int, ...] = (1, 1),
  augment: int = 0,
  dropout: float = 0.13,
  noise_scale: float = 1.0,
  clocks: int = 1,
  log_weight: bool = False,
  attend: str = 'exact',
  remat: bool = False,
  dtype: str = 'float32',
) -> Network:
  """DDPM++ in EDM's form, by default that for CIFAR-10: 55,732,739 parameters.

  NCSN++ is `embedding='fourier', residual_input=True, taps=(1, 3, 3, 1)`: 56,395,651
  parameters for CIFAR-10, 128 of them frequencies that stay as they were drawn.

  Args:
    channels: base width; a level is channel_mult times as wide.
    channel_mult: one entry a resolution, each half the one before.
    blocks: residual blocks a resolution in the encoder, one more in the decoder.
    attention: resolutions with self-attention.
    embedding: of the noise level, 'positional' or 'fourier'.
    residual_input: whether the image, made smaller, is added at each resolution.
    taps: filter of every resampling, an even number of them.
    augment: columns of cond, after those of the labels, that tell how an image was
      augmented; left out, they are zeros. EDM has 9 for CIFAR-10.
    dropout: rate inside the blocks, active only under a key.
    noise_scale: multiplies c_noise before its embedding; 1 in EDM and ECT.
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

  Source: Song et al. 2021 (score SDE), DDPM++ and NCSN++; NVlabs/edm `SongUNet`.
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
  checks.choice(('positional', 'fourier'), embedding=embedding)
  checks.choice((False, True), residual_input=residual_input)
  checks.wholes(64, 0, 2**16, taps=taps)
  checks.whole(0, 2**10, augment=augment)
  if len(taps) % 2 or not any(taps):
    raise ValueError(f'needs an even number of taps, not all of them 0; got {taps=}')
  style = layers.Style(
    epsilon=1e-6,
    skip_scale=0.5**0.5,
    film=False,
    project=True,
    taps=tuple(taps),
    inits=_INITS,
    attend=attend,
    dropout=dropout,
    dtype=dtype,
  )
  return layers.as_network(
    _SongUNet(
      channels,
      tuple(channel_mult),
      blocks,
      tuple(attention),
      embedding,
      residual_input,
      augment,
      noise_scale,
      remat,
      style,
    ),
    clocks=clocks,
    log_weight=log_weight,
  )
