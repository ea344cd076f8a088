"""OpenAI's consistency models, from PyTorch and from JAX: their names -> ours.

Source: openai/consistency_models `unet.py`, openai/consistency_models_cifar10
`ncsnpp.py`.
"""

from pathlib import Path
import re
from typing import Any

import numpy as np

from cmjax.core import UserError, first_line
from cmjax.networks import unet
from cmjax.port import names

FORMS = ('denoiser', 'consistency')
_FORM_OF_WORD = {'edm': 'denoiser', 'cd': 'consistency', 'ct': 'consistency'}


def _precond(path: str | Path, form: str) -> dict[str, Any]:
  """The preconditioning, as the form or the path says: these files have no config."""
  if form not in ('', *FORMS):
    raise UserError(f'form must be one of {", ".join(FORMS)}; got {form!r}')
  words = re.split('[^a-z0-9]+', '/'.join(Path(path).parts[-3:]).lower())
  forms = {form} if form else {_FORM_OF_WORD.get(word, '') for word in words} - {''}
  if len(forms) != 1:
    raise UserError(
      f'{path}: the name does not tell whether this is a denoiser or a consistency '
      "function; put edm, cd or ct in it, or set form='denoiser' or 'consistency'"
    )
  if forms == {'denoiser'}:
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
  """The plan of an ADM, whose sizes are inferred from the shapes of its tensors.

  The image size is not in the file. As in all released models, the largest resolution
  with attention is assumed to be 32x32, and heads to have 64 channels.
  """
  up = re.compile(r'output_blocks\.\d+\.[12]\.in_layers\.0\.weight')
  levels = 1 + sum(bool(up.fullmatch(name)) for name in tensors)
  if levels > unet.MAX_LEVELS:
    raise UserError(f'{path}: a U-Net with {levels} levels is not supported')
  inputs = {name.split('.')[1] for name in tensors if name.startswith('input_blocks.')}
  per_level = len(inputs) // levels  # residual blocks, and the convolution before them
  firsts = [1 + level * per_level for level in range(levels)]
  attends = [f'input_blocks.{i}.1.qkv.weight' in tensors for i in firsts]
  try:
    channels = tensors['time_embed.0.weight'].shape[1]
    widths = [len(tensors[f'input_blocks.{i}.0.out_layers.3.bias']) for i in firsts]
    affine_size = len(tensors['input_blocks.1.0.emb_layers.1.bias'])
    size = 32 * 2 ** attends.index(True)
    image_channels = tensors['input_blocks.0.0.weight'].shape[1]
    mults = tuple(width // channels for width in widths)
  except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
    raise UserError(
      f"{path}: not OpenAI's U-Net as released ({first_line(error)})"
    ) from error
  if min(widths) < 128:  # OpenAI's norms have 32 groups at any width, ours fewer
    raise UserError(f'{path}: {min(widths)} channels, but at least 128 are supported')
  classes = len(tensors.get('label_emb.weight', ()))
  network = dict(
    fn='cmjax.networks.adm:adm',
    channels=channels,
    channel_mult=mults,
    num_blocks=per_level - 1,
    attention_resolutions=tuple(
      size >> i for i, attend in enumerate(attends) if attend
    ),
    film=affine_size == 2 * widths[0],
    noise_scale=1000.0,
  )
  return names.Plan(
    origin='openai/consistency_models',
    network=network,
    precond=_precond(path, form),
    shape=names.shape_of((size, size, image_channels), str(path)),
    classes=names.classes_of(classes, str(path)),
    tensors=tensors,
    locate=_torch_locator(size, levels, per_level - 1, tensors),
  )


def _torch_locator(
  size: int, levels: int, num_blocks: int, tensors: names.Tensors
) -> names.Locate:
  prefixes = {}  # by block: of the residual block, and of its attention
  for i, block in enumerate(unet.encoder(size, levels, num_blocks)):
    prefixes[block.name] = f'input_blocks.{i}.0', f'input_blocks.{i}.1'
  i = -1
  for block in unet.decoder(size, levels, num_blocks):
    if block.kind == 'in0':
      prefixes[block.name] = 'middle_block.0', 'middle_block.1'
    elif block.kind == 'in1':
      prefixes[block.name] = 'middle_block.2', ''
    elif block.kind == 'up':  # part of the previous output block, after its attention
      after = 2 if f'output_blocks.{i}.2.in_layers.0.weight' in tensors else 1
      prefixes[block.name] = f'output_blocks.{i}.{after}', ''
    else:
      i += 1
      prefixes[block.name] = f'output_blocks.{i}.0', f'output_blocks.{i}.1'

  def locate(address):
    first, *middle, leaf = address
    leaf = names.LEAVES.get(leaf, leaf)
    if first in _TORCH_TOP:
      layouts = {'map_label': names.as_is, 'map_layer0': names.sines_first}
      return f'{_TORCH_TOP[first]}.{leaf}', layouts.get(first, names.from_torch)
    block, attention = prefixes[first]
    if not middle:
      return f'{block}.{leaf}', names.from_torch
    if middle[0] in _TORCH_BLOCK:
      return f'{block}.{_TORCH_BLOCK[middle[0]]}.{leaf}', names.from_torch
    layout = _qkv_from_torch if middle[0] == 'qkv' else _projection_from_torch
    return f'{attention}.{_TORCH_ATTENTION[middle[0]]}.{leaf}', layout

  return locate


def _projection_from_torch(a: np.ndarray) -> np.ndarray:
  """The kernel of a 1x1 convolution from [out, in, 1] or [out, in, 1, 1]."""
  return names.from_torch(a if a.ndim in (1, 4) else a[..., None])


def _qkv_from_torch(a: np.ndarray) -> np.ndarray:
  return names.interleaved(_projection_from_torch(a))


def plan_jax(tensors: names.Tensors, path: str | Path, form: str) -> names.Plan:
  """The plan of an NCSN++ (Fourier embedding) or DDPM++ (positional) for CIFAR-10."""
  fourier = 'GaussianFourierProjection_0/W' in tensors
  size, mults, num_blocks = 32, (2, 2, 2), 4
  try:
    image_channels, channels = tensors['Conv_0/kernel'].shape[-2:]
  except (KeyError, ValueError) as error:
    raise UserError(
      f"{path}: params_ema is not of OpenAI's NCSN++ or DDPM++"
    ) from error
  network = dict(
    fn='cmjax.networks.songunet:songunet',
    channels=channels,
    channel_mult=mults,
    num_blocks=num_blocks,
    attention_resolutions=(16,),
    embedding='fourier' if fourier else 'positional',
    residual_input=fourier,
    taps=(1, 3, 3, 1) if fourier else (1, 1),
    noise_scale=1.0,
  )
  # OpenAI's modules are numbered in the order of use.
  blocks, attentions, downsamplings = {}, {}, {}
  decoder = unet.decoder(size, len(mults), num_blocks)
  for block in [*unet.encoder(size, len(mults), num_blocks), *decoder]:
    if block.kind == 'conv':
      continue
    blocks[block.name] = f'ResnetBlockBigGANpp_{len(blocks)}'
    at_16 = size >> block.level == 16 and block.kind == 'block'
    attends = block.name.startswith('enc') or block.position == num_blocks
    if block.kind == 'in0' or (at_16 and attends):
      attentions[block.name] = f'AttnBlockpp_{len(attentions)}'
    if block.kind == 'down':
      name = block.name.replace('down', 'aux_residual')
      downsamplings[name] = f'Downsample_{len(downsamplings)}/Conv2d_0'
  return names.Plan(
    origin='openai/consistency_models_cifar10',
    network=network,
    precond=_precond(path, form),
    shape=names.shape_of((size, size, image_channels), str(path)),
    classes=0,
    tensors=_with_qkv(tensors, set(attentions.values()), path),
    locate=_jax_locator(blocks, attentions, downsamplings),
  )


def _with_qkv(
  tensors: names.Tensors, blocks: set[str], path: str | Path
) -> names.Tensors:
  """Joins q, k and v of every attention, which are three dense layers in the file."""
  joined = {}
  for name, array in tensors.items():
    block, _, rest = name.partition('/NIN_')
    number, _, leaf = rest.partition('/')
    # Others are not joined: a hostile file could name any number of them.
    if block in blocks and number in ('0', '1', '2') and leaf in ('W', 'b'):
      parts = [f'{block}/NIN_{i}/{leaf}' for i in range(3)]
      if all(part in tensors for part in parts):
        try:
          qkv = np.concatenate([tensors[part] for part in parts], axis=-1)
        except ValueError as error:
          raise UserError(
            f'{path}: {name} differs in shape from the rest of q, k and v'
          ) from error
        joined[f'{block}/qkv/{leaf}'] = qkv
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


def _jax_locator(
  blocks: dict[str, str], attentions: dict[str, str], downsamplings: dict[str, str]
) -> names.Locate:
  def locate(address):
    first, *rest = address
    if first == 'map_noise':
      return 'GaussianFourierProjection_0/W', names.as_is
    if first.startswith('map_layer'):
      return f'Dense_{first[-1]}/{rest[0]}', names.as_is
    if first.endswith('_conv'):
      return f'Conv_{int(first.endswith("aux_conv"))}/{rest[0]}', names.as_is
    if first.endswith('aux_norm'):
      return f'GroupNorm_0/{rest[0]}', names.as_is
    if first in downsamplings:
      return f'{downsamplings[first]}/weight', names.as_is
    if first.removesuffix('_bias') in downsamplings:
      return f'{downsamplings[first.removesuffix("_bias")]}/bias', names.as_is
    part, leaf = rest
    if part in _JAX_BLOCK:
      return f'{blocks[first]}/{_JAX_BLOCK[part]}/{leaf}', names.as_is
    if part == 'norm2':
      return f'{attentions[first]}/GroupNorm_0/{leaf}', names.as_is
    leaf = 'W' if leaf == 'kernel' else 'b'
    layout = _qkv_from_jax if part == 'qkv' else _dense_from_jax
    return f'{attentions[first]}/{_JAX_ATTENTION[part]}/{leaf}', layout

  return locate


def _dense_from_jax(a: np.ndarray) -> np.ndarray:
  """[in, out] -> a 1x1 convolution [1, 1, in, out]."""
  return a[None, None] if a.ndim == 2 else a


def _qkv_from_jax(a: np.ndarray) -> np.ndarray:
  return names.interleaved(_dense_from_jax(a))
