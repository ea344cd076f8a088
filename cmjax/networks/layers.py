"""Layers and the one way in which a linen module becomes a `Network`."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks
from cmjax.core import LOG_WEIGHT, Array, Key, Network, Params

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')

# Far beyond any network that was trained, but built in seconds: a config may come with
# weights from a stranger.
MOST_WIDTH = 2**16  # channels of a level, or features of a layer
MOST_BLOCKS = 256  # of a network on its way down, over all levels
MOST_LEVELS = 16


class Series(NamedTuple):
  """A function of c_noise that an objective may learn as the log of its weighting."""

  init: Callable[[Key], Params]
  apply: Callable[[Params, Array], Array]  # (params, c_noise f32[B]) -> f32[B]


def _fourier_series(params, c_noise):
  angles = c_noise[:, None] * jnp.arange(1.0, 17.0)[None, :]
  waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
  return jnp.matmul(waves, params)


# Source: the form is a cmjax choice; the idea Karras et al. 2024 (EDM2), section B.
FOURIER_SERIES = Series(lambda key: jnp.zeros(32), _fourier_series)


def as_network(
  module: nn.Module,
  *,
  clocks: int = 1,
  log_weight: bool = False,
  series: Series = FOURIER_SERIES,
) -> Network:
  """Wraps a linen module called as `module(x, c_noise, cond, deterministic)`.

  With `log_weight` the parameters hold one more entry, `log_weight`: those of `series`,
  by default 32 numbers, zero at first.

  Raises: ValueError for fewer than one clock, or a weighting of several.
  """
  if clocks < 1 or (log_weight and clocks > 1):
    raise ValueError(f'clocks must be 1, or more without {log_weight=}; got {clocks=}')

  def init(key, x, c_noise, cond):
    params = module.init(key, x, c_noise, cond, deterministic=True)['params']
    if log_weight:
      params |= {LOG_WEIGHT: series.init(jax.random.fold_in(key, 1))}
    return params

  def apply(params, x, c_noise, cond, *, key=None):
    rngs = None if key is None else {'dropout': key}
    return module.apply(
      {'params': params}, x, c_noise, cond, deterministic=key is None, rngs=rngs
    )

  def weigh(params, c_noise):
    return series.apply(params[LOG_WEIGHT], c_noise)

  return Network(init, apply, clocks, weigh if log_weight else None)


def check(
  *,
  blocks: int,
  dropout: float,
  noise_scale: float,
  clocks: int,
  log_weight: bool,
  dtype: str,
) -> None:
  """Refuses settings that cannot build a network, or not in a reasonable time.

  Raises: ValueError naming the first that is out of range or of another type.
  """
  checks.whole(1, MOST_BLOCKS, blocks=blocks)
  checks.real(0, 1, dropout=dropout)
  checks.real(-1e9, 1e9, noise_scale=noise_scale)
  checks.whole(1, 16, clocks=clocks)
  checks.choice((False, True), log_weight=log_weight)
  checks.choice(DTYPES, dtype=dtype)


def refuse_missing_labels(
  module: nn.Module, cond: Array | None, name: str = 'map_label'
) -> None:
  """Raises ValueError where parameters for labels exist, and no labels are given."""
  if cond is None and module.has_variable('params', name):
    raise ValueError('this network was trained with labels, and none are given')


# Embeddings -----------------------------------------------------------------------


def positional_embedding(
  c_noise: Array, channels: int, *, endpoint: bool = True
) -> Array:
  """Sinusoids of the noise level, never below float32: f32[B] -> f32[B, channels].

  Of f32[B, K] the K embeddings one after the other: f32[B, K * channels]. Frequencies
  run from 1 down to 1e-4, the last included with `endpoint`; sines come first.
  Source: NVlabs/edm `PositionalEmbedding` as `SongUNet` uses it.
  """
  half = channels // 2
  dtype = jnp.promote_types(c_noise.dtype, jnp.float32)
  frequencies = 1e-4 ** (jnp.arange(half, dtype=dtype) / (half - endpoint))
  return _waves(c_noise.astype(dtype), frequencies)


def fourier_embedding(c_noise: Array, frequencies: Array) -> Array:
  """Random Fourier features of the noise level: f32[B], f32[K] -> f32[B, 2 K].

  Sines come first. The frequencies are a constant: no gradient reaches them.
  Source: Song et al. 2021 (score SDE), NCSN++.
  """
  fixed = jax.lax.stop_gradient(frequencies)
  dtype = jnp.promote_types(c_noise.dtype, fixed.dtype)
  return _waves(2 * np.pi * c_noise.astype(dtype), fixed.astype(dtype))


def _waves(clocks, frequencies):
  angles = jnp.reshape(clocks, (len(clocks), -1, 1)) * frequencies[None, None, :]
  embedded = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=2)
  return jnp.reshape(embedded, (len(clocks), -1))


# Attention ------------------------------------------------------------------------


def attention(q: Array, k: Array, v: Array) -> Array:
  """softmax(q k / sqrt(C)) v: q, k and v [B, T, heads, C] -> [B, T, heads, C].

  Source: Vaswani et al. 2017, eq. (1).
  Differs: from `jax.nn.dot_product_attention`, whose softmax rounds float64 to float32
    and which may choose a kernel that `jax.jvp` refuses.
  """
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.einsum('btnc,bsnc->bnts', q, k, preferred_element_type=dtype)
  shares = jax.nn.softmax(logits / q.shape[-1] ** 0.5, axis=-1).astype(q.dtype)
  return jnp.einsum('bnts,bsnc->btnc', shares, v)


def chunked_attention(q: Array, k: Array, v: Array, *, rows: int = 256) -> Array:
  """`attention` by blocks of `rows` queries, each computed again on the way back.

  Memory grows with rows T instead of T^2, forward, under `jax.jvp`, and in the gradient
  of either. Shapes as in `attention`.
  """
  b, t, heads, c = q.shape
  blocks = -(-t // rows)
  padded = jnp.pad(q, ((0, 0), (0, blocks * rows - t), (0, 0), (0, 0)))
  padded = jnp.moveaxis(jnp.reshape(padded, (b, blocks, rows, heads, c)), 1, 0)
  some = jax.checkpoint(lambda q: attention(q, k, v))
  out = jnp.moveaxis(jax.lax.map(some, padded), 0, 1)
  return jnp.reshape(out, (b, blocks * rows, heads, c))[:, :t]


# Every U-Net takes one of these as `attend`.
ATTENTION = {
  'exact': attention,
  'chunked': chunked_attention,
  'fused': jax.nn.dot_product_attention,
}


def split_heads(qkv: Array, heads: int) -> Array:
  """[B, H, W, 3 C] -> q, k and v stacked, [3, B, H W, heads, C / heads].

  Source: NVlabs/edm `UNetBlock`: q, k and v alternate from channel to channel.
  """
  b, h, w, c = qkv.shape
  return jnp.moveaxis(jnp.reshape(qkv, (b, h * w, heads, c // heads // 3, 3)), -1, 0)


# U-Nets ---------------------------------------------------------------------------


def resample(x: Array, mode: str, taps: tuple[int, ...] = (1, 1)) -> Array:
  """Half ('down') or twice ('up') the height and width of [B, H, W, C], or 'keep'.

  A separable filter of an even number of taps, zeros outside; (1, 1) takes the mean of
  2x2 pixels, or repeats each.
  Source: Karras et al. 2020 (StyleGAN2), `upfirdn2d`.
  """
  if mode == 'keep':
    return x
  return depthwise(x, mode, taps, padding=(len(taps) - 1) // 2)


def depthwise(x: Array, mode: str, taps: tuple[int, ...], padding: int) -> Array:
  """The filter of `resample` on an image padded by `padding` zeros on every side."""
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


class Place(NamedTuple):
  """One block of a U-Net: its name, its level (0 is full resolution), its kind."""

  name: str
  level: int
  kind: str  # conv, down, up, in0, in1 or block
  index: int = 0

  @property
  def mode(self) -> str:
    """How it resamples: 'down', 'up' or 'keep'."""
    return self.kind if self.kind in ('down', 'up') else 'keep'


def encoder(resolution: int, levels: int, blocks: int) -> Iterator[Place]:
  """The blocks of a U-Net on the way down, each of which leaves a skip."""
  for level in range(levels):
    size = f'enc_{resolution >> level}x{resolution >> level}'
    kind = 'down' if level else 'conv'
    yield Place(f'{size}_{kind}', level, kind)
    for i in range(blocks):
      yield Place(f'{size}_block{i}', level, 'block', i)


def decoder(resolution: int, levels: int, blocks: int) -> Iterator[Place]:
  """The blocks of a U-Net on the way up; those of kind 'block' take a skip."""
  for level in reversed(range(levels)):
    size = f'dec_{resolution >> level}x{resolution >> level}'
    for kind in ('in0', 'in1') if level == levels - 1 else ('up',):
      yield Place(f'{size}_{kind}', level, kind)
    for i in range(blocks + 1):
      yield Place(f'{size}_block{i}', level, 'block', i)


def check_images(x: Array, levels: int) -> None:
  """Raises ValueError unless x is [B, H, W, C] that can be halved levels - 1 times."""
  factor = 2 ** (levels - 1)
  if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
    raise ValueError(
      f'needs images [H, W, C], H and W multiples of {factor} for a channel_mult of '
      f'{levels} entries; got {x.shape[1:]}'
    )


def check_unet(
  *,
  channels: int,
  channel_mult: tuple[int, ...],
  blocks: int,
  attention: tuple[int, ...],
  attend: str,
  remat: bool,
  **others: Any,
) -> None:
  """Raises ValueError for settings, of `check` too, that cannot build a U-Net."""
  check(blocks=blocks, **others)
  checks.whole(1, MOST_WIDTH, channels=channels)
  most = MOST_WIDTH // channels
  checks.wholes(MOST_LEVELS, 1, most, channel_mult=channel_mult)
  checks.wholes(64, 1, MOST_WIDTH, attention=attention)
  checks.choice(tuple(ATTENTION), attend=attend)
  checks.choice((False, True), remat=remat)
  if blocks * len(channel_mult) > MOST_BLOCKS:
    raise ValueError(
      f'{blocks=} of each of {len(channel_mult)} levels are more than {MOST_BLOCKS}'
    )
  if not channel_mult or channels % 8:
    raise ValueError(
      f'needs a channel_mult and channels a multiple of 8, got {channel_mult=}, '
      f'{channels=}'
    )


def variance(scale: float, mode: str, distribution: str) -> Callable[..., Array]:
  """An initialiser of that variance, or of zeros."""
  if scale == 0:
    return nn.initializers.zeros_init()
  return nn.initializers.variance_scaling(scale, mode, distribution)


class Inits(NamedTuple):
  """How the parameters of a residual block start."""

  weight: Callable[..., Array]
  last: Callable[..., Array]  # of what is added to the main path
  qkv: Callable[..., Array]
  bias: Callable[[int], Callable[..., Array]]  # of a layer by its fan-in


class Style(NamedTuple):
  """What distinguishes the residual blocks of DDPM++, NCSN++ and ADM."""

  epsilon: float  # of group normalisation
  skip_scale: float  # multiplies each sum of two branches
  film: bool  # the embedding scales and shifts after the norm, or shifts before it
  project: bool  # a 1x1 convolution on every skip that is resampled
  taps: tuple[int, ...]
  inits: Inits
  attend: str
  dropout: float
  dtype: str


class ResidualBlock(nn.Module):
  """Resample, two convolutions, optional self-attention: [B, H, W, C] -> the same."""

  channels: int
  mode: str
  heads: int  # 0: no attention
  style: Style

  def _norm(self, name, x):
    return group_norm(name, x, self.style.epsilon, self.style.dtype)

  def _conv(self, name, x, channels, kernel=3, init=None):
    inits = self.style.inits
    last = init is inits.last
    bias = nn.initializers.zeros_init() if last else inits.bias(kernel**2 * x.shape[-1])
    return nn.Conv(
      channels,
      (kernel, kernel),
      dtype=self.style.dtype,
      kernel_init=init or inits.weight,
      bias_init=bias,
      name=name,
    )(x)

  @nn.compact
  def __call__(self, x: Array, emb: Array, deterministic: bool) -> Array:
    """[B, H, W, C] told the embedding f32[B, E] -> [B, H', W', channels]."""
    style, inits = self.style, self.style.inits

    def resampled(x):
      return resample(x, self.mode, style.taps)

    h = self._conv('conv0', resampled(nn.silu(self._norm('norm0', x))), self.channels)
    told = nn.Dense(
      (1 + style.film) * self.channels,
      dtype=style.dtype,
      kernel_init=inits.weight,
      bias_init=inits.bias(emb.shape[-1]),
      name='affine',
    )(emb)[:, None, None, :]
    if style.film:
      scale, shift = jnp.split(told, 2, axis=-1)
      h = nn.silu(self._norm('norm1', h) * (scale + 1) + shift)
    else:
      h = nn.silu(self._norm('norm1', h + told))
    h = nn.Dropout(style.dropout)(h, deterministic)
    h = self._conv('conv1', h, self.channels, init=inits.last)
    resized = self.mode != 'keep'
    widened = x.shape[-1] != self.channels
    x = resampled(x)
    if widened or (resized and style.project):
      x = self._conv('skip', x, self.channels, kernel=1)
    x = (h + x) * style.skip_scale
    if self.heads:
      x = (self._attend(x) + x) * style.skip_scale
    return x

  def _attend(self, x):
    channels, inits = x.shape[-1], self.style.inits
    normed = self._norm('norm2', x)
    qkv = self._conv('qkv', normed, 3 * channels, kernel=1, init=inits.qkv)
    out = ATTENTION[self.style.attend](*split_heads(qkv, self.heads))
    out = jnp.reshape(out, x.shape)
    return self._conv('proj', out, channels, kernel=1, init=inits.last)


def residual_block(
  place: Place, channels: int, heads: int, style: Style, remat: bool
) -> nn.Module:
  """The residual block of a place, computed again on the way back with `remat`."""
  block = nn.remat(ResidualBlock, static_argnums=(3,)) if remat else ResidualBlock
  return block(channels, place.mode, heads, style, name=place.name)


def group_norm(name: str, x: Array, epsilon: float, dtype: str) -> Array:
  """[B, H, W, C] normalised over at most 32 groups of at least 4 channels.

  Statistics are float32 or finer; the variance is that of differences from the mean.
  Raises: ValueError for channels that do not divide into the groups.
  """
  return _GroupNorm(epsilon, dtype, name=name)(x)


class _GroupNorm(nn.Module):
  """flax's, with its parameters, but a mean is over pixels and then over channels.

  So no array ends in the few channels of a group, which vector units (SIMD of a CPU,
  lanes of a TPU) would leave mostly empty.
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
