"""`--mode=compile`: compiles the training step for TPUs that are not attached.

The result is the program that a pod would run, with its memory and its collectives.
"""

import argparse
from collections.abc import Iterator
import contextlib
import json
import math
import re
import time
from typing import Any, NamedTuple

import jax

from cmjax.core import UserError, first_line, unused
from cmjax.runtime import build, logs, results, sharding, topology
from cmjax.runtime.batches import abstract_batch
from cmjax.runtime.blank import blanked
from cmjax.runtime.collectives import Collective, collectives
from cmjax.runtime.config_json import to_json
from cmjax.runtime.flops import flops
from cmjax.runtime.run import Run, prepare
from cmjax.runtime.state import abstract_state
from cmjax.runtime.workdir import config_for, folder
from cmjax.train import compiled_step

GIB = 2**30


class Memory(NamedTuple):
  """Bytes on each chip."""

  arguments: int  # state, frozen networks and batch
  outputs: int
  aliased: int  # outputs that reuse the memory of arguments
  temporaries: int
  program: int

  @property
  def total(self) -> int:
    """The bytes in use at the same time."""
    new = self.outputs - self.aliased
    return self.arguments + new + self.temporaries + self.program

  @property
  def traffic(self) -> int:
    """A lower bound on the bytes that a step moves.

    Arguments are read and outputs written at least once, and a temporary value is both
    written and read.
    """
    return self.arguments + self.outputs + 2 * self.temporaries


class Report(NamedTuple):
  """Memory and operations of a compiled training step."""

  held: dict[str, int]  # bytes of each argument on each chip
  memory: Memory | None  # None if the program does not fit
  error: str  # the compiler's, if the program does not fit
  flops: float  # of a step on all chips, including those that `remat` repeats
  collectives: list[Collective]
  seconds: float  # of compilation


# Values of XLA's `optimization_level` (O0, unset, O3) by effort; jax 0.10 takes numbers
# only.
_LEVELS = {-1: 9, 0: 0, 1: 39}


def compile_step(run: Run, effort: int = -1) -> Report:
  """Compiles the training step of a run for the devices of its mesh.

  Args:
    run: a run on a mesh of `topology.devices`, or of attached devices.
    effort: of the compiler, to find a faster program: -1 least, 0 as in a run, 1 most;
      memory and collectives vary slightly with it.
  """
  start = time.monotonic()
  state, batch = abstract_state(run), abstract_batch(run)
  held = {
    'parameters': sharding.bytes_held(state.params),
    'averages and target': sharding.bytes_held((state.ema, state.target)),
    'optimiser': sharding.bytes_held(state.opt_state),
    'frozen networks and data': sharding.bytes_held(run.frozen),
    'batch': sharding.bytes_held(batch),
  }
  traced = compiled_step(run).trace(state, run.frozen, batch)
  memory, error, exchanged = None, '', []
  options: Any = {'optimization_level': _LEVELS[effort]}
  try:
    with _uncached():
      compiled = traced.lower().compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as failure:
    if 'RESOURCE_EXHAUSTED' not in str(failure):
      raise
    error = first_line(failure)
  else:
    size: Any = compiled.memory_analysis()
    memory = Memory(
      size.argument_size_in_bytes,
      size.output_size_in_bytes,
      size.alias_size_in_bytes,
      size.temp_size_in_bytes,
      size.generated_code_size_in_bytes,
    )
    exchanged = collectives(compiled.as_text() or '')
  seconds = time.monotonic() - start
  return Report(held, memory, error, flops(traced.jaxpr), exchanged, seconds)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
  """Without the cache of jax, which cannot read programs for absent devices again."""
  key = 'jax_persistent_cache_min_compile_time_secs'
  least_s = getattr(jax.config, key)
  jax.config.update(key, math.inf)
  try:
    yield
  finally:
    jax.config.update(key, least_s)


def facts(run: Run, name: str, effort: int, report: Report) -> dict[str, Any]:
  """A report for JSON, with the topology, the config and versions; sizes in bytes."""
  chip = topology.CHIPS[topology.parse(name).chip]
  memory, usable = report.memory, chip.usable_gib * GIB
  groups: dict[tuple[str, bool], list[int]] = {}
  for collective in report.collectives:
    group = groups.setdefault((collective.kind, collective.in_loop), [])
    group.append(collective.bytes)
  return {
    'topology': name,
    'chips': run.mesh.size,
    'mesh': dict(run.mesh.shape),
    'data': run.source.name,
    'parameters': sum(a.size for a in jax.tree.leaves(run.abstract_params())),
    'batch_size': run.config.batch_size,
    'fits': memory is not None and memory.total <= usable,
    'refusal': report.error,
    'arguments': report.held,
    'memory': memory and memory._asdict() | {'total': memory.total},
    'usable': usable,
    'usable_of_gib': chip.memory_gib,
    'flops_per_chip': report.flops / run.mesh.size,
    'least_step_s': report.flops / run.mesh.size / chip.flops,
    'least_memory_s': memory and memory.traffic / chip.bandwidth,
    'collectives': [
      {'kind': kind, 'in_loop': loop, 'operations': len(sizes), 'bytes': sum(sizes)}
      for (kind, loop), sizes in sorted(groups.items())
    ],
    'effort': effort,
    'compile_s': report.seconds,
    'jax': jax.__version__,
    'libtpu': topology.libtpu_version(),
    'config': json.loads(to_json(run.config)),
  }


def page(facts: dict[str, Any]) -> str:
  """`facts` as Markdown: whether the step fits, its memory and its collectives."""
  title = (
    f'{facts["data"]}: {facts["parameters"]:,} parameters, batch '
    f'{facts["batch_size"]} on {facts["chips"]} chips of {facts["topology"]}'
  )
  sizes, memory = dict(facts['arguments']), facts['memory']
  if memory:
    sizes['all arguments, padded'] = memory['arguments']
    sizes['new outputs'] = memory['outputs'] - memory['aliased']
    sizes |= {name: memory[name] for name in ('temporaries', 'program', 'total')}
  sizes[f'available of {facts["usable_of_gib"]} GiB'] = facts['usable']
  tables = [[{'per chip': name, 'GiB': size / GIB} for name, size in sizes.items()]]
  reason = facts['refusal'] or 'it needs more memory than is available'
  verdict = 'fits' if facts['fits'] else f'DOES NOT FIT: {reason}'
  if memory:
    seconds = facts['least_step_s']
    verdict += (
      f'; {facts["flops_per_chip"] / 1e12:.3g} TFLOP per chip and step take at least '
      f'{seconds * 1e3:.3g} ms at the bfloat16 peak: at most '
      f'{facts["batch_size"] / seconds:,.0f} images/s'
    )
    tables.append(
      [
        {
          'collective': row['kind'],
          'in a loop': 'yes, per iteration' if row['in_loop'] else 'no',
          'operations': row['operations'],
          'MB per chip': row['bytes'] / 1e6,
        }
        for row in facts['collectives']
      ]
    )
  versions = (
    f'compiled in {facts["compile_s"]:.0f} s by libtpu {facts["libtpu"]}, jax '
    f'{facts["jax"]}, effort {facts["effort"]:g}'
  )
  blocks = [title, verdict, *(logs.markdown_table(t) for t in tables if t), versions]
  return '\n\n'.join(blocks)


def run(flags: argparse.Namespace) -> int:
  """Prints and writes the report; returns 1 if the step does not fit, else 0."""
  topology.stay_on_cpu()
  name, effort = flags.topology, flags.effort
  workdir = folder(flags.workdir) if flags.workdir else None
  config = config_for(flags.config, workdir, flags.overrides, flags.trust)
  if not name:
    raise UserError('--mode=compile needs --topology=CHIPS, such as v5e:16x16')
  if effort not in _LEVELS:
    raise UserError(f'--effort={effort}: must be -1, 0 or 1')
  if flags.blank:
    config = blanked(config, flags.blank)
  devices = topology.devices(name)
  mesh = build.build(config.mesh, 'config.mesh', jax.sharding.Mesh, devices=devices)
  prepared = prepare(config, mesh, flags.trust, blank=bool(flags.blank))
  result = facts(prepared, name, effort, compile_step(prepared, effort))
  text = page(result)
  logs.say(text)
  if workdir:
    path = unused(workdir / f'compile_{re.sub(r"[:*]", "_", name)}', '.json')
    results.write_json(path, result)
    results.write_text(path.with_suffix('.md'), text + '\n')
    logs.say(f'\n{path} and .md')
  return 0 if result['fits'] else 1
