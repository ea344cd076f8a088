"""Names of OpenAI's consistency models, of PyTorch and of JAX -> ours.

Source: openai/consistency_models `unet.py`, openai/consistency_models_cifar10
`ncsnpp.py`.
"""

from pathlib import Path
import re
from typing import Any

import numpy as np

from cmjax.core import UserError, first_line
from cmjax.networks import layers
from cmjax.port import names

FORMS = ('denoiser', 'consistency')
_WORDS = {'edm': 'denoiser', 'cd': 'consistency', 'ct': 'consistency'}


def _precond(path: str | Path, form: str) -> dict[str, Any]:
  """These files hold weights alone; what they are of stands in their names."""
  if form not in ('', *FORMS):
    raise UserError(f'form must be one of {", ".join(FORMS)}, got {form!r}')
  words = re.split('[^a-z0-9]+', '/'.join(Path(path).parts[-3:]).lower())
  found = {form} if form else {_WORDS[word] for word in words if word in _WORDS}
  if len(found) != 1:
    raise UserError(
      f'{path}: does not say whether it is a denoiser or a consistency function; its '
      "name should hold edm, cd or ct, or give form='denoiser' or 'consistency'"
    )
  if found == {'denoiser'}:
    return dict(fn='cmjax.precond:edm', sigma_data=0.5)
  return dict(fn='cmjax.precond:consistency', sigma_data=0.5, sigma_min=0.002)


_TORCH_BLOCK = {
  'norm0': 'in_layers.0',
  'conv0': 'in_layers.2',
  'affine': 'emb_layers.1',
  'norm1': 'out_layers.0',
  'conv1': 'out_layers.3',
  'skip': 'skip_connection',
}
_TORCH_ATTENTION = {'norm2': 'norm', 'qkv': 'qkv', 'proj': 'proj_out'}
_TORCH_TOP = {
  'map_layer0': 'time_embed.0',
  'map_layer1': 'time_embed.2',
  'map_label': 'label_emb',
  'out_norm': 'out.0',
  'out_conv': 'out.2',
}


def plan_torch(tensors: names.Tensors, path: str | Path, form: str) -> names.Plan:
  """An ADM whose sizes are those of its tensors.

  The size of its images is not in the file: as in every released one, attention begins
  at 32x32, and heads have 64 channels.
  """
  up = re.compile(r'output_blocks\.\d+\.[12]\.in_layers\.0\.weight')
  levels = 1 + sum(bool(up.fullmatch(name)) for name in tensors)
  if levels > layers.MOST_LEVELS:
    raise UserError(f'{path}: a network of {levels} levels is not here')
  inputs = {name.split('.')[1] for name in tensors if name.startswith('input_blocks.')}
  a_level = len(inputs) // levels  # its blocks, and the first convolution or a halving
  firsts = [1 + level * a_level for level in range(levels)]
  attends = [f'input_blocks.{i}.1.qkv.weight' in tensors for i in firsts]
  try:
    channels = tensors['time_embed.0.weight'].shape[1]
    widths = [len(tensors[f'input_blocks.{i}.0.out_layers.3.bias']) for i in firsts]
    told = len(tensors['input_blocks.1.0.emb_layers.1.bias'])
    size = 32 * 2 ** attends.index(True)
    image_channels = tensors['input_blocks.0.0.weight'].shape[1]
    mults = tuple(width // channels for width in widths)
  except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
    raise UserError(
      f'{path}: not the U-Net of OpenAI that is here ({first_line(error)})'
    ) from error
  if min(widths) < 128:  # it has 32 groups of channels whatever the width
    raise UserError(f'{path}: a network {min(widths)} channels wide is not here')
  classes = len(tensors.get('label_emb.weight', ()))
  network = dict(
    fn='cmjax.networks.adm:adm',
    channels=channels,
    channel_mult=mults,
    blocks=a_level - 1,
    attention=tuple(size >> i for i, attend in enumerate(attends) if attend),
    film=told == 2 * widths[0],
    noise_scale=1000.0,
  )
  return names.Plan(
    origin='openai/consistency_models',
    network=network,
    precond=_precond(path, form),
    shape=names.shape_of((size, size, image_channels), str(path)),
    classes=names.classes_of(classes, str(path)),
    tensors=tensors,
    find=_find_torch(size, levels, a_level - 1, tensors),
  )


def _find_torch(
  size: int, levels: int, blocks: int, tensors: names.Tensors
) -> names.Find:
  stems = {}  # the residual block of each place, and its attention
  for i, place in enumerate(layers.encoder(size, levels, blocks)):
    stems[place.name] = f'input_blocks.{i}.0', f'input_blocks.{i}.1'
  at = -1
  for place in layers.decoder(size, levels, blocks):
    if place.kind == 'in0':
      stems[place.name] = 'middle_block.0', 'middle_block.1'
    elif place.kind == 'in1':
      stems[place.name] = 'middle_block.2', ''
    elif place.kind == 'up':
      after = 2 if f'output_blocks.{at}.2.in_layers.0.weight' in tensors else 1
      stems[place.name] = f'output_blocks.{at}.{after}', ''
    else:
      at += 1
      stems[place.name] = f'output_blocks.{at}.0', f'output_blocks.{at}.1'

  def find(address):
    first, *middle, leaf = address
    leaf = names.LEAVES.get(leaf, leaf)
    if first in _TORCH_TOP:
      layouts = {'map_label': names.as_is, 'map_layer0': names.sines_first}
      return f'{_TORCH_TOP[first]}.{leaf}', layouts.get(first, names.from_torch)
    block, attention = stems[first]
    if not middle:
      return f'{block}.{leaf}', names.from_torch
    if middle[0] in _TORCH_BLOCK:
      return f'{block}.{_TORCH_BLOCK[middle[0]]}.{leaf}', names.from_torch
    layout = _qkv_from_torch if middle[0] == 'qkv' else _projection_from_torch
    return f'{attention}.{_TORCH_ATTENTION[middle[0]]}.{leaf}', layout

  return find


def _projection_from_torch(a: np.ndarray) -> np.ndarray:
  """A 1x1 convolution, kept as [out, in, 1] or [out, in, 1, 1]."""
  return names.from_torch(a if a.ndim in (1, 4) else a[..., None])


def _qkv_from_torch(a: np.ndarray) -> np.ndarray:
  return names.alternating(_projection_from_torch(a))


def plan_jax(tensors: names.Tensors, path: str | Path, form: str) -> names.Plan:
  """The NCSN++ or DDPM++ of CIFAR-10, told apart by its embedding."""
  fourier = 'GaussianFourierProjection_0/W' in tensors
  size, mults, blocks = 32, (2, 2, 2), 4
  try:
    image_channels, channels = tensors['Conv_0/kernel'].shape[-2:]
  except (KeyError, ValueError) as error:
    raise UserError(f'{path}: params_ema is not of the NCSN++ that is here') from error
  network = dict(
    fn='cmjax.networks.songunet:songunet',
    channels=channels,
    channel_mult=mults,
    blocks=blocks,
    attention=(16,),
    embedding='fourier' if fourier else 'positional',
    residual_input=fourier,
    taps=(1, 3, 3, 1) if fourier else (1, 1),
    noise_scale=1.0,
  )
  # Theirs are numbered in the order of use.
  stems, attending = {}, {}
  pyramids = {}
  decoder = list(layers.decoder(size, len(mults), blocks))
  for place in [*layers.encoder(size, len(mults), blocks), *decoder]:
    if place.kind == 'conv':
      continue
    stems[place.name] = f'ResnetBlockBigGANpp_{len(stems)}'
    there = size >> place.level == 16 and place.kind == 'block'
    last = place.name.startswith('enc') or place.index == blocks
    if place.kind == 'in0' or (there and last):
      attending[place.name] = f'AttnBlockpp_{len(attending)}'
    if place.kind == 'down':
      name = place.name.replace('down', 'aux_residual')
      pyramids[name] = f'Downsample_{len(pyramids)}/Conv2d_0'
  return names.Plan(
    origin='openai/consistency_models_cifar10',
    network=network,
    precond=_precond(path, form),
    shape=names.shape_of((size, size, image_channels), str(path)),
    classes=0,
    tensors=_with_qkv(tensors, set(attending.values()), path),
    find=_find_jax(stems, attending, pyramids),
  )


def _with_qkv(
  tensors: names.Tensors, blocks: set[str], path: str | Path
) -> names.Tensors:
  """q, k and v of every attention as one, where they were three dense layers."""
  joined = {}
  for name, array in tensors.items():
    block, _, rest = name.partition('/NIN_')
    number, _, leaf = rest.partition('/')
    # Of others, as many as a file names would be joined.
    if block in blocks and number in ('0', '1', '2') and leaf in ('W', 'b'):
      three = [tensors.get(f'{block}/NIN_{i}/{leaf}') for i in range(3)]
      if all(a is not None for a in three):
        try:
          joined[f'{block}/qkv/{leaf}'] = np.concatenate(three, axis=-1)
        except ValueError as error:
          raise UserError(f'{path}: {name} and its like do not join') from error
        continue
    joined[name] = array
  return joined


_JAX_BLOCK = {
  'norm0': 'GroupNorm_0',
  'conv0': 'Conv_0',
  'affine': 'Dense_0',
  'norm1': 'GroupNorm_1',
  'conv1': 'Conv_1',
  'skip': 'Conv_2',
}
_JAX_ATTENTION = {'norm2': 'GroupNorm_0', 'qkv': 'qkv', 'proj': 'NIN_3'}


def _find_jax(
  stems: dict[str, str], attending: dict[str, str], pyramids: dict[str, str]
) -> names.Find:
  def find(address):
    first, *rest = address
    if first == 'map_noise':
      return 'GaussianFourierProjection_0/W', names.as_is
    if first.startswith('map_layer'):
      return f'Dense_{first[-1]}/{rest[0]}', names.as_is
    if first.endswith('_conv'):
      return f'Conv_{int(first.endswith("aux_conv"))}/{rest[0]}', names.as_is
    if first.endswith('aux_norm'):
      return f'GroupNorm_0/{rest[0]}', names.as_is
    if first in pyramids:
      return f'{pyramids[first]}/weight', names.as_is
    if first.removesuffix('_bias') in pyramids:
      return f'{pyramids[first.removesuffix("_bias")]}/bias', names.as_is
    part, leaf = rest
    if part in _JAX_BLOCK:
      return f'{stems[first]}/{_JAX_BLOCK[part]}/{leaf}', names.as_is
    if part == 'norm2':
      return f'{attending[first]}/GroupNorm_0/{leaf}', names.as_is
    leaf = 'W' if leaf == 'kernel' else 'b'
    layout = _qkv_from_jax if part == 'qkv' else _dense_from_jax
    return f'{attending[first]}/{_JAX_ATTENTION[part]}/{leaf}', layout

  return find


def _dense_from_jax(a: np.ndarray) -> np.ndarray:
  """[in, out] -> a 1x1 convolution [1, 1, in, out]."""
  return a[None, None] if a.ndim == 2 else a


def _qkv_from_jax(a: np.ndarray) -> np.ndarray:
  return names.alternating(_dense_from_jax(a))
