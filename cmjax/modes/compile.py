"""`--mode=compile`: the training step for TPUs that are not attached."""

import argparse
import re

import jax

from cmjax import aot, build, logs, workdir
from cmjax import run as runs
from cmjax.core import UserError, unused


def run(flags: argparse.Namespace) -> int:
  """Prints the report, and returns 1 where the step does not fit, else 0."""
  aot.stay_on_cpu()
  topology, effort = flags.topology, flags.effort
  folder = workdir.folder(flags.workdir) if flags.workdir else None
  config = workdir.config_for(flags.config, folder, flags.overrides, flags.trust)
  if not topology:
    raise UserError('--mode=compile needs --topology=CHIPS, such as v5e:16x16')
  if effort not in (-1, 0, 1):
    raise UserError(f'--effort={effort}: must be -1, 0 or 1')
  if flags.blank:
    config.data = _blank(flags.blank)
  devices = aot.devices(topology)
  mesh = build.build(config.mesh, 'config.mesh', jax.sharding.Mesh, devices=devices)
  prepared = runs.prepare(config, mesh, trust=flags.trust)
  known = aot.facts(prepared, topology, effort, aot.compile_step(prepared, effort))
  text = aot.page(known)
  logs.say(text)
  if folder:
    path = unused(folder / f'compile_{re.sub(r"[:*]", "_", topology)}', '.json')
    logs.write_json(path, known)
    path.with_suffix('.md').write_text(text + '\n', encoding='utf-8')
    logs.say(f'\n{path} and .md')
  return 0 if known['fits'] else 1


def _blank(text: str) -> dict[str, object]:
  """The part of a config for data of a size, without the data."""
  numbers = text.split(',')
  if len(numbers) != 3 or not all(n.isdecimal() for n in numbers):
    raise UserError('--blank: must be SIZE,CHANNELS,CLASSES, such as 64,3,1000')
  size, channels, classes = map(int, numbers)
  return dict(fn='cmjax.data:blank', size=size, channels=channels, classes=classes)
