"""Measures samples by the metrics of a config; one batch is in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import functools
import json
from pathlib import Path
import re
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.core import Array, Params, UserError
from cmjax.data.source import Source, as_x0, bounds
from cmjax.metrics.metric import Batches, Metric
from cmjax.runtime import build, logs, sharding
from cmjax.runtime.errors import part_errors
from cmjax.runtime.feature_store import FeatureStore, cache_folder, digest
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
  features = _compiled(_applied(metrics), bounds(source), mesh)
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
    _program(sample, params, jax.random.split(jax.random.key(0), 1), cond)
  ]
  for metric in metrics.values():
    program = _program(metric.features, metric.params, *_abstract(subject.source))
    programs.append((program, metric.params))
  text = json.dumps(facts, sort_keys=True)
  return digest(text, *programs, _fingerprint(params, subject.mesh))


def _program(function: Callable[..., Any], *arguments: Any) -> Params:
  """The text and the constants of a program, which change with its code."""
  traced = jax.make_jaxpr(function)(*arguments)
  text = re.sub('0x[0-9a-f]+', '', str(traced.jaxpr))  # addresses of functions
  return np.frombuffer(text.encode(), np.uint8), traced.consts


def _abstract(source: Source) -> tuple[Any, Any]:
  """A batch of x and labels, to trace the features of a metric."""
  x = jax.ShapeDtypeStruct((3, *source.shape), jnp.float32)
  labels = None if source.labels is None else jax.ShapeDtypeStruct((3,), jnp.int32)
  return x, labels


def _fingerprint(params: Params, mesh: jax.sharding.Mesh) -> list[np.ndarray]:
  """Sums over each parameter, which differ where weights differ, even if sharded."""
  return [np.asarray(a) for a in _sums(mesh)(jax.tree.leaves(params))]


@functools.lru_cache(maxsize=1)
def _sums(mesh: jax.sharding.Mesh) -> Callable[..., list[Array]]:
  def sums(leaves):
    return [
      jnp.stack([jnp.sum(a), jnp.sum(jnp.abs(a)), jnp.sum(jnp.sin(1e3 * a))])
      for a in leaves
    ]

  return jax.jit(sums, out_shardings=sharding.replicated(mesh))


def _applied(metrics: Mapping[str, Metric]) -> tuple[tuple[str, Any], ...]:
  return tuple((name, metric.features) for name, metric in metrics.items())


@functools.lru_cache(maxsize=16)
def _compiled(
  metrics: tuple[tuple[str, Any], ...],
  limits: tuple[float, float],
  mesh: jax.sharding.Mesh,
) -> Callable[..., dict[str, Array]]:
  def features(params, x, labels):
    x, arrays = jnp.clip(x, *limits), {}
    for name, apply in metrics:
      for feature, value in apply(params[name], x, labels).items():
        arrays[f'{name}/{feature}'] = value
    return arrays

  return jax.jit(features, out_shardings=sharding.replicated(mesh))


def data_features(
  subject: Subject, metrics: Mapping[str, Metric]
) -> dict[str, Batches]:
  """The features of all data, for each metric that needs them.

  Those of a feature network are computed once, and cached by the contents of the data
  and of the network, and by the program; others are computed whenever they are
  iterated over.
  """
  batches: dict[str, Batches] = {}
  for name, metric in metrics.items():
    if not metric.needs_data:
      batches[name] = ()
    elif not jax.tree.leaves(metric.params):
      batches[name] = DataFeatures(subject.source, metric)
    else:
      batches[name] = _cached(subject, name, metric)
  return batches


_DATA_BATCH = 512  # examples per batch of data; the last batch may be smaller


@dataclasses.dataclass(frozen=True, eq=False)
class DataFeatures:
  """Features of the data, computed whenever they are iterated over, by this process."""

  source: Source
  metric: Metric

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    """Yields the features of each batch of the data."""
    for x, labels in _data(self.source):
      arrays = self.metric.features(self.metric.params, jnp.asarray(x), labels)
      yield {name: np.asarray(a) for name, a in arrays.items()}


def _data(source: Source) -> Iterator[tuple[np.ndarray, Any]]:
  for start in range(0, len(source.examples), _DATA_BATCH):
    rows = slice(start, start + _DATA_BATCH)
    labels = None if source.labels is None else source.labels[rows].astype(np.int32)
    yield as_x0(source, source.examples[rows]), labels


def _cached(subject: Subject, name: str, metric: Metric) -> FeatureStore:
  source, mesh = subject.source, subject.mesh
  part = json.dumps(subject.config.to_dict()['metrics'][name], sort_keys=True)
  scale = json.dumps([source.offset, source.scale])
  program = _program(metric.features, metric.params, *_abstract(source))
  data = (source.examples, source.labels)
  contents = digest(name, part, scale, program, *data, metric.params)
  store = FeatureStore(cache_folder() / contents)
  finished = set(sharding.from_process_0(store.finished))
  num_batches = -(-len(source.examples) // _DATA_BATCH)
  if len(finished) < num_batches:
    logs.say(f'config.metrics.{name}: features of the data ...')
  features = _compiled(_applied({name: metric}), bounds(source), mesh)
  by_example = sharding.by_example(mesh)
  size = -(-_DATA_BATCH // mesh.size) * mesh.size
  todo = [i for i in range(num_batches) if i not in finished]
  for i in logs.counted(todo, _DATA_BATCH, 'examples'):
    rows = np.arange(i * _DATA_BATCH, min((i + 1) * _DATA_BATCH, len(source.examples)))
    padded = np.resize(rows, size)
    x = sharding.place(as_x0(source, source.examples[padded]), by_example)
    labels = None
    if source.labels is not None:
      labels = sharding.place(source.labels[padded].astype(np.int32), by_example)
    arrays = features({name: metric.params}, x, labels)
    if jax.process_index() == 0:
      kept = {key: np.asarray(a)[: len(rows)] for key, a in arrays.items()}
      store.write(i, kept)
  return store.of(name)


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
    given['real'] = as_x0(source, source.examples)  # a copy of all data as floats
  metrics = build.build_each(config.metrics, 'config.metrics', Metric, **given)
  x, labels = _abstract(source)
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
