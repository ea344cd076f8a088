"""TPU topologies as devices to compile for, without a TPU.

libtpu contains the compiler and a description of every topology.
"""

import importlib.metadata
import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from cmjax.core import UserError, first_line
from cmjax.runtime.flops import PEAKS
from cmjax.runtime.sharding import Device


class Chip(NamedTuple):
  """Memory and speed of a TPU chip."""

  memory_gib: float
  usable_gib: float  # available to a program
  flops: float  # peak FLOP/s in bfloat16
  bandwidth: float  # of the memory, bytes/s


# Source: memory and bandwidth: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e;
# available memory: errors of the compiler of libtpu 0.0.42 for programs that do not
# fit.
CHIPS = {
  'v4': Chip(32, 30.75, PEAKS['TPU v4'], 1200e9),
  'v5e': Chip(16, 15.75, PEAKS['TPU v5 lite'], 819e9),
  'v5p': Chip(95, 95.74, PEAKS['TPU v5'], 2765e9),
  'v6e': Chip(32, 31.25, PEAKS['TPU v6 lite'], 1638e9),
}

# Read by libtpu when it is loaded. As no TPU is used, it needs neither the metadata
# server nor a lock against other processes.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3',
}


def stay_on_cpu() -> None:
  """Makes jax use the CPU even if libtpu is installed; call it before any other use."""
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  jax.config.update('jax_platforms', 'cpu')


class Topology(NamedTuple):
  """The parts of a name such as `v5e:16x16`, or `2*v5e:16x16` of two slices."""

  num_slices: int
  chip: str
  shape: str  # of chips in a slice


def parse(name: str) -> Topology:
  """Parses the name of a topology. Raises: UserError if it is not one."""
  match = re.fullmatch(r'(?:([1-9]\d*)\*)?([a-z0-9]+):(\d+(?:x\d+)+)', name)
  if not match or match[2] not in CHIPS:
    raise UserError(
      f'--topology={name}: must be like v5e:16x16, or 2*v5e:16x16 for two slices, of '
      f'one of the chips {", ".join(CHIPS)}'
    )
  return Topology(int(match[1] or 1), match[2], match[3])


def devices(name: str) -> list[Device]:
  """The chips of a topology, to compile for; arrays cannot be placed on them.

  Raises: UserError if there is no such topology, or libtpu is not installed.
  """
  num_slices, chip, shape = parse(name)
  if not importlib.util.find_spec('libtpu') and 'TPU_LIBRARY_PATH' not in os.environ:
    raise UserError(
      "--topology: libtpu, the TPU compiler, is missing; pip install 'cmjax[aot]'"
    )
  stay_on_cpu()
  options: dict[str, Any] = {'num_slices': num_slices} if num_slices > 1 else {}
  if chip == 'v4':  # one device per chip, as on real ones, instead of one per core
    options['chip_config_name'] = 'megacore'
  if set(shape.split('x')) == {'1'}:
    options['chips_per_host_bounds'] = [1, 1, 1]
  try:
    description = topologies.get_topology_desc(
      platform='tpu', topology_name=f'{chip}:{shape}', **options
    )
  except RuntimeError as error:
    raise UserError(f'--topology={name}: {first_line(error)}') from error
  return list(description.devices)


def libtpu_version() -> str:
  """The version of libtpu, or `unknown` for a build that is not a package."""
  try:
    return importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    return 'unknown'
