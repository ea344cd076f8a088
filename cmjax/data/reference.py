"""The reference set of Stable Consistency Tuning."""

from typing import Any

import numpy as np

from cmjax.data.reading import check_memory
from cmjax.data.source import Source
from cmjax.fields import Reference


def reference(source: Source, *, per_class: int = 0, seed: int = 0) -> Reference:
  """The examples as stored, in one bucket per class, for `fields.stable_denoiser`.

  Without labels there is one bucket. Each has at most `per_class` examples, drawn at
  random from `seed`; 0 takes all.

  Raises: ValueError if `per_class` is negative.
  """
  if per_class < 0:
    raise ValueError(f'reference: needs {per_class=} >= 0')
  labels = np.zeros(len(source.examples), int)
  if source.labels is not None:
    labels = source.labels
  permutation = np.random.Generator(np.random.Philox(key=[seed, 2**33])).permutation
  buckets = []  # the indices of the examples in each
  for label in range(max(source.classes, 1)):
    index = np.flatnonzero(labels == label)
    buckets.append(permutation(index)[:per_class] if per_class else index)
  size = max(map(len, buckets))
  needed = len(buckets) * size * source.examples[:1].nbytes
  check_memory(needed, f'{len(buckets)} classes of up to {size} examples')
  examples = np.zeros((len(buckets), size, *source.shape), source.examples.dtype)
  slots = np.full(len(labels), -1, np.int32)
  for rows, index in zip(examples, buckets):
    rows[: len(index)] = source.examples[index]
    slots[index] = np.arange(len(index))
  # Arrays on the host, which the caller places on the devices.
  on_host: dict[str, Any] = {
    'examples': examples,
    'counts': np.array([len(index) for index in buckets], np.int32),
    'slots': slots,
    'offset': np.float32(source.offset),
    'scale': np.float32(source.scale),
  }
  return Reference(**on_host)
