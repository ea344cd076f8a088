"""Pickled networks of EDM, EDM2 and ECT: their names -> ours.

Source: NVlabs/edm `networks.py`, NVlabs/edm2 `networks_edm2.py`, locuslab/ect.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmjax.core import LOG_WEIGHT, UserError
from cmjax.port import names
from cmjax.port.pickles import Module

# Constructor arguments that do not affect the function, or only in training.
_IGNORED = {
  'use_fp16',
  'sigma_min',
  'sigma_max',
  'dropout',
  'label_dropout',
  'dropout_res',
}
_PRECONDS = {'EDMPrecond': 'edm', 'ECMPrecond': 'consistency', 'Precond': 'edm'}


def _locator(prefix: str, adm: bool) -> names.Locate:
  def locate(address):
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

  return locate


def plan(module: Module, path: str | Path) -> names.Plan:
  """The plan of a network of EDM, EDM2 or ECT from its constructor arguments.

  Raises: UserError naming a class or an argument that is not supported.
  """
  if module.class_name not in _PRECONDS:
    supported = ', '.join(_PRECONDS)
    name = names.short_repr(module.class_name).strip("'") or 'module without a class'
    raise UserError(f'{path}: contains a {name}; supported are {supported}')
  arguments = _Arguments(module.arguments, f'{path}: {module.class_name}')
  size, channels = arguments.pop('img_resolution', 0), arguments.pop('img_channels', 0)
  precond = {
    'fn': f'cmjax.precond:{_PRECONDS[module.class_name]}',
    'sigma_data': float(arguments.pop('sigma_data', 0.5)),
  }
  if module.class_name == 'ECMPrecond':
    precond['sigma_min'] = float(arguments.pop('sigma_min', 0.003))
  classes = arguments.pop('label_dim', 0)
  if module.class_name == 'Precond':
    network, origin, prefix = _edm2_network(arguments), 'NVlabs/edm2', 'unet'
    network['log_weight'] = 'logvar_linear.weight' in module.tensors  # ECT's have none
  else:
    origin = 'locuslab/ect' if 'sigma_min' in precond else 'NVlabs/edm'
    prefix = 'model'
    networks = {'SongUNet': _song_network, 'DhariwalUNet': _adm_network}
    kind = arguments.pop('model_type', 'DhariwalUNet', choices=networks)
    network = networks[kind](arguments)
  arguments.check_empty()
  return names.Plan(
    origin=origin,
    network=network,
    precond=precond,
    shape=names.shape_of((size, size, channels), str(path)),
    classes=names.classes_of(classes, str(path)),
    tensors=dict(module.tensors),
    locate=_locator(prefix, network['fn'].endswith(':adm')),
    computed=r'\.resample_filter$',
  )


class _Arguments:
  """The arguments of a constructor, each of which must be read or ignored."""

  def __init__(self, arguments: Mapping[str, Any], where: str):
    self._left = dict(arguments)
    self._where = where

  def pop(self, name: str, default: Any, *, choices: Any = None) -> Any:
    """Removes and returns an argument; a missing one has its default.

    Raises: UserError if its type is not that of the default, or it is not in `choices`.
    """
    value = self._left.pop(name, default)
    value = tuple(value) if isinstance(value, list) else value
    valid = _has_type_of(value, default) or (value is None and None in (choices or ()))
    if not valid or (choices is not None and value not in choices):
      raise UserError(
        f'{self._where} has {name}={names.short_repr(value)}, which is not supported'
      )
    return value

  def check_empty(self) -> None:
    """Raises UserError if an argument is left that is not in `_IGNORED`."""
    for name in sorted(set(self._left) - _IGNORED):
      argument = f'{names.short_repr(name)[1:-1]}={names.short_repr(self._left[name])}'
      raise UserError(f'{self._where} has {argument}, which is not supported')


def _has_type_of(value: Any, default: Any) -> bool:
  """Whether a value has the type of the default, and a bounded size."""
  if type(default) is tuple:
    return (
      type(value) is tuple and len(value) <= 64 and all(type(n) is int for n in value)
    )
  if type(default) is float:
    return type(value) in (int, float) and abs(value) < 1e9
  return type(value) is type(default)


def _song_network(arguments: _Arguments) -> dict[str, Any]:
  embedding = arguments.pop(
    'embedding_type', 'positional', choices=('positional', 'fourier')
  )
  # The next three are popped to refuse any other value.
  arguments.pop('decoder_type', 'standard', choices=('standard',))
  arguments.pop('channel_mult_emb', 4, choices=(4,))
  arguments.pop('channel_mult_noise', 1, choices=(2 if embedding == 'fourier' else 1,))
  encoder = arguments.pop('encoder_type', 'standard', choices=('standard', 'residual'))
  return dict(
    fn='cmjax.networks.songunet:songunet',
    channels=arguments.pop('model_channels', 128),
    channel_mult=arguments.pop('channel_mult', (1, 2, 2, 2)),
    num_blocks=arguments.pop('num_blocks', 4),
    attention_resolutions=arguments.pop('attn_resolutions', (16,)),
    embedding=embedding,
    residual_input=encoder == 'residual',
    taps=arguments.pop('resample_filter', (1, 1)),
    augment=arguments.pop('augment_dim', 0),
    noise_scale=1.0,
  )


def _adm_network(arguments: _Arguments) -> dict[str, Any]:
  arguments.pop('channel_mult_emb', 4, choices=(4,))
  arguments.pop('augment_dim', 0, choices=(0,))
  return dict(
    fn='cmjax.networks.adm:adm',
    channels=arguments.pop('model_channels', 192),
    channel_mult=arguments.pop('channel_mult', (1, 2, 3, 4)),
    num_blocks=arguments.pop('num_blocks', 3),
    attention_resolutions=arguments.pop('attn_resolutions', (32, 16, 8)),
    noise_scale=1.0,
  )


def _edm2_network(arguments: _Arguments) -> dict[str, Any]:
  mults = arguments.pop('channel_mult', (1, 2, 3, 4)) or (0,)
  arguments.pop('channel_mult_noise', mults[0], choices=(None, mults[0]))
  arguments.pop('channel_mult_emb', max(mults), choices=(None, max(mults)))
  arguments.pop('label_balance', 0.5, choices=(0.5,))
  arguments.pop('concat_balance', 0.5, choices=(0.5,))
  arguments.pop('logvar_channels', 128, choices=(128,))
  arguments.pop('resample_filter', (1, 1), choices=((1, 1),))
  balance = arguments.pop('res_balance', 0.3)
  arguments.pop('attn_balance', 0.3, choices=(balance,))
  return dict(
    fn='cmjax.networks.edm2:edm2',
    channels=arguments.pop('model_channels', 192),
    channel_mult=mults,
    num_blocks=arguments.pop('num_blocks', 3),
    attention_resolutions=arguments.pop('attn_resolutions', (16, 8)),
    head_channels=arguments.pop('channels_per_head', 64),
    balance=balance,
    clip=float(arguments.pop('clip_act', 256.0)),
    noise_scale=1.0,
  )
