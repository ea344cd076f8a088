"""`--mode=dry_run`: builds and prints everything, and trains nothing."""

import argparse

import jax
import jax.numpy as jnp

from cmjax.runtime import logs, workdir
from cmjax.runtime.blank import blanked
from cmjax.runtime.config_json import to_json
from cmjax.runtime.run import prepare
from cmjax.runtime.schedules import five_steps


def run(flags: argparse.Namespace) -> None:
  """Prints the config, the parameters, and every schedule at five steps."""
  folder = workdir.folder(flags.workdir) if flags.workdir else None
  config = workdir.config_for(flags.config, folder, flags.overrides, flags.trust)
  if flags.blank:
    config = blanked(config, flags.blank)
  prepared = prepare(config, trust=flags.trust, blank=bool(flags.blank))
  total = prepared.total_steps
  rows = []
  for name, schedule in prepared.schedules.items():
    values = {step: float(schedule(jnp.int32(step))) for step in five_steps(total)}
    rows.append(
      {'schedule': name} | {f'step {step}': f'{v:.4g}' for step, v in values.items()}
    )
  logs.say(to_json(config))
  logs.say(logs.parameter_table(prepared.abstract_params()))
  logs.say(logs.markdown_table(rows) if rows else 'no schedules')
  source = prepared.source
  logs.say(
    f'\n{source.name}: {len(source.examples):,} examples of shape {source.shape} '
    f'{"in memory" if source.in_memory else "on disk"}; '
    f'{total:,} steps of {config.batch_size} on {prepared.mesh.size} '
    f'{jax.devices()[0].platform} device(s)'
  )
