"""Features of the data for metrics, compiled, and what identifies stored features."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.core import Array, Params
from cmjax.data.source import Source, as_x0, bounds, contents
from cmjax.metrics.metric import Batches, Metric
from cmjax.runtime import logs, sharding
from cmjax.runtime.feature_store import FeatureStore, cache_folder, digest
from cmjax.sampling import Subject


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
  text = program(metric.features, metric.params, *abstract_batch(source))
  key = digest(name, part, scale, text, *contents(source), metric.params)
  store = FeatureStore(cache_folder() / key)
  finished = set(sharding.from_process_0(store.finished))
  num_batches = -(-len(source.examples) // _DATA_BATCH)
  if len(finished) < num_batches:
    logs.say(f'config.metrics.{name}: features of the data ...')
  features = compiled_features({name: metric}, source, mesh)
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


def program(function: Callable[..., Any], *arguments: Any) -> Params:
  """The text and the constants of a program, which change with its code."""
  traced = jax.make_jaxpr(function)(*arguments)
  text = re.sub('0x[0-9a-f]+', '', str(traced.jaxpr))  # addresses of functions
  return np.frombuffer(text.encode(), np.uint8), traced.consts


def fingerprint(params: Params, mesh: jax.sharding.Mesh) -> list[np.ndarray]:
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


def abstract_batch(source: Source) -> tuple[Any, Any]:
  """A batch of x and labels, to trace the features of a metric."""
  x = jax.ShapeDtypeStruct((3, *source.shape), jnp.float32)
  labels = None if source.labels is None else jax.ShapeDtypeStruct((3,), jnp.int32)
  return x, labels


def compiled_features(
  metrics: Mapping[str, Metric], source: Source, mesh: jax.sharding.Mesh
) -> Callable[..., dict[str, Array]]:
  """A jitted function of (params, x, labels), both by metric: METRIC/FEATURE -> f[B].

  The samples x f32[B, ...] are clipped to the range of the data.
  """
  applied = tuple((name, metric.features) for name, metric in metrics.items())
  return _compiled(applied, bounds(source), mesh)


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
