"""The U-Nets of score-based diffusion, DDPM++ and NCSN++, as EDM and ECT use them."""

import flax.linen as nn
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import MAP_AUGMENT, Network
from cmjax.networks import adapter, embeddings, unet


def _xavier(gain=1.0):
  """Xavier uniform with its standard deviation multiplied by `gain`."""
  return unet.variance_scaling(gain**2, 'fan_avg')


_INITS = unet.Initializers(
  kernel=_xavier(),
  output_kernel=_xavier(1e-5),
  qkv_kernel=_xavier(0.2**0.5),
  bias=lambda fan_in: nn.initializers.zeros_init(),
)


class _SongUNet(nn.Module):
  channels: int
  channel_mult: tuple[int, ...]
  num_blocks: int
  attention_resolutions: tuple[int, ...]
  embedding: str
  residual_input: bool
  augment: int
  noise_scale: float
  remat: bool
  options: unet.BlockOptions

  @nn.compact
  def __call__(self, x, c_noise, cond, deterministic):
    levels = len(self.channel_mult)
    unet.check_images(x, levels)
    emb = self._embed(c_noise, cond)
    image, resolution, dtype = x, x.shape[1], self.options.dtype
    x = x.astype(dtype)

    def apply_block(block, x, channels, attends):
      module = unet.residual_block(
        block, channels, int(attends), self.options, self.remat
      )
      return module(x, emb, deterministic)

    def conv(name, x, channels, init=_INITS.kernel):
      return nn.Conv(channels, (3, 3), dtype=dtype, kernel_init=init, name=name)(x)

    skips, pyramid = [], x
    for block in unet.encoder(resolution, levels, self.num_blocks):
      if block.kind == 'conv':
        x = conv(block.name, x, self.channels)
      elif block.kind == 'down':
        x = apply_block(block, x, x.shape[-1], False)
        if self.residual_input:
          name = block.name.replace('down', 'aux_residual')
          x = pyramid = (x + self._downsampled(name, pyramid, x.shape[-1])) * 0.5**0.5
      else:
        attends = resolution >> block.level in self.attention_resolutions
        x = apply_block(
          block, x, self.channel_mult[block.level] * self.channels, attends
        )
      skips.append(x)

    for block in unet.decoder(resolution, levels, self.num_blocks):
      channels, attends = x.shape[-1], block.kind == 'in0'
      if block.kind == 'block':
        x = jnp.concatenate([x, skips.pop()], axis=-1)
        channels = self.channel_mult[block.level] * self.channels
        last = block.position == self.num_blocks
        attends = last and resolution >> block.level in self.attention_resolutions
      x = apply_block(block, x, channels, attends)

    name = f'dec_{resolution}x{resolution}'
    x = unet.group_norm(f'{name}_aux_norm', x, self.options.epsilon, dtype)
    return conv(f'{name}_aux_conv', nn.silu(x), image.shape[-1], _INITS.output_kernel)

  def _downsampled(self, name, x, channels):
    """A convolution, a filter with stride 2, and the bias of the convolution.

    Source: NVlabs/edm `Conv2d(fused_resample=True)`, which pads once for both.
    """
    taps = self.options.taps
    pad = 1 + (len(taps) - 1) // 2
    x = nn.Conv(
      channels,
      (3, 3),
      padding=pad,
      use_bias=False,
      dtype=self.options.dtype,
      kernel_init=_INITS.kernel,
      name=name,
    )(x)
    x = unet.depthwise(x, 'down', taps, padding=0)
    bias = self.param(f'{name}_bias', nn.initializers.zeros_init(), (channels,))
    return x + bias.astype(x.dtype)[None, None, None, :]

  def _embed(self, c_noise, cond):
    classes = adapter.check_labels(self, cond, 'map_label', self.augment)
    c_noise = self.noise_scale * c_noise
    if self.embedding == 'positional':
      emb = embeddings.positional(c_noise, self.channels)
    else:
      normal = nn.initializers.normal(16.0)
      frequencies = self.param('map_noise', normal, (self.channels,))
      emb = embeddings.fourier(c_noise, frequencies)

    def dense(name, x, channels, bias=True):
      return nn.Dense(channels, bias, kernel_init=_INITS.kernel, name=name)(x)

    if classes:
      scaled = cond[:, :classes] * classes**0.5
      emb += dense('map_label', scaled, emb.shape[-1])
    if self.augment:  # columns that are missing are zeros
      augmentation = jnp.zeros((len(c_noise), self.augment))
      if cond is not None and cond.shape[-1] > classes:
        augmentation = cond[:, classes:]
      emb += dense(MAP_AUGMENT, augmentation, emb.shape[-1], bias=False)
    for name in ('map_layer0', 'map_layer1'):
      emb = nn.silu(dense(name, emb, 4 * self.channels))
    return emb


def songunet(
  *,
  channels: int = 128,
  channel_mult: tuple[int, ...] = (2, 2, 2),
  num_blocks: int = 4,
  attention_resolutions: tuple[int, ...] = (16,),
  embedding: str = 'positional',
  residual_input: bool = False,
  taps: tuple[int, ...] = (1, 1),
  augment: int = 0,
  dropout: float = 0.13,
  noise_scale: float = 1.0,
  num_times: int = 1,
  log_weight: bool = False,
  attention_implementation: str = 'exact',
  remat: bool = False,
  dtype: str = 'float32',
) -> Network:
  """DDPM++ as in EDM, by default the one for CIFAR-10: 55,732,739 parameters.

  NCSN++ is `embedding='fourier', residual_input=True, taps=(1, 3, 3, 1)`: 56,395,651
  parameters for CIFAR-10, of which 128 are fixed random frequencies.

  Args:
    channels: base width, multiplied by channel_mult at each level.
    channel_mult: one entry per level; each level but the first halves the resolution.
    num_blocks: residual blocks per level of the encoder; the decoder has one more.
    attention_resolutions: resolutions with self-attention.
    embedding: kind of c_noise embedding, 'positional' or 'fourier'.
    residual_input: whether the downsampled input image is added at each level.
    taps: coefficients of the resampling filter, an even number.
    augment: columns of cond after the labels that describe the augmentation; zeros if
      omitted. EDM has 9 for CIFAR-10.
    dropout: dropout rate in the blocks, active only if `apply` gets a key.
    noise_scale: multiplies c_noise before its embedding; 1 in EDM and ECT.
    num_times: times that condition the network; 2 for flow maps.
    log_weight: whether to add a learned weighting, for objectives that use one.
    attention_implementation: 'exact', 'chunked' to save memory, or 'fused' for
      `jax.nn.dot_product_attention`, which rounds float64 to float32.
    remat: recompute each block in the backward pass instead of storing it.
    dtype: compute dtype; embedding, statistics and parameters stay float32.

  Returns:
    A `Network` with apply(params, x f32[B, H, W, C], c_noise f32[B], cond f32[B, K])
    -> dtype[B, H, W, C].

  Raises: ValueError naming a setting that is invalid; `apply` if H or W cannot be
    halved at each level but the first.

  Source: Song et al. 2021 (score SDE), DDPM++ and NCSN++; NVlabs/edm `SongUNet`.
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
  checks.choice(('positional', 'fourier'), embedding=embedding)
  checks.choice((False, True), residual_input=residual_input)
  checks.wholes(64, 0, 2**16, taps=taps)
  checks.whole(0, 2**10, augment=augment)
  if len(taps) % 2 or not any(taps):
    raise ValueError(f'taps must have an even number of entries, not all 0; got {taps}')
  options = unet.BlockOptions(
    epsilon=1e-6,
    skip_scale=0.5**0.5,
    film=False,
    project=True,
    taps=tuple(taps),
    inits=_INITS,
    attention_implementation=attention_implementation,
    dropout=dropout,
    dtype=dtype,
  )
  return adapter.as_network(
    _SongUNet(
      channels=channels,
      channel_mult=tuple(channel_mult),
      num_blocks=num_blocks,
      attention_resolutions=tuple(attention_resolutions),
      embedding=embedding,
      residual_input=residual_input,
      augment=augment,
      noise_scale=noise_scale,
      remat=remat,
      options=options,
    ),
    num_times=num_times,
    log_weight=log_weight,
  )
