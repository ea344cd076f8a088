"""Outdated names in configs of version 0.2, and the current ones.

A config is translated when it is read; no other module knows the outdated names.
"""

from collections.abc import Mapping
from typing import Any

# Modules, whose functions keep their names.
MODULES = {
  'cmjax.evaluate': 'cmjax.metrics.pixels',
  'cmjax.objectives.discrete': 'cmjax.objectives.consistency',
  'cmjax.objectives.meanflow': 'cmjax.objectives.flow_map',
  'cmjax.sharding': 'cmjax.runtime.sharding',
}
# Functions, by import path.
FUNCTIONS = {
  'cmjax.data:array': 'cmjax.data.files:from_path',
  'cmjax.data:blank': 'cmjax.data.blank:blank',
  'cmjax.data:digits': 'cmjax.data.digits:digits',
  'cmjax.data:points': 'cmjax.data.points:points',
  'cmjax.data:reference': 'cmjax.data.reference:reference',
  'cmjax.data:tfds': 'cmjax.data.tfds:tfds',
  'cmjax.distances:edm_weighting': 'cmjax.weightings:edm',
  'cmjax.distances:inverse_gap': 'cmjax.weightings:inverse_gap',
  'cmjax.distances:inverse_time': 'cmjax.weightings:inverse_time',
  'cmjax.distances:truncated_snr': 'cmjax.weightings:truncated_snr',
  'cmjax.distances:uniform': 'cmjax.weightings:uniform',
  'cmjax.networks.perceptual:lpips': 'cmjax.networks.lpips:lpips',
  'cmjax.samplers:ode': 'cmjax.diffusion_samplers:ode',
  'cmjax.schedules:adaptive_bins': 'cmjax.schedules:adaptive_num_scales',
  'cmjax.schedules:adaptive_target_rate': 'cmjax.schedules:adaptive_decay',
  'cmjax.schedules:doubling_bins': 'cmjax.schedules:doubling_num_scales',
  'cmjax.schedules:shrinking_gap': 'cmjax.schedules:relative_gap',
  'cmjax.studies:discrete_limit': 'cmjax.studies.discrete_limit:discrete_limit',
  'cmjax.studies:gradient_noise': 'cmjax.studies.gradient_noise:gradient_noise',
  'cmjax.studies:jvp_precision': 'cmjax.studies.jvp_precision:jvp_precision',
  'cmjax.studies:map_error': 'cmjax.studies.map_error:map_error',
  'cmjax.studies:normalised_bias': 'cmjax.studies.tangents:normalised_bias',
  'cmjax.studies:tangents': 'cmjax.studies.tangents:tangents',
  'cmjax.times:dyadic_times': 'cmjax.times:dyadic_pairs',
  'cmjax.times:two_times': 'cmjax.times:logit_normal_pairs',
}
# Keys, by a prefix of the current import path of their function.
KEYS = {
  'cmjax.data.points:': {'samples': 'num_samples'},
  'cmjax.data.tfds:': {'quoted_as': 'display_name'},
  'cmjax.diffusion_samplers:ode': {'steps': 'num_steps'},
  'cmjax.networks.': {
    'attend': 'attention_implementation',
    'attention': 'attention_resolutions',
    'blocks': 'num_blocks',
    'clocks': 'num_times',
  },
  'cmjax.objectives.consistency:': {
    'bins': 'num_scales',
    'block': 'block_size',
    'gap': 'relative_gap',
    'threshold': 'sigma_threshold',
  },
  'cmjax.objectives.flow_map:': {
    'finest': 'num_steps',
    'flow_share': 'flow_fraction',
    'own_tangent': 'marginal_tangent',
  },
  'cmjax.objectives.progressive:': {'steps': 'num_steps'},
  'cmjax.runtime.sharding:': {'slices': 'num_slices'},
  'cmjax.samplers:': {'times': 'sigmas'},
  'cmjax.schedules:': {'start_rate': 'start_decay'},
  'cmjax.studies.': {
    'batches': 'num_batches',
    'bins': 'num_bins',
    'count': 'num_sigmas',
    'draws': 'num_draws',
    'highest': 'sigma_max',
    'lowest': 'sigma_min',
    'points': 'num_scales',
    'samples': 'num_samples',
    'subset': 'subset_size',
  },
  'cmjax.studies.jvp_precision:': {'steps': 'widths'},
  'cmjax.studies.map_error:': {'steps': 'num_steps'},
  'cmjax.times:': {
    'bins': 'num_scales',
    'equal_share': 'equal_fraction',
    'finest': 'num_steps',
    'flow_share': 'flow_fraction',
    'gap': 'relative_gap',
  },
}
# Keys that belong to no function, by the path of their section.
SECTIONS = {
  '': {'target_rate': 'target_decay'},
  'evaluation': {'pictured': 'num_pictured', 'samples': 'num_samples'},
}
# Metrics of the training step, in the unfinished window that a checkpoint holds.
METRICS = {'mean_t': 'mean_sigma'}


def renamed(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """The config with current names, and one line for each that was translated."""
  lines: list[str] = []
  return _renamed(config, '', lines), lines


def key_now(key: str, fn: str, section: str) -> str:
  """The current name of a key; the key itself if it has not changed.

  Args:
    key: a key of the function `fn` or, if that is empty, of the section.
    fn: the current import path of a function, or empty.
    section: the dotted path of a part without a function; empty: the top level.
  """
  if not fn:
    return SECTIONS.get(section, {}).get(key, key)
  for start in sorted(KEYS, key=len, reverse=True):
    if fn.startswith(start) and key in KEYS[start]:
      return KEYS[start][key]
  return key


def function_now(path: str) -> str:
  """The current import path of a function; the path itself if it has not changed."""
  module, colon, name = path.partition(':')
  return FUNCTIONS.get(path) or MODULES.get(module, module) + colon + name


def _renamed(part: Mapping[str, Any], where: str, lines: list[str]) -> dict[str, Any]:
  old_fn, result = part.get('fn'), {}
  fn = function_now(old_fn) if isinstance(old_fn, str) else ''
  for old_key, value in part.items():
    key = key_now(old_key, fn, where)
    if key in part:
      key = old_key  # if both are given, the old one is kept, and refused as unknown
    path = f'{where}.{old_key}'.lstrip('.')
    if key == 'fn' and fn and fn != old_fn:
      lines.append(f'{path}: {old_fn} is now {fn}')
      value = fn
    elif key != old_key:
      lines.append(f'{path} is now {key}')
    if isinstance(value, Mapping):
      value = _renamed(value, f'{where}.{key}'.lstrip('.'), lines)
    result[key] = value
  return result
