"""`--mode=dry_run`: everything built and shown, and nothing trained."""

import argparse

import jax

from cmjax import config as configs
from cmjax import logs, workdir
from cmjax import run as runs


def run(flags: argparse.Namespace) -> None:
  """Prints the config, the parameters, and every schedule at five points."""
  folder = workdir.folder(flags.workdir) if flags.workdir else None
  config = workdir.config_for(flags.config, folder, flags.overrides, flags.trust)
  prepared = runs.prepare(config, trust=flags.trust)
  last = prepared.total_steps
  points = runs.five_steps(last)
  rows = [
    {'schedule': name} | {f'step {step}': f'{float(at(step)):.4g}' for step in points}
    for name, at in prepared.schedules.items()
  ]
  logs.say(configs.to_json(config))
  logs.say(logs.parameter_table(prepared.abstract_params()))
  logs.say(logs.markdown_table(rows) if rows else 'no schedules')
  source = prepared.source
  logs.say(
    f'\n{source.name}: {len(source.examples):,} examples of {source.shape}; {last:,} '
    f'steps of {config.batch_size} on {prepared.mesh.size} '
    f'{jax.devices()[0].platform} device(s)'
  )
