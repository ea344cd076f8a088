"""Ahead-of-time compilation: the training step of a run for TPUs without one.

libtpu holds the compiler and a description of every topology, and needs no TPU. What it
compiles here is the program a pod would run, with its memory and its collectives.
"""

import importlib.metadata
import importlib.util
import os
import re
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
import numpy as np

from cmjax import bench, data, logs, sharding, train
from cmjax.core import Batch, UserError, first_line
from cmjax.run import Run

GIB = 2**30


class Chip(NamedTuple):
  """What one chip has."""

  memory: float  # GiB of HBM
  usable: float  # GiB of it that the compiler gives a program
  flops: float  # peak bfloat16, a second


# Source: cloud.google.com/tpu/docs/v4, and /v5e, /v5p, /v6e (memory); usable: what the
# compiler of libtpu 0.0.42 says of a program that does not fit.
CHIPS = {
  'v4': Chip(32, 30.75, bench.PEAKS['TPU v4']),
  'v5e': Chip(16, 15.75, bench.PEAKS['TPU v5 lite']),
  'v5p': Chip(95, 95.74, bench.PEAKS['TPU v5']),
  'v6e': Chip(32, 31.25, bench.PEAKS['TPU v6 lite']),
}

# Read by libtpu when it is loaded. It takes no TPU here, so nothing needs asking of a
# metadata server, and no lock against another process.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3',
}


def stay_on_cpu() -> None:
  """Keeps jax from looking for a TPU where libtpu is; before anything is computed."""
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  jax.config.update('jax_platforms', 'cpu')


def devices(topology: str) -> list[jax.Device]:
  """The chips of a topology such as `v5e:16x16`; `2*v5e:16x16` for two slices.

  They can be compiled for, and hold no array; this process computes on the CPU.

  Raises: UserError for a topology that does not exist, or without libtpu.
  """
  slices, chip, shape = _parsed(topology)
  if not importlib.util.find_spec('libtpu') and 'TPU_LIBRARY_PATH' not in os.environ:
    raise UserError(
      "--mode=compile needs libtpu, which holds the compiler: pip install 'cmjax[aot]'"
    )
  stay_on_cpu()
  options: dict[str, Any] = {'num_slices': slices} if slices > 1 else {}
  if chip == 'v4':  # as jax sees it: both cores of a chip as one device
    options['chip_config_name'] = 'megacore'
  if set(shape.split('x')) == {'1'}:
    options['chips_per_host_bounds'] = [1, 1, 1]
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=f'{chip}:{shape}', **options
    )
  except RuntimeError as error:
    raise UserError(f'--topology={topology}: {first_line(error)}') from error
  return list(found.devices)


def _parsed(topology: str) -> tuple[int, str, str]:
  """Slices, chip and shape of one."""
  match = re.fullmatch(r'(?:([1-9]\d*)\*)?([a-z0-9]+):(\d+(?:x\d+)+)', topology)
  if not match or match[2] not in CHIPS:
    raise UserError(
      f'--topology={topology}: must be like v5e:16x16, or 2*v5e:16x16 for two slices; '
      f'chips known: {", ".join(CHIPS)}'
    )
  return int(match[1] or 1), match[2], match[3]


def abstract_batch(run: Run) -> Batch:
  """Shapes, dtypes and places of a batch, from one example."""
  size = run.config.batch_size
  row = data.batch_at(run.source, run.config.seed, 0, size, np.zeros(1, int))
  place = sharding.by_example(run.mesh)
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype, sharding=place), row
  )


class Collective(NamedTuple):
  """One operation in which chips exchange arrays.

  Its bytes are those of the whole array as one chip has it: what an all-gather gives
  it, and what any other takes from it.
  """

  kind: str
  bytes: int
  in_loop: bool  # inside a while loop: once a pass, however many there are


class Memory(NamedTuple):
  """Bytes on each chip."""

  arguments: int  # state, frozen networks and the batch
  outputs: int
  aliased: int  # outputs that take the place of arguments
  temporaries: int
  program: int

  @property
  def total(self) -> int:
    """Everything that is there at once."""
    new = self.outputs - self.aliased
    return self.arguments + new + self.temporaries + self.program


class Report(NamedTuple):
  """What a compiled step takes, on each chip."""

  held: dict[str, int]  # bytes of each argument
  memory: Memory | None  # None where the compiler gave up
  refusal: str  # why it did; empty where it did not
  flops: float  # of a step, on all chips; what `remat` computes again counts
  collectives: list[Collective]
  seconds: float  # that the compilation took


# XLA's levels of optimisation (O0, unset, O3) by effort, as numbers: jax 0.10 takes no
# names, and later versions either.
_LEVELS = {-1: 9, 0: 0, 1: 39}


def compile_step(run: Run, effort: int = -1) -> Report:
  """Compiles the training step of a run for the devices of its mesh.

  Args:
    run: prepared for a mesh of `devices`, or of any that are here.
    effort: how long the compiler may look for a faster program: -1, least; 0, as a run
      on a TPU; 1, most. It changes memory and collectives a little.
  """
  begun = time.monotonic()
  state, batch = train.abstract_state(run), abstract_batch(run)
  held = {
    'parameters': sharding.bytes_held(state.params),
    'averages and target': sharding.bytes_held((state.ema, state.target)),
    'optimiser': sharding.bytes_held(state.opt_state),
    'frozen networks and data': sharding.bytes_held(run.frozen),
    'batch': sharding.bytes_held(batch),
  }
  traced = train.compiled_step(run).trace(state, run.frozen, batch)
  options = {'optimization_level': _LEVELS[effort]}
  try:
    compiled = traced.lower().compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    seconds = time.monotonic() - begun
    return Report(held, None, first_line(error), bench.flops(traced.jaxpr), [], seconds)
  seconds = time.monotonic() - begun
  size = compiled.memory_analysis()
  memory = Memory(
    size.argument_size_in_bytes,
    size.output_size_in_bytes,
    size.alias_size_in_bytes,
    size.temp_size_in_bytes,
    size.generated_code_size_in_bytes,
  )
  exchanged = collectives(compiled.as_text())
  return Report(held, memory, '', bench.flops(traced.jaxpr), exchanged, seconds)


_KINDS = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
_COMPUTATION = re.compile(r'(?:ENTRY )?%?([\w.-]+) \(.*\{$')
_OPERATION = re.compile(r'\s+(?:ROOT )?%?([\w.-]+) = (.*?)\s([a-z][a-z0-9-]*)\((.*)')
_CALLED = re.compile(
  r'(calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)'
)
_ARRAY = re.compile(r'([a-z]+)(\d*)\w*\[([\d,]*)\]')


def collectives(hlo: str) -> list[Collective]:
  """Every collective of an optimised program, from its HLO text, in order.

  One that is split into a start and a done is one; so is one of many arrays.
  """
  found, calls, looped = [], {}, set()
  inside, sizes = '', {}
  for line in hlo.splitlines():
    if heading := _COMPUTATION.match(line):
      inside, sizes = heading[1], {}
    elif operation := _OPERATION.match(line):
      name, shape, opcode, rest = operation.groups()
      sizes[name] = _bytes(shape)
      kind = opcode.removesuffix('-start')
      if kind in _KINDS:
        given = re.findall(r'%([\w.-]+)', rest.partition(')')[0])
        size = taken = sum(sizes[operand] for operand in given)
        if kind == 'all-gather':  # a start also names what it has taken
          size = sizes[name] - (taken if opcode != kind else 0)
        found.append((inside, kind, size))
      for how, names in _CALLED.findall(rest):
        called = set(re.findall(r'[\w.-]+', names))
        calls.setdefault(inside, set()).update(called)
        looped |= called if how in ('body', 'condition') else set()
  while inner := {name for at in looped for name in calls.get(at, ())} - looped:
    looped |= inner
  return [Collective(kind, size, at in looped) for at, kind, size in found]


def _bytes(shape: str) -> int:
  """The size of an array, or of all arrays of a tuple."""
  total = 0
  for kind, bits, sizes in _ARRAY.findall(shape):
    count = int(np.prod([int(n) for n in sizes.split(',') if n], dtype=np.int64))
    total += count * (int(bits) if bits else 8 * (kind == 'pred')) // 8
  return total


def facts(run: Run, topology: str, effort: int, report: Report) -> dict[str, Any]:
  """All of a report and of what it is of, for JSON; sizes in bytes unless named."""
  chip = CHIPS[_parsed(topology)[1]]
  memory, usable = report.memory, chip.usable * GIB
  groups = {}
  for one in report.collectives:
    groups.setdefault((one.kind, one.in_loop), []).append(one.bytes)
  return {
    'topology': topology,
    'chips': run.mesh.size,
    'mesh': dict(run.mesh.shape),
    'data': run.source.name,
    'parameters': sum(a.size for a in jax.tree.leaves(run.abstract_params())),
    'batch_size': run.config.batch_size,
    'fits': memory is not None and memory.total <= usable,
    'refusal': report.refusal,
    'arguments': report.held,
    'memory': memory and memory._asdict() | {'total': memory.total},
    'usable': usable,
    'usable_of_gib': chip.memory,
    'flops_per_chip': report.flops / run.mesh.size,
    'least_step_s': report.flops / run.mesh.size / chip.flops,
    'collectives': [
      {'kind': kind, 'in_loop': loop, 'operations': len(sizes), 'bytes': sum(sizes)}
      for (kind, loop), sizes in sorted(groups.items())
    ],
    'effort': effort,
    'compile_s': report.seconds,
    'jax': jax.__version__,
    'libtpu': _libtpu_version(),
    'config': run.config.to_dict(),
  }


def _libtpu_version() -> str:
  try:
    return importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:  # a nightly, or a file of one's own
    return 'of unknown version'


def page(known: dict[str, Any]) -> str:
  """`facts` as Markdown: what it is, whether it fits, and the tables."""
  title = (
    f'{known["data"]}: {known["parameters"]:,} parameters, batch '
    f'{known["batch_size"]} on {known["chips"]} chips of {known["topology"]}'
  )
  sizes, memory = dict(known['arguments']), known['memory']
  if memory:
    sizes['all arguments, padded'] = memory['arguments']
    sizes['new outputs'] = memory['outputs'] - memory['aliased']
    sizes |= {name: memory[name] for name in ('temporaries', 'program', 'total')}
  sizes[f'usable of {known["usable_of_gib"]} GiB'] = known['usable']
  tables = [[{'on each chip': n, 'GiB': v / GIB} for n, v in sizes.items()]]
  verdict = 'fits' if known['fits'] else f'DOES NOT FIT: {known["refusal"]}'
  if memory:
    seconds = known['least_step_s']
    verdict += (
      f'; {known["flops_per_chip"] / 1e12:.3g} TFLOP a chip and step, at least '
      f'{seconds * 1e3:.3g} ms at its bfloat16 peak: at most '
      f'{known["batch_size"] / seconds:,.0f} images/s'
    )
    tables.append(
      [
        {
          'collective': row['kind'],
          'in a loop': 'yes, once a pass' if row['in_loop'] else 'no',
          'operations': row['operations'],
          'MB on each chip': row['bytes'] / 1e6,
        }
        for row in known['collectives']
      ]
    )
  made = (
    f'compiled in {known["compile_s"]:.0f} s by libtpu {known["libtpu"]}, jax '
    f'{known["jax"]}, effort {known["effort"]:g}'
  )
  blocks = [title, verdict, *(logs.markdown_table(t) for t in tables if t), made]
  return '\n\n'.join(blocks)
