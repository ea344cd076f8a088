"""Names of EDM, EDM2 and ECT -> ours.

Source: NVlabs/edm `networks.py`, NVlabs/edm2 `networks_edm2.py`, locuslab/ect.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmjax.core import LOG_WEIGHT, UserError
from cmjax.port import names
from cmjax.port.pickles import Module

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


def _find(prefix: str, adm: bool) -> names.Find:
  def find(address):
    first, *rest = address
    layout = names.sines_first if adm and first == 'map_layer0' else names.from_torch
    if first == LOG_WEIGHT:
      kind = 'linear' if rest[0] == 'weight' else 'fourier'
      return f'logvar_{kind}.{rest[0]}', names.from_torch
    if first.endswith('aux_residual_bias'):
      first, rest = first.removesuffix('_bias'), ['bias']
    elif first.startswith('emb_fourier_'):
      first, rest = 'emb_fourier', [first.removeprefix('emb_fourier_')]
    elif first == 'map_noise':
      rest = ['freqs']
    if first.startswith(('enc_', 'dec_')):
      first = f'{first[:3]}.{first[4:]}'
    parts = [prefix, first, *(names.LEAVES.get(part, part) for part in rest)]
    return '.'.join(parts), layout

  return find


def plan(module: Module, path: str | Path) -> names.Plan:
  """A network of one of the three, as its pickle says it was made."""
  if module.class_name not in _FORMS:
    known = ', '.join(_FORMS)
    name = names.shown(module.class_name).strip("'") or 'module without a class'
    raise UserError(f'{path}: holds a {name}; known are {known}')
  said = _Arguments(module.arguments, f'{path}: its {module.class_name}')
  size, channels = said.take('img_resolution', 0), said.take('img_channels', 0)
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
  return names.Plan(
    origin=origin,
    network=network,
    precond=precond,
    shape=names.shape_of((size, size, channels), str(path)),
    classes=names.classes_of(classes, str(path)),
    tensors=dict(module.tensors),
    find=_find(prefix, network['fn'].endswith(':adm')),
    computed=r'\.resample_filter$',
  )


class _Arguments:
  """What a constructor was called with, to be taken one by one."""

  def __init__(self, arguments: Mapping[str, Any], where: str):
    self._left = dict(arguments)
    self._where = where

  def take(self, name: str, default: Any, among: Any = None) -> Any:
    """The argument, which has the type of its default, or is among those given."""
    value = self._left.pop(name, default)
    value = tuple(value) if isinstance(value, list) else value
    alike = _is_alike(value, default) or (value is None and None in (among or ()))
    if not alike or (among is not None and value not in among):
      raise UserError(
        f'{self._where} has {name}={names.shown(value)}, which is not here'
      )
    return value

  def check_all_taken(self) -> None:
    for name in sorted(set(self._left) - _IDLE):
      value = names.shown(self._left[name])
      raise UserError(
        f'{self._where} has {names.shown(name)[1:-1]}={value}, which is not known here'
      )


def _is_alike(value: Any, default: Any) -> bool:
  """Whether a value has the default's type, and is of a size to be compared."""
  if type(default) is tuple:
    return (
      type(value) is tuple and len(value) <= 64 and all(type(n) is int for n in value)
    )
  if type(default) is float:
    return type(value) in (int, float) and abs(value) < 1e9
  return type(value) is type(default)


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
  mults = said.take('channel_mult', (1, 2, 3, 4)) or (0,)
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
    clip=float(said.take('clip_act', 256.0)),
    noise_scale=1.0,
  )
