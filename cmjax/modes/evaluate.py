"""`--mode=evaluate`: measures every sampler by every metric."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from cmjax import evaluation, pictures
from cmjax.core import Params, unused
from cmjax.metrics.metric import Metric
from cmjax.runtime import logs, paths, results
from cmjax.runtime.config_record import Config
from cmjax.runtime.reopen import beside, facts, for_sampling, reopen_for
from cmjax.runtime.run import Run
from cmjax.sampling import Check, draw

# Folder of the features of finished batches; a local one if the run is in a bucket.
UNFINISHED = 'evaluation.unfinished'


def log_pictures(
  run: Run, params: Params, step: int, log: logs.RunLog, check: Check
) -> None:
  """A training hook: one picture per sampler, always of the same noise and labels.

  The first time also one of as many examples of the data.
  """
  settings = run.config.evaluation
  log.picture_once('data', lambda: pictures.data(run.source, settings.num_pictured))
  for name, sampler in run.samplers.items():
    drawn = draw(
      run,
      params,
      sampler,
      num_samples=settings.num_pictured,
      seed=settings.seed,
      check=check,
    )
    log.picture(step, name, pictures.samples(run.source, drawn.x))


def table_logger(metrics: Mapping[str, Metric], folder: Path) -> Callable[..., None]:
  """A training hook that logs the metrics of every sampler, as SAMPLER/METRIC."""

  def log_table(run, params, step, log, check):
    unfinished = paths.staging(folder) / UNFINISHED
    for row in evaluation.table(run, params, metrics, folder=unfinished, check=check):
      name = row.pop('sampler')
      log.scalars(step, {f'{name}/{key}': float(value) for key, value in row.items()})
      text = ' '.join(f'{key}={value:.4g}' for key, value in row.items())
      logs.say(f'step {step} {name}: {text}')

  return log_table


def run(flags: argparse.Namespace) -> None:
  """Prints the table, and writes it as Markdown and JSON into the run."""
  opened = reopen_for(flags.workdir, flags.config, flags.overrides, flags.trust)
  opened = for_sampling(opened, flags.samplers)
  settings, folder = opened.config.evaluation, beside(opened)
  metrics = evaluation.build_metrics(opened)
  rows = evaluation.table(
    opened,
    opened.params,
    metrics,
    num_seeds=settings.num_seeds,
    folder=paths.staging(folder) / UNFINISHED,
  )
  last = settings.seed + settings.num_seeds - 1
  seeds = f'seed {last}' if settings.num_seeds == 1 else f'seeds {settings.seed}-{last}'
  conventions = _conventions(metrics)
  text = '\n'.join(
    (
      f'{opened.source.name}, step {opened.step:,}, weights {_weights(opened.config)}, '
      f'{seeds}, labels {settings.labels}',
      *(f'{name}: {text}' for name, text in conventions.items()),
      f'\n{evaluation.markdown(rows, each_seed=True)}\n',
    )
  )
  path = unused(folder / f'evaluation_{opened.step:08d}', '.json')
  results.write_json(path, facts(opened, rows=rows, conventions=conventions))
  results.write_text(path.with_suffix('.md'), text)
  logs.say(f'{text}\n{path} and .md')


def _weights(config: Config) -> str:
  width = config.sample_relative_std
  return f'of relative width {width:g}' if width else config.sample_weights


def _conventions(metrics: Mapping[str, Metric]) -> dict[str, str]:
  return {
    name: ', '.join(f'{key} {value}' for key, value in metric.conventions.items())
    for name, metric in metrics.items()
    if metric.conventions
  }
