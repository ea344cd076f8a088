"""ADM, the U-Net of guided diffusion, as EDM and OpenAI's consistency models use it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Network
from cmjax.networks import adapter, embeddings, unet


def _uniform_bias(fan_in):
  bound = fan_in**-0.5
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


_KERNEL = unet.variance_scaling(1 / 3)
_INITS = unet.Initializers(
  kernel=_KERNEL,
  output_kernel=unet.variance_scaling(0.0),
  qkv_kernel=_KERNEL,
  bias=_uniform_bias,
)


class _Adm(nn.Module):
  channels: int
  channel_mult: tuple[int, ...]
  num_blocks: int
  attention_resolutions: tuple[int, ...]
  head_channels: int
  dropout_resolution: int
  noise_scale: float
  remat: bool
  options: unet.BlockOptions

  @nn.compact
  def __call__(self, x, c_noise, cond, deterministic):
    levels = len(self.channel_mult)
    unet.check_images(x, levels)
    emb = self._embed(c_noise, cond)
    out_channels, resolution, dtype = x.shape[-1], x.shape[1], self.options.dtype

    def apply_block(block, x, channels, attends):
      heads = channels // self.head_channels if attends else 0
      options = self.options
      if resolution >> block.level > self.dropout_resolution:
        options = options._replace(dropout=0.0)
      module = unet.residual_block(block, channels, heads, options, self.remat)
      return module(x, emb, deterministic)

    def conv(name, x, channels, kernel_init, bias_init):
      init = dict(kernel_init=kernel_init, bias_init=bias_init)
      return nn.Conv(channels, (3, 3), dtype=dtype, name=name, **init)(x)

    x, skips = x.astype(dtype), []
    for block in unet.encoder(resolution, levels, self.num_blocks):
      channels = self.channel_mult[block.level] * self.channels
      attends = resolution >> block.level in self.attention_resolutions
      if block.kind == 'conv':
        x = conv(block.name, x, channels, _KERNEL, _uniform_bias(9 * x.shape[-1]))
      elif block.kind == 'down':
        x = apply_block(block, x, x.shape[-1], False)
      else:
        x = apply_block(block, x, channels, attends)
      skips.append(x)

    for block in unet.decoder(resolution, levels, self.num_blocks):
      if block.kind == 'block':
        x = jnp.concatenate([x, skips.pop()], axis=-1)
        channels = self.channel_mult[block.level] * self.channels
        attends = resolution >> block.level in self.attention_resolutions
        x = apply_block(block, x, channels, attends)
      else:
        x = apply_block(block, x, x.shape[-1], block.kind == 'in0')

    x = unet.group_norm('out_norm', x, self.options.epsilon, dtype)
    zero = nn.initializers.zeros_init()
    return conv('out_conv', nn.silu(x), out_channels, zero, zero)

  def _embed(self, c_noise, cond):
    adapter.check_labels(self, cond, 'map_label')
    c_noise = self.noise_scale * c_noise
    emb = embeddings.positional(c_noise, self.channels, endpoint=False)

    def dense(name, x):
      return nn.Dense(
        4 * self.channels,
        kernel_init=_KERNEL,
        bias_init=_uniform_bias(x.shape[-1]),
        name=name,
      )(x)

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
  num_blocks: int = 3,
  attention_resolutions: tuple[int, ...] = (32, 16, 8),
  head_channels: int = 64,
  film: bool = True,
  dropout: float = 0.1,
  dropout_resolution: int = 1024,
  noise_scale: float = 1.0,
  num_times: int = 1,
  log_weight: bool = False,
  attention_implementation: str = 'exact',
  remat: bool = False,
  dtype: str = 'float32',
) -> Network:
  """ADM, by default the one for ImageNet 64x64: 295,899,267 parameters, 1000 classes.

  Args:
    channels: base width, multiplied by channel_mult at each level.
    channel_mult: one entry per level; each level but the first halves the resolution.
    num_blocks: residual blocks per level of the encoder; the decoder has one more.
    attention_resolutions: resolutions with self-attention.
    head_channels: channels per attention head.
    film: whether the embedding scales and shifts, as in EDM and OpenAI's ImageNet
      networks, or only shifts, as in OpenAI's for LSUN.
    dropout: dropout rate in the blocks, active only if `apply` gets a key.
    dropout_resolution: the largest resolution with dropout; 16 in iCT.
    noise_scale: multiplies c_noise before its sinusoids; 1 in EDM, 1000 in OpenAI's.
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

  Source: Dhariwal & Nichol 2021; NVlabs/edm `DhariwalUNet`; openai/consistency_models
    `unet.py`, the same function with other names and another order of q, k and v.
  Differs: no augmentation input, which no released network uses; the sines of the
    embedding come before its cosines.
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
  checks.choice((False, True), film=film)
  options = unet.BlockOptions(
    epsilon=1e-5,
    skip_scale=1.0,
    film=film,
    project=False,
    taps=(1, 1),
    inits=_INITS,
    attention_implementation=attention_implementation,
    dropout=dropout,
    dtype=dtype,
  )
  return adapter.as_network(
    _Adm(
      channels=channels,
      channel_mult=tuple(channel_mult),
      num_blocks=num_blocks,
      attention_resolutions=tuple(attention_resolutions),
      head_channels=head_channels,
      dropout_resolution=dropout_resolution,
      noise_scale=noise_scale,
      remat=remat,
      options=options,
    ),
    num_times=num_times,
    log_weight=log_weight,
  )
