"""Measures samples by the metrics of a config; one batch is in memory at a time."""

from collections.abc import Iterable, Mapping, Sequence
import json
from pathlib import Path
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks
from cmjax.core import Params, UserError
from cmjax.data.source import all_x0
from cmjax.data_features import (
  abstract_batch,
  compiled_features,
  data_features,
  fingerprint,
  program,
)
from cmjax.metrics.metric import Batches, Metric
from cmjax.runtime import build, logs, sharding
from cmjax.runtime.errors import part_errors
from cmjax.runtime.feature_store import FeatureStore, digest
from cmjax.runtime.functions import parameters
from cmjax.samplers import Sampler
from cmjax.sampling import Check, Draws, Subject, evaluations


class Measured(NamedTuple):
  """The values of all metrics for one sampler and one seed."""

  evaluations: int  # of the network, per sample
  values: dict[str, float]


def measure(
  subject: Subject,
  params: Params,
  sampler: Sampler,
  metrics: Mapping[str, Metric],
  data: Mapping[str, Batches],
  *,
  seed: int,
  num_samples: int,
  folder: Path | None = None,
  check: Check = lambda: None,
) -> Measured:
  """The values of metrics for samples of one sampler.

  Features of finished batches are kept in `folder`, from which an interrupted
  measurement continues; None: nothing is kept.

  Raises: UserError if two metrics return a value of the same name, a value is not a
    number, or another command has deleted batches in `folder`.
  """
  source, mesh = subject.source, subject.mesh
  draws = Draws(subject, params, sampler, num_samples, seed)
  features = compiled_features(metrics, source, mesh)
  feature_params = {name: metric.params for name, metric in metrics.items()}
  with tempfile.TemporaryDirectory() as scratch:
    store = FeatureStore(folder or Path(scratch))
    finished = sharding.from_process_0(store.finished)
    for index, x, labels, size in draws.batches(check, finished) if metrics else ():
      arrays = features(feature_params, x, labels)
      if jax.process_index() == 0:
        store.write(index, {name: np.asarray(a)[:size] for name, a in arrays.items()})

    def values() -> dict[str, float]:
      result: dict[str, float] = {}
      if metrics and len(store.finished()) != draws.num_batches:
        raise UserError(
          f'{store.folder}: batches were deleted, as by the same command at the same '
          'time; repeat this one'
        )
      for name, metric in metrics.items():
        new = metric.values(store.of(name), data[name])
        if not _are_numbers(new):
          raise UserError(
            f'config.metrics.{name}: must return numbers by name, not {new!r:.80}'
          )
        if duplicates := result.keys() & new.keys():
          raise UserError(
            f'config.metrics.{name}: returns {", ".join(sorted(duplicates))}, which '
            'another metric returns; remove one of the two, or rename its value'
          )
        result |= {key: float(value) for key, value in new.items()}
      return result

    result = sharding.from_process_0(values)
  return Measured(evaluations(subject, params, sampler), result)


def _are_numbers(values: Any) -> bool:
  return isinstance(values, Mapping) and all(
    np.ndim(value) == 0 and np.asarray(value).dtype.kind in 'biuf'
    for value in values.values()
  )


def measurement_id(
  subject: Subject,
  params: Params,
  sampler: str,
  metrics: Mapping[str, Metric],
  num_samples: int,
  seed: int,
) -> str:
  """A name for all that the features of samples depend on, also for the code."""
  config, shape = subject.config.to_dict(), subject.source.shape
  keys = ('data', 'network', 'precond', 'metrics', 'guide')
  facts = {key: config[key] for key in keys if key in config}
  facts['sampler'] = config['samplers'].get(sampler, sampler)
  facts['labels'] = config['evaluation']['labels']
  draws = Draws(subject, params, subject.samplers[sampler], num_samples, seed)
  facts['draw'] = [num_samples, draws.batch_size, seed]

  def sample(params, keys, cond):
    return draws.sampler(subject.f, params, keys, cond, shape).x

  cond = None
  if subject.source.labels is not None:
    cond = jax.ShapeDtypeStruct((1, subject.source.classes), jnp.float32)
  programs: list[Params] = [
    program(sample, params, jax.random.split(jax.random.key(0), 1), cond)
  ]
  for metric in metrics.values():
    text = program(metric.features, metric.params, *abstract_batch(subject.source))
    programs.append((text, metric.params))
  settings = json.dumps(facts, sort_keys=True)
  return digest(settings, *programs, fingerprint(params, subject.mesh))


def build_metrics(subject: Subject, key: str = 'evaluation') -> dict[str, Metric]:
  """The metrics of a config, on its data.

  A metric receives those of `real`, `labels` and `source` that its signature names.

  Args:
    subject: the run or the weights.
    key: of the config, whose num_samples will be measured: evaluation or search.

  Raises: UserError if a metric does not fit the data, or needs more samples.
  """
  config, source = subject.config, subject.source
  given: dict[str, Any] = {'labels': source.labels, 'source': source}
  if any('real' in _keywords(part, name) for name, part in config.metrics.items()):
    given['real'] = all_x0(source, 'config.metrics: a metric of pixels')
  metrics = build.build_each(config.metrics, 'config.metrics', Metric, **given)
  x, labels = abstract_batch(source)
  num_samples = getattr(config, key).num_samples
  for name, metric in metrics.items():
    if metric.min_samples > num_samples:
      raise UserError(
        f'config.{key}.num_samples: {num_samples}, and '
        f'config.metrics.{name} needs at least {metric.min_samples}'
      )
    if metric.needs_data and metric.min_samples > len(source.examples):
      raise UserError(
        f'config.metrics.{name}: needs at least {metric.min_samples} examples of the '
        f'data, and there are {len(source.examples)}'
      )
    with part_errors(f'config.metrics.{name}'):
      features = jax.eval_shape(metric.features, metric.params, x, labels)
      if not isinstance(features, Mapping) or not all(
        np.shape(value)[:1] == x.shape[:1] for value in features.values()
      ):
        raise UserError(
          'features must be arrays f[B, ...] by name, one row per example'
        )
  return metrics


def _keywords(part: Any, name: str) -> Iterable[str]:
  return parameters(build.path_of(part), f'config.metrics.{name}.fn')


def table(
  subject: Subject,
  params: Params,
  metrics: Mapping[str, Metric] | None = None,
  samplers: Mapping[str, Sampler] | None = None,
  *,
  seed: int | None = None,
  num_seeds: int = 1,
  folder: Path | None = None,
  check: Check = lambda: None,
) -> list[dict[str, Any]]:
  """One row per sampler: evaluations per sample, and the means of all metrics.

  With several seeds also their standard deviation, least value and each value, under
  `deviation`, `least` and `seeds`. `markdown` makes a text of the rows.

  Args:
    subject: the run, or the weights that `reopen.reopen` returns.
    params: such as `state.ema['slow']` of a training state, or `subject.params`.
    metrics: as `build_metrics` returns them; by default those of the config.
    samplers: by name; by default those of the config.
    seed: the first seed; by default that of `config.evaluation`.
    num_seeds: sets of `config.evaluation.num_samples` samples, one per seed.
    folder: keeps the features of finished batches until the table is complete.
    check: is called before each batch, and may raise to stop.

  Raises: UserError as `build_metrics` and `measure`, or if a metric returns a value
    with the name of another column; ValueError if num_seeds < 1.
  """
  checks.whole(1, num_seeds=num_seeds)
  if samplers is not None:
    subject = subject._replace(samplers=dict(samplers))
  if metrics is None:
    metrics = build_metrics(subject)
  settings = subject.config.evaluation
  first = settings.seed if seed is None else seed
  data = data_features(subject, metrics)
  rows, finished = [], []
  for name, sampler in subject.samplers.items():
    measured = []
    for seed in range(first, first + num_seeds):
      size = settings.num_samples
      place = None
      if folder:
        place = folder / measurement_id(subject, params, name, metrics, size, seed)
        finished.append(FeatureStore(place))
      result = measure(
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


def markdown(rows: Sequence[Mapping[str, Any]], *, each_seed: bool = False) -> str:
  """The rows of a table as Markdown: means and deviations.

  With `each_seed`, then a table of each seed, and of the least value over them.
  """
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
  if each and each_seed:
    text += '\n\nEach seed, and the least value over them:\n\n'
    text += logs.markdown_table(each)
  return text
