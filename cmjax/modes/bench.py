"""`--mode=bench`: how fast a config trains on the devices at hand."""

import argparse

from cmjax import bench, logs, workdir
from cmjax import run as runs
from cmjax.core import unused


def run(flags: argparse.Namespace) -> None:
  """Prints the tables; with a --workdir, writes `bench.json` into it."""
  folder = workdir.folder(flags.workdir) if flags.workdir else None
  config = workdir.config_for(flags.config, folder, flags.overrides, flags.trust)
  if config.init_from:
    config.init_from = ''  # weights take the same time whatever they are
  found = bench.measure(runs.prepare(config, trust=flags.trust))
  logs.say(bench.report(found))
  if folder:
    path = unused(folder / 'bench', '.json')
    logs.write_json(path, found | {'config': config.to_dict()})
    logs.say(f'\n{path}')
