"""Names and layouts of released checkpoints -> ours, and which network they are of.

Each `Plan` says which of our networks a file holds, and where in the file each of our
parameters is. `assemble` follows it to the letter: a tensor that is missing, has
another shape, or is left over is told by name.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
import re
from typing import Any, NamedTuple

import numpy as np

from cmjax.core import LOG_WEIGHT, Params, UserError
from cmjax.networks import layers
from cmjax.port import read

Address = tuple[str, ...]  # of one of our parameters: ('enc_32x32_conv', 'kernel')
Tensors = dict[str, np.ndarray]
Layout = Callable[[np.ndarray], np.ndarray]


class Plan(NamedTuple):
  """Which model a file holds, as config parts, and how to read its parameters."""

  origin: str  # whose format it is
  network: dict[str, Any]
  precond: dict[str, Any]
  shape: tuple[int, int, int]  # H, W, C
  classes: int  # 0: unconditional
  tensors: Tensors  # under the file's own names
  find: Callable[[Address], tuple[str, Layout]]  # the name there of a parameter here
  computed: str = '^$'  # pattern of tensors that our network computes itself


def assemble(plan: Plan, like: Params, path: str | Path) -> tuple[Params, list[str]]:
  """Our parameters as numpy arrays in the shapes of `like`, and the names left over.

  The plan's tensors are used up on the way, so that each is held only once.

  Raises: UserError naming the first parameter that is missing, of another shape, or
    not finite.
  """

  def walk(tree, address):
    if isinstance(tree, Mapping):
      return {key: walk(tree[key], (*address, key)) for key in tree}
    name, layout = plan.find(address)
    ours = '/'.join(address)
    if name not in plan.tensors:
      raise UserError(f'{path} has no {name}, which parameter {ours} needs')
    found = layout(plan.tensors.pop(name))
    if found.shape != tree.shape:
      raise UserError(
        f'{path}: {name} has shape {found.shape} where parameter {ours} needs '
        f'{tree.shape}; it is of another network'
      )
    found = np.asarray(found, tree.dtype, order='C')
    if not np.isfinite(found).all():
      raise UserError(f'{path}: {name} is not finite; the file is damaged')
    return found

  params = walk(like, ())
  over = (name for name in plan.tensors if not re.search(plan.computed, name))
  return params, sorted(over)


def plan(file: read.File, path: str | Path, form: str = '') -> Plan:
  """Recognises a file of EDM, EDM2, ECT or OpenAI by what it holds.

  Args:
    file: as `port.read.read` gives it.
    path: names the file in errors; of OpenAI's files it also says the form.
    form: 'denoiser' or 'consistency', for OpenAI's, which do not say it; if empty, the
      path must hold edm, cd or ct as a word, as those that were released do.

  Raises: UserError if it is of no known kind, or of a network that is not here.
  """
  content = file.content
  if not isinstance(content, read.Module | Mapping):
    raise _unknown(path, f'a {type(content).__name__}')
  if isinstance(content, Mapping):
    modules = (content.get(entry) for entry in ('ema', 'net'))
    content = next((m for m in modules if isinstance(m, read.Module)), content)
  if isinstance(content, read.Module):
    return _edm(content, path)
  if 'params_ema' in content:
    return _openai_jax(_flat(content['params_ema'], '/', path), path, form)
  if 'time_embed.0.weight' in content:
    return _openai(_flat(content, '.', path), path, form)
  raise _unknown(path, ', '.join(str(name)[:40] for name in list(content)[:5]))


def _flat(content: Any, separator: str, path: str | Path) -> Tensors:
  try:
    return read.tensors(content, separator)
  except ValueError as error:
    raise UserError(f'{path}: damaged or not a checkpoint ({error})') from error


def own(
  tensors: Tensors, meta: Mapping[str, Any], network: dict, precond: dict
) -> Plan:
  """The plan of a file of ours: names and layouts are ours already."""
  return Plan(
    origin=meta['origin'],
    network=network,
    precond=precond,
    shape=tuple(meta['shape']),
    classes=meta['classes'],
    tensors=tensors,
    find=lambda address: ('/'.join(address), _as_is),
  )


def _unknown(path: str | Path, holds: str) -> UserError:
  return UserError(
    f'{path}: not a checkpoint of EDM, EDM2, ECT, OpenAI or cmjax; it holds '
    f'{holds or "nothing"}'
  )


# Layouts ---------------------------------------------------------------------------


def _as_is(a: np.ndarray) -> np.ndarray:
  return a


def _from_torch(a: np.ndarray) -> np.ndarray:
  """[out, in, H, W] -> [H, W, in, out], and [out, in] -> [in, out]."""
  return a.transpose((*range(2, a.ndim), 1, 0)) if a.ndim > 1 else a


def _sines_first(a: np.ndarray) -> np.ndarray:
  """The first dense layer of ADM, which meets cosines first there and last here."""
  return np.roll(_from_torch(a), a.shape[-1] // 2, axis=0) if a.ndim > 1 else a


def _alternating(a: np.ndarray) -> np.ndarray:
  """Output channels all q, all k, all v -> q, k, v, q, k, v, ... on the last axis."""
  thirds = np.reshape(a, (*a.shape[:-1], 3, -1))
  return np.reshape(np.swapaxes(thirds, -1, -2), a.shape)


# EDM, ECT and EDM2 -----------------------------------------------------------------

_LEAVES = {'kernel': 'weight', 'scale': 'weight'}
# Constructor arguments that only matter in training, or to what we choose ourselves.
_IDLE = {
  'use_fp16',
  'sigma_min',
  'sigma_max',
  'dropout',
  'label_dropout',
  'dropout_res',
}
_FORMS = {'EDMPrecond': 'edm', 'ECMPrecond': 'consistency', 'Precond': 'edm'}


def _find_edm(prefix: str, adm: bool) -> Callable[[Address], tuple[str, Layout]]:
  def find(address):
    first, *rest = address
    layout = _sines_first if adm and first == 'map_layer0' else _from_torch
    if first == LOG_WEIGHT:
      kind = 'linear' if rest[0] == 'weight' else 'fourier'
      return f'logvar_{kind}.{rest[0]}', _from_torch
    if first.endswith('aux_residual_bias'):
      first, rest = first.removesuffix('_bias'), ['bias']
    elif first.startswith('emb_fourier_'):
      first, rest = 'emb_fourier', [first.removeprefix('emb_fourier_')]
    elif first == 'map_noise':
      rest = ['freqs']
    if first.startswith(('enc_', 'dec_')):
      first = f'{first[:3]}.{first[4:]}'
    parts = [prefix, first, *(_LEAVES.get(part, part) for part in rest)]
    return '.'.join(parts), layout

  return find


def _edm(module: read.Module, path: str | Path) -> Plan:
  """Source: NVlabs/edm `networks.py`, NVlabs/edm2 `networks_edm2.py`, locuslab/ect."""
  said = _Arguments(module.arguments, f'{path}: its {module.class_name}')
  if module.class_name not in _FORMS:
    raise UserError(
      f'{path}: holds a {module.class_name or "module without a class"}; known are '
      f'{", ".join(_FORMS)}'
    )
  size, channels = said.take('img_resolution'), said.take('img_channels')
  precond = {
    'fn': f'cmjax.precond:{_FORMS[module.class_name]}',
    'sigma_data': float(said.take('sigma_data', 0.5)),
  }
  if module.class_name == 'ECMPrecond':
    precond['sigma_min'] = float(said.take('sigma_min', 0.003))
  classes = said.take('label_dim', 0)
  if module.class_name == 'Precond':
    network, origin, prefix = _edm2_network(said), 'NVlabs/edm2', 'unet'
    network['log_weight'] = 'logvar_linear.weight' in module.tensors  # not in ECT's
  else:
    origin = 'locuslab/ect' if 'sigma_min' in precond else 'NVlabs/edm'
    prefix = 'model'
    networks = {'SongUNet': _song_network, 'DhariwalUNet': _adm_network}
    kind = said.take('model_type', 'DhariwalUNet', among=networks)
    network = networks[kind](said)
  said.check_all_taken()
  return Plan(
    origin=origin,
    network=network,
    precond=precond,
    shape=(size, size, channels),
    classes=classes,
    tensors=dict(module.tensors),
    find=_find_edm(prefix, network['fn'].endswith(':adm')),
    computed=r'\.resample_filter$',
  )


class _Arguments:
  """What a constructor was called with, to be taken one by one."""

  def __init__(self, arguments: Mapping[str, Any], where: str):
    self._left = dict(arguments)
    self._where = where

  def take(self, name: str, default: Any = None, among: Any = None) -> Any:
    if default is None and name not in self._left:
      raise UserError(f'{self._where} does not say {name}')
    value = self._left.pop(name, default)
    value = tuple(value) if isinstance(value, list) else value
    if among is not None and value not in among:
      raise UserError(f'{self._where} has {name}={value!r}, which is not here')
    return value

  def check_all_taken(self) -> None:
    for name in sorted(set(self._left) - _IDLE):
      value = self._left[name]
      raise UserError(f'{self._where} has {name}={value!r}, which is not known here')


def _song_network(said: _Arguments) -> dict[str, Any]:
  embedding = said.take('embedding_type', 'positional', ('positional', 'fourier'))
  said.take('decoder_type', 'standard', among=('standard',))
  said.take('channel_mult_emb', 4, among=(4,))
  said.take('channel_mult_noise', 1, among=(2 if embedding == 'fourier' else 1,))
  encoder = said.take('encoder_type', 'standard', among=('standard', 'residual'))
  return dict(
    fn='cmjax.networks.songunet:songunet',
    channels=said.take('model_channels', 128),
    channel_mult=said.take('channel_mult', (1, 2, 2, 2)),
    blocks=said.take('num_blocks', 4),
    attention=said.take('attn_resolutions', (16,)),
    embedding=embedding,
    residual_input=encoder == 'residual',
    taps=said.take('resample_filter', (1, 1)),
    augment=said.take('augment_dim', 0),
    noise_scale=1.0,
  )


def _adm_network(said: _Arguments) -> dict[str, Any]:
  said.take('channel_mult_emb', 4, among=(4,))
  said.take('augment_dim', 0, among=(0,))
  return dict(
    fn='cmjax.networks.adm:adm',
    channels=said.take('model_channels', 192),
    channel_mult=said.take('channel_mult', (1, 2, 3, 4)),
    blocks=said.take('num_blocks', 3),
    attention=said.take('attn_resolutions', (32, 16, 8)),
    noise_scale=1.0,
  )


def _edm2_network(said: _Arguments) -> dict[str, Any]:
  mults = said.take('channel_mult', (1, 2, 3, 4))
  said.take('channel_mult_noise', mults[0], among=(None, mults[0]))
  said.take('channel_mult_emb', max(mults), among=(None, max(mults)))
  said.take('label_balance', 0.5, among=(0.5,))
  said.take('concat_balance', 0.5, among=(0.5,))
  said.take('logvar_channels', 128, among=(128,))
  said.take('resample_filter', (1, 1), among=((1, 1),))
  balance = said.take('res_balance', 0.3)
  said.take('attn_balance', 0.3, among=(balance,))
  return dict(
    fn='cmjax.networks.edm2:edm2',
    channels=said.take('model_channels', 192),
    channel_mult=mults,
    blocks=said.take('num_blocks', 3),
    attention=said.take('attn_resolutions', (16, 8)),
    head_channels=said.take('channels_per_head', 64),
    balance=balance,
    clip=float(said.take('clip_act', 256)),
    noise_scale=1.0,
  )


# OpenAI ----------------------------------------------------------------------------

FORMS = ('denoiser', 'consistency')
_WORDS = {'edm': 'denoiser', 'cd': 'consistency', 'ct': 'consistency'}


def _openai_precond(path: str | Path, form: str) -> dict[str, Any]:
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


def _openai(tensors: Tensors, path: str | Path, form: str) -> Plan:
  """An ADM whose sizes are those of its tensors.

  The size of its images is not in the file: as in every released one, attention begins
  at 32x32, and heads have 64 channels.
  Source: openai/consistency_models `unet.py`.
  """
  up = re.compile(r'output_blocks\.\d+\.[12]\.in_layers\.0\.weight')
  levels = 1 + sum(bool(up.fullmatch(name)) for name in tensors)
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
  except (KeyError, IndexError, ValueError, TypeError) as error:
    raise UserError(
      f'{path}: not the U-Net of OpenAI that is here ({error})'
    ) from error
  if min(widths) < 128:  # it has 32 groups of channels whatever the width
    raise UserError(f'{path}: a network {min(widths)} channels wide is not here')
  classes = len(tensors.get('label_emb.weight', ()))
  network = dict(
    fn='cmjax.networks.adm:adm',
    channels=channels,
    channel_mult=tuple(width // channels for width in widths),
    blocks=a_level - 1,
    attention=tuple(size >> i for i, attend in enumerate(attends) if attend),
    film=told == 2 * widths[0],
    noise_scale=1000.0,
  )
  return Plan(
    origin='openai/consistency_models',
    network=network,
    precond=_openai_precond(path, form),
    shape=(size, size, image_channels),
    classes=classes,
    tensors=tensors,
    find=_find_openai(size, levels, a_level - 1, set(tensors)),
  )


def _find_openai(
  size: int, levels: int, blocks: int, names: set[str]
) -> Callable[[Address], tuple[str, Layout]]:
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
      after = 2 if f'output_blocks.{at}.2.in_layers.0.weight' in names else 1
      stems[place.name] = f'output_blocks.{at}.{after}', ''
    else:
      at += 1
      stems[place.name] = f'output_blocks.{at}.0', f'output_blocks.{at}.1'

  def find(address):
    first, *middle, leaf = address
    leaf = _LEAVES.get(leaf, leaf)
    if first in _TORCH_TOP:
      layouts = {'map_label': _as_is, 'map_layer0': _sines_first}
      return f'{_TORCH_TOP[first]}.{leaf}', layouts.get(first, _from_torch)
    block, attention = stems[first]
    if not middle:
      return f'{block}.{leaf}', _from_torch
    if middle[0] in _TORCH_BLOCK:
      return f'{block}.{_TORCH_BLOCK[middle[0]]}.{leaf}', _from_torch
    layout = _qkv_from_torch if middle[0] == 'qkv' else _projection_from_torch
    return f'{attention}.{_TORCH_ATTENTION[middle[0]]}.{leaf}', layout

  return find


def _projection_from_torch(a: np.ndarray) -> np.ndarray:
  """A 1x1 convolution, kept as [out, in, 1] or [out, in, 1, 1]."""
  return _from_torch(a if a.ndim in (1, 4) else a[..., None])


def _qkv_from_torch(a: np.ndarray) -> np.ndarray:
  return _alternating(_projection_from_torch(a))


def _openai_jax(tensors: Tensors, path: str | Path, form: str) -> Plan:
  """The NCSN++ or DDPM++ of CIFAR-10, told apart by its embedding.

  Source: openai/consistency_models_cifar10 `ncsnpp.py`.
  """
  fourier = 'GaussianFourierProjection_0/W' in tensors
  size, mults, blocks = 32, (2, 2, 2), 4
  try:
    channels = tensors['Conv_0/kernel'].shape[-1]
  except (KeyError, IndexError) as error:
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
  return Plan(
    origin='openai/consistency_models_cifar10',
    network=network,
    precond=_openai_precond(path, form),
    shape=(size, size, tensors['Conv_0/kernel'].shape[-2]),
    classes=0,
    tensors=_with_qkv(tensors),
    find=_find_openai_jax(stems, attending, pyramids),
  )


def _with_qkv(tensors: Tensors) -> Tensors:
  """q, k and v of every attention as one, where they were three dense layers."""
  joined = {}
  for name, array in tensors.items():
    block, _, rest = name.partition('/NIN_')
    if rest and rest[0] in '012':
      leaf = rest.partition('/')[2]
      three = [tensors.get(f'{block}/NIN_{i}/{leaf}') for i in range(3)]
      if all(a is not None for a in three):
        joined[f'{block}/qkv/{leaf}'] = np.concatenate(three, axis=-1)
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


def _find_openai_jax(
  stems: dict[str, str], attending: dict[str, str], pyramids: dict[str, str]
) -> Callable[[Address], tuple[str, Layout]]:
  def find(address):
    first, *rest = address
    if first == 'map_noise':
      return 'GaussianFourierProjection_0/W', _as_is
    if first.startswith('map_layer'):
      return f'Dense_{first[-1]}/{rest[0]}', _as_is
    if first.endswith('_conv'):
      return f'Conv_{int(first.endswith("aux_conv"))}/{rest[0]}', _as_is
    if first.endswith('aux_norm'):
      return f'GroupNorm_0/{rest[0]}', _as_is
    if first in pyramids:
      return f'{pyramids[first]}/weight', _as_is
    if first.removesuffix('_bias') in pyramids:
      return f'{pyramids[first.removesuffix("_bias")]}/bias', _as_is
    part, leaf = rest
    if part in _JAX_BLOCK:
      return f'{stems[first]}/{_JAX_BLOCK[part]}/{leaf}', _as_is
    if part == 'norm2':
      return f'{attending[first]}/GroupNorm_0/{leaf}', _as_is
    leaf = 'W' if leaf == 'kernel' else 'b'
    layout = _qkv_from_jax if part == 'qkv' else _dense_from_jax
    return f'{attending[first]}/{_JAX_ATTENTION[part]}/{leaf}', layout

  return find


def _dense_from_jax(a: np.ndarray) -> np.ndarray:
  """[in, out] -> a 1x1 convolution [1, 1, in, out]."""
  return a[None, None] if a.ndim == 2 else a


def _qkv_from_jax(a: np.ndarray) -> np.ndarray:
  return _alternating(_dense_from_jax(a))
