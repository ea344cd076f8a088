"""`--mode=evaluate`: measures every sampler by every metric."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cmjax import evaluation, pictures
from cmjax.core import Params, UserError, unused
from cmjax.metrics.metric import Metric
from cmjax.runtime import logs, results
from cmjax.runtime.config_record import Config
from cmjax.runtime.feature_store import FeatureStore
from cmjax.runtime.reopen import beside, facts, for_sampling, reopen_for
from cmjax.runtime.run import Run
from cmjax.sampling import Check, Subject, draw

UNFINISHED = 'evaluation.unfinished'  # folder of the features of finished batches


def table(
  subject: Subject,
  params: Params,
  metrics: Mapping[str, Metric],
  *,
  num_seeds: int = 1,
  folder: Path | None = None,
  check: Check = lambda: None,
) -> list[dict[str, Any]]:
  """One row per sampler: evaluations per sample, and the means of all metrics.

  With several seeds also their standard deviation, least value and each value. Features
  of finished batches are kept in `folder` until the table is complete.
  """
  settings = subject.config.evaluation
  data = evaluation.data_features(subject, metrics)
  rows, finished = [], []
  for name, sampler in subject.samplers.items():
    measured = []
    for seed in range(settings.seed, settings.seed + num_seeds):
      size = settings.num_samples
      place = None
      if folder:
        place = folder / evaluation.measurement_id(
          subject, params, name, metrics, size, seed
        )
        finished.append(FeatureStore(place))
      result = evaluation.measure(
        subject,
        params,
        sampler,
        metrics,
        data,
        num_samples=size,
        seed=seed,
        folder=place,
        check=check,
      )
      if taken := RESERVED & result.values.keys():
        raise UserError(
          f'config.metrics: {name}: no metric may return {", ".join(sorted(taken))}; '
          'rename its value'
        )
      measured.append({'seed': seed} | result.values)
    row = {
      'sampler': name,
      'evaluations': result.evaluations,
      'samples': settings.num_samples,
    }
    rows.append(row | _over_seeds(measured))
  if folder and jax.process_index() == 0:
    for store in finished:
      store.remove()
    if folder.is_dir() and not any(folder.iterdir()):
      folder.rmdir()
  return rows


NESTED = ('deviation', 'least', 'seeds')  # keys of a row with several seeds
RESERVED = {'sampler', 'evaluations', 'samples', 'seed', *NESTED}


def _over_seeds(measured: list[dict[str, Any]]) -> dict[str, Any]:
  """The mean of each metric; with several seeds also its deviation and least value.

  They are NaN or infinite if a value is.
  """
  names = [name for name in measured[0] if name != 'seed']
  values = np.array([[row[name] for name in names] for row in measured])
  with np.errstate(invalid='ignore'):  # of infinity minus infinity
    row: dict[str, Any] = _named(names, np.mean(values, axis=0))
    if len(measured) > 1:
      row['deviation'] = _named(names, np.std(values, axis=0, ddof=1))
      row['least'] = _named(names, np.min(values, axis=0))
      row['seeds'] = measured
  return row


def _named(names: list[str], values: np.ndarray) -> dict[str, float]:
  return dict(zip(names, values.tolist()))


def page(rows: list[dict[str, Any]]) -> str:
  """The rows as Markdown: means and deviations; then each seed, and the least value."""
  summary, each = [], []
  for row in rows:
    cells = {key: value for key, value in row.items() if key not in NESTED}
    for name, deviation in row.get('deviation', {}).items():
      form = logs.digits(row[name])
      cells[name] = f'{row[name]:{form}} ± {deviation:{form}}'
    summary.append(cells)
    each += [{'sampler': row['sampler'], **seed} for seed in row.get('seeds', ())]
    if 'least' in row:
      each.append({'sampler': row['sampler'], 'seed': 'least', **row['least']})
  text = logs.markdown_table(summary)
  if each:
    text += '\n\nEach seed, and the least value over them:\n\n'
    text += logs.markdown_table(each)
  return text


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
    unfinished = folder / UNFINISHED
    for row in table(run, params, metrics, folder=unfinished, check=check):
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
  rows = table(
    opened,
    opened.params,
    metrics,
    num_seeds=settings.num_seeds,
    folder=folder / UNFINISHED,
  )
  last = settings.seed + settings.num_seeds - 1
  seeds = f'seed {last}' if settings.num_seeds == 1 else f'seeds {settings.seed}-{last}'
  conventions = _conventions(metrics)
  text = '\n'.join(
    (
      f'{opened.source.name}, step {opened.step:,}, weights {_weights(opened.config)}, '
      f'{seeds}, labels {settings.labels}',
      *(f'{name}: {text}' for name, text in conventions.items()),
      f'\n{page(rows)}\n',
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
