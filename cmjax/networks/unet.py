"""The parts that the U-Nets share: resampling, the order of blocks, residual blocks."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks
from cmjax.core import Array
from cmjax.networks import adapter, attention

MAX_LEVELS = 16

Init = Callable[..., Array]  # an initializer as flax calls it: (key, shape, dtype)


def resample(x: Array, mode: str, taps: tuple[int, ...] = (1, 1)) -> Array:
  """Halves ('down') or doubles ('up') the height and width of f32[B, H, W, C].

  Applies a separable filter with an even number of taps and zero padding; (1, 1)
  averages 2x2 pixels, or repeats each pixel. 'keep' returns x.
  Source: Karras et al. 2020 (StyleGAN2), `upfirdn2d`.
  """
  if mode == 'keep':
    return x
  return depthwise(x, mode, taps, padding=(len(taps) - 1) // 2)


def depthwise(x: Array, mode: str, taps: tuple[int, ...], padding: int) -> Array:
  """The filter of `resample` on an image padded with `padding` zeros on every side."""
  b, h, w, c = x.shape
  if tuple(taps) == (1, 1) and not padding:
    if mode == 'up':
      return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return jnp.mean(jnp.reshape(x, (b, h // 2, 2, w // 2, 2, c)), axis=(2, 4))
  f = np.outer(taps, taps) / np.sum(taps) ** 2
  up = mode == 'up'
  edge = len(taps) - 1 - padding if up else padding
  return jax.lax.conv_general_dilated(
    x,
    jnp.asarray(np.tile((4 * f if up else f)[:, :, None, None], c), x.dtype),
    window_strides=(1, 1) if up else (2, 2),
    padding=((edge, edge), (edge, edge)),
    lhs_dilation=(2, 2) if up else (1, 1),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=c,
  )


def pointwise(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
  """A 1x1 convolution f32[B, H, W, C] -> f32[B, H, W, D] as a matrix product.

  On CPUs, its gradient takes half as long as that of `conv_general_dilated`, whose
  other arguments are not used, and of a product that is not of two matrices.
  """
  product = jnp.matmul(jnp.reshape(x, (-1, x.shape[-1])), kernel[0, 0])
  return jnp.reshape(product, (*x.shape[:-1], -1))


class Block(NamedTuple):
  """The name and position of one block of a U-Net."""

  name: str
  level: int  # 0: full resolution
  kind: str  # 'conv', 'down', 'up', 'in0', 'in1' or 'block'
  position: int = 0  # among those of kind 'block' at its level

  @property
  def mode(self) -> str:
    """How it resamples: 'down', 'up' or 'keep'."""
    return self.kind if self.kind in ('down', 'up') else 'keep'


def encoder(resolution: int, levels: int, num_blocks: int) -> Iterator[Block]:
  """The blocks of the encoder in order; the output of each is a skip connection."""
  for level in range(levels):
    size = f'enc_{resolution >> level}x{resolution >> level}'
    kind = 'down' if level else 'conv'
    yield Block(f'{size}_{kind}', level, kind)
    for i in range(num_blocks):
      yield Block(f'{size}_block{i}', level, 'block', i)


def decoder(resolution: int, levels: int, num_blocks: int) -> Iterator[Block]:
  """The blocks of the decoder in order; those of kind 'block' take a skip."""
  for level in reversed(range(levels)):
    size = f'dec_{resolution >> level}x{resolution >> level}'
    for kind in ('in0', 'in1') if level == levels - 1 else ('up',):
      yield Block(f'{size}_{kind}', level, kind)
    for i in range(num_blocks + 1):
      yield Block(f'{size}_block{i}', level, 'block', i)


def check_images(x: Array, levels: int) -> None:
  """Raises ValueError unless x is [B, H, W, C] and can be halved levels - 1 times."""
  factor = 2 ** (levels - 1)
  if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
    raise ValueError(
      f'x must be images [B, H, W, C], with H and W multiples of {factor} for the '
      f'{levels} levels of channel_mult; got shape {x.shape}'
    )


def check_settings(
  *,
  channels: int,
  channel_mult: tuple[int, ...],
  num_blocks: int,
  attention_resolutions: tuple[int, ...],
  attention_implementation: str,
  remat: bool,
  **shared: Any,
) -> None:
  """Checks the settings of a U-Net, and those of `adapter.check_settings`.

  Raises: ValueError naming the first that has the wrong type or is out of range.
  """
  adapter.check_settings(num_blocks=num_blocks, **shared)
  checks.whole(1, adapter.MAX_WIDTH, channels=channels)
  max_mult = adapter.MAX_WIDTH // channels
  checks.wholes(MAX_LEVELS, 1, max_mult, channel_mult=channel_mult)
  checks.wholes(64, 1, adapter.MAX_WIDTH, attention_resolutions=attention_resolutions)
  implementations = tuple(attention.IMPLEMENTATIONS)
  checks.choice(implementations, attention_implementation=attention_implementation)
  checks.choice((False, True), remat=remat)
  if num_blocks * len(channel_mult) > adapter.MAX_BLOCKS:
    raise ValueError(
      f'num_blocks: {num_blocks} for each of {len(channel_mult)} levels exceeds '
      f'{adapter.MAX_BLOCKS} blocks in total'
    )
  if not channel_mult:
    raise ValueError('channel_mult must have at least one entry, got ()')
  if channels % 8:
    raise ValueError(f'channels must be a multiple of 8, got {channels}')


def check_heads(channels: int, head_channels: int) -> None:
  """Raises ValueError unless one of the two is a multiple of the other."""
  checks.whole(1, adapter.MAX_WIDTH, head_channels=head_channels)
  if channels % head_channels and head_channels % channels:
    raise ValueError(
      'one of channels and head_channels must be a multiple of the other, got '
      f'{channels} and {head_channels}'
    )


def variance_scaling(
  scale: float,
  mode: Literal['fan_in', 'fan_avg'] = 'fan_in',
) -> Init:
  """A uniform initializer of variance scale / fan; zeros for a scale of 0."""
  if scale == 0:
    return nn.initializers.zeros_init()
  return nn.initializers.variance_scaling(scale, mode, 'uniform')


class Initializers(NamedTuple):
  """Initializers of the layers of a residual block."""

  kernel: Init
  output_kernel: Init  # of the last convolution of a branch; its bias is zero
  qkv_kernel: Init
  bias: Callable[[int], Init]  # by the layer's fan-in


class BlockOptions(NamedTuple):
  """What distinguishes the residual blocks of DDPM++, NCSN++ and ADM."""

  epsilon: float  # of group normalisation
  skip_scale: float  # multiplies the sum of a branch and its skip
  film: bool  # the embedding scales and shifts after the norm, or shifts before it
  project: bool  # a 1x1 convolution on every skip that is resampled
  taps: tuple[int, ...]
  inits: Initializers
  attention_implementation: str
  dropout: float
  dtype: str


class ResidualBlock(nn.Module):
  """Resampling, two convolutions, and self-attention if heads > 0."""

  channels: int
  mode: str
  heads: int
  options: BlockOptions

  def _norm(self, name, x):
    return group_norm(name, x, self.options.epsilon, self.options.dtype)

  def _conv(self, name, x, channels, kernel=3, init=None):
    inits = self.options.inits
    zero_bias = init is inits.output_kernel
    return nn.Conv(
      channels,
      (kernel, kernel),
      dtype=self.options.dtype,
      kernel_init=init or inits.kernel,
      bias_init=(
        nn.initializers.zeros_init()
        if zero_bias
        else inits.bias(kernel**2 * x.shape[-1])
      ),
      conv_general_dilated=pointwise if kernel == 1 else None,
      name=name,
    )(x)

  @nn.compact
  def __call__(self, x: Array, emb: Array, deterministic: bool) -> Array:
    """f32[B, H, W, C], embedding f32[B, E] -> f32[B, H', W', channels]."""
    options, inits = self.options, self.options.inits

    def resampled(x):
      return resample(x, self.mode, options.taps)

    h = self._conv('conv0', resampled(nn.silu(self._norm('norm0', x))), self.channels)
    affine = nn.Dense(
      (1 + options.film) * self.channels,
      dtype=options.dtype,
      kernel_init=inits.kernel,
      bias_init=inits.bias(emb.shape[-1]),
      name='affine',
    )(emb)[:, None, None, :]
    if options.film:
      scale, shift = jnp.split(affine, 2, axis=-1)
      h = nn.silu(self._norm('norm1', h) * (scale + 1) + shift)
    else:
      h = nn.silu(self._norm('norm1', h + affine))
    h = nn.Dropout(options.dropout)(h, deterministic)
    h = self._conv('conv1', h, self.channels, init=inits.output_kernel)
    resized = self.mode != 'keep'
    widened = x.shape[-1] != self.channels
    x = resampled(x)
    if widened or (resized and options.project):
      x = self._conv('skip', x, self.channels, kernel=1)
    x = (h + x) * options.skip_scale
    if self.heads:
      x = (self._attend(x) + x) * options.skip_scale
    return x

  def _attend(self, x):
    channels, inits = x.shape[-1], self.options.inits
    normed = self._norm('norm2', x)
    qkv = self._conv('qkv', normed, 3 * channels, kernel=1, init=inits.qkv_kernel)
    attend = attention.IMPLEMENTATIONS[self.options.attention_implementation]
    out = jnp.reshape(attend(*attention.split_heads(qkv, self.heads)), x.shape)
    return self._conv('proj', out, channels, kernel=1, init=inits.output_kernel)


def residual_block(
  block: Block, channels: int, heads: int, options: BlockOptions, remat: bool
) -> nn.Module:
  """The module of a block; `remat` recomputes it in the backward pass."""
  kind = nn.remat(ResidualBlock, static_argnums=(3,)) if remat else ResidualBlock
  return kind(channels, block.mode, heads, options, name=block.name)


def group_norm(name: str, x: Array, epsilon: float, dtype: str) -> Array:
  """Normalises f32[B, H, W, C] over at most 32 groups of at least 4 channels.

  Statistics are float32 or finer; the variance is computed from deviations from the
  mean.
  Raises: ValueError if the channels do not divide into the groups.
  """
  return _GroupNorm(epsilon, dtype, name=name)(x)


class _GroupNorm(nn.Module):
  """`flax.linen.GroupNorm`, but averages over pixels before channels.

  Thus no array has the few channels of a group as its last axis, which would leave the
  vector units (SIMD of a CPU, lanes of a TPU) mostly empty. Parameters are the same.
  """

  epsilon: float
  dtype: str

  @nn.compact
  def __call__(self, x):
    channels = x.shape[-1]
    groups = min(32, channels // 4)
    if channels % groups:
      raise ValueError(f'{channels} channels do not divide into {groups} groups')
    size = channels // groups

    def mean_of_group(x):
      means = jnp.reshape(jnp.mean(x, axis=(1, 2)), (len(x), groups, size))
      return jnp.repeat(jnp.mean(means, axis=2), size, axis=1)[:, None, None, :]

    scale = self.param('scale', nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, (channels,), jnp.float32)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x - mean_of_group(x)
    rstd = jax.lax.rsqrt(mean_of_group(x**2) + self.epsilon)
    gain = rstd * scale[None, None, None, :]
    return (x * gain + bias[None, None, None, :]).astype(self.dtype)
