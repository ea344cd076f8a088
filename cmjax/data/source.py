"""A data set, and its batches: pure functions of the seed and the step.

Resuming a run therefore needs no saved position in the data.
"""

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple, Protocol

import numpy as np

from cmjax.core import Batch, UserError

MAX_EXAMPLES = 2**31 - 1  # indices are int32


class Examples(Protocol):
  """Examples that are not in memory, but on disk: what a `Source` needs of them."""

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the array of all examples."""
    ...

  @property
  def dtype(self) -> np.dtype:
    """That of the examples."""
    ...

  def __len__(self) -> int:
    """The number of examples."""
    ...

  def __getitem__(self, rows: Any, /) -> np.ndarray:
    """A new array of the examples of a slice, or of indices i[R]; also in threads."""
    ...

  def fingerprint(self) -> str:
    """A text that differs if the data does."""
    ...


class Source(NamedTuple):
  """A data set as it is stored, and the affine map to x0."""

  name: str  # printed next to results
  examples: np.ndarray | Examples  # uint8 or f32[N, H, W, C], or f32[N, D]
  labels: np.ndarray | None  # i[N] in [0, classes); None: unconditional
  classes: int  # 0: unconditional
  low: float  # smallest possible stored value; -inf if unbounded
  high: float  # largest possible stored value; inf if unbounded
  offset: float  # x0 = (stored - offset) * scale
  scale: float
  flip: bool  # mirror each image left to right with probability 1/2

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one example."""
    return self.examples.shape[1:]

  @property
  def in_memory(self) -> bool:
    """Whether the examples are an array, and not on disk."""
    return isinstance(self.examples, np.ndarray)


def batch_at(
  source: Source,
  seed: int,
  step: int,
  batch_size: int,
  rows: np.ndarray | None = None,
) -> Batch:
  """The global batch of a step, or its rows i[R], as NumPy arrays: x0 f32[R, ...].

  The examples follow an endless sequence of permutations, so that each occurs exactly
  once per epoch whatever the batch size. Images are in [-1, 1].
  """
  rows = np.arange(batch_size) if rows is None else rows
  first = step * batch_size
  index = _endless_permutation(seed, len(source.examples), first, batch_size)[rows]
  stored = np.ascontiguousarray(source.examples[index])
  if source.flip:
    bits = np.random.Generator(np.random.Philox(key=[seed, 2**32 + step]))
    mirrored = bits.integers(2, size=batch_size)[rows].astype(bool)
    # Whole pixels of stored values are moved three times as fast as values of x0.
    whole = stored.view(f'V{stored.shape[-1] * stored.itemsize}')
    whole[mirrored] = whole[mirrored, :, ::-1]
  x0 = as_x0(source, stored)
  cond = None if source.labels is None else one_hot(source, index)
  # `_make`, because the fields of Batch are annotated as arrays on a device.
  return Batch._make((x0, cond, index.astype(np.int32)))


def first_row(source: Source, batch_size: int) -> Batch:
  """The first row of a batch, for its shapes and dtypes; reads one example."""
  return batch_at(source, 0, 0, batch_size, np.zeros(1, int))


def contents(source: Source) -> tuple[Any, Any]:
  """Examples and labels, to hash; of examples on disk, a fingerprint of the files."""
  if isinstance(source.examples, np.ndarray):
    return source.examples, source.labels
  return source.examples.fingerprint(), source.labels


def all_x0(source: Source, what: str) -> np.ndarray:
  """All examples as x0 f32[N, ...], a copy.

  Raises: UserError if they are on disk, which `what` does not support.
  """
  if isinstance(source.examples, np.ndarray):
    return as_x0(source, source.examples)
  raise UserError(
    f'{what} needs all examples of {source.name} in memory, and they are on disk; '
    'leave it out, or raise config.data.memory_gib'
  )


def check_batch(source: Source, batch_size: int) -> None:
  """Raises: UserError if a batch would contain an example twice."""
  n = len(source.examples)
  if batch_size > n:
    raise UserError(
      f'config.batch_size: a batch of {batch_size} needs as many examples, and '
      f'{source.name} has {n}; use at most {n}'
    )


def as_x0(source: Source, stored: np.ndarray) -> np.ndarray:
  """Stored values [N, ...] -> x0 f32[N, ...], images in [-1, 1]."""
  x0 = stored.astype(np.float32)
  x0 -= source.offset  # in place, since memory of this size is slow to allocate
  x0 *= np.float32(source.scale)
  return x0


def clip(source: Source, x0: np.ndarray) -> np.ndarray:
  """Samples f32[N, ...] clipped to the range of the data."""
  return np.clip(x0, *bounds(source))


def bounds(source: Source) -> tuple[float, float]:
  """The range of x0; infinite if the data is unbounded."""
  low, high = ((v - source.offset) * source.scale for v in (source.low, source.high))
  return low, high


def as_uint8(source: Source, x0: np.ndarray) -> np.ndarray:
  """Samples f32[N, ...] -> uint8[N, ...]: `low` is 0 and `high` 255, rounded."""
  stored = clip(source, x0) / source.scale + source.offset
  unit = (stored - source.low) / (source.high - source.low)
  return np.rint(unit * 255).astype(np.uint8)


def from_uint8(source: Source, pixels: np.ndarray) -> np.ndarray:
  """Pixels uint8[N, ...] -> x0 f32[N, ...]: 0 is `low` and 255 `high`, as `as_uint8`.

  Raises: ValueError if the range of the data is infinite.
  """
  if not np.isfinite(source.high - source.low):
    raise ValueError(f'{source.name} has no range of values, so that pixels have none')
  stored = source.low + pixels.astype(np.float32) / 255 * (source.high - source.low)
  return as_x0(source, stored)


def one_hot(source: Source, index: np.ndarray) -> np.ndarray:
  """One-hot labels f32[N, classes] of the examples i[N].

  Raises: ValueError if the data has no labels.
  """
  if source.labels is None:
    raise ValueError(f'{source.name} has no labels')
  return one_hot_labels(source.labels[index], source.classes)


def one_hot_labels(labels: np.ndarray, classes: int) -> np.ndarray:
  """One-hot rows f32[N, classes] of labels i[N] in [0, classes)."""
  rows = np.zeros((len(labels), classes), np.float32)
  rows[np.arange(len(labels)), labels] = 1
  return rows


def _endless_permutation(seed: int, n: int, first: int, count: int) -> np.ndarray:
  parts, stop = [], first + count
  while first < stop:
    epoch, start = divmod(first, n)
    parts.append(_permutation(seed, epoch, n)[start : start + stop - first])
    first += len(parts[-1])
  return np.concatenate(parts)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def metadata(source: Source) -> dict[str, Any]:
  """What a model saves about its data, for JSON: null for an infinite bound."""

  def bound(value):
    return float(value) if np.isfinite(value) else None

  return {
    'name': source.name,
    'low': bound(source.low),
    'high': bound(source.high),
    'offset': float(source.offset),
    'scale': float(source.scale),
  }


def placeholder(
  shape: tuple[int, ...], classes: int, saved: Mapping[str, Any] | None = None
) -> Source:
  """A source without examples, to sample a model whose data is not available.

  Args:
    shape: of one example.
    classes: the number of classes; 0 if the model is unconditional.
    saved: the `metadata` of the data. None: images [H, W, C] were uint8, and points
      are unbounded.
  """
  labels = np.arange(classes) if classes else None
  if saved is None and len(shape) == 3:
    return image_source('', np.zeros((0, *shape), np.uint8), labels, classes, False)
  saved = saved or dict(name='', low=None, high=None, offset=0.0, scale=1.0)
  return Source(
    name=saved['name'],
    examples=np.zeros((0, *shape), np.float32),
    labels=labels,
    classes=classes,
    low=-np.inf if saved['low'] is None else saved['low'],
    high=np.inf if saved['high'] is None else saved['high'],
    offset=saved['offset'],
    scale=saved['scale'],
    flip=False,
  )


def image_source(
  name: str,
  examples: np.ndarray | Examples,
  labels: np.ndarray | None,
  classes: int,
  flip: bool,
) -> Source:
  """A source of uint8 images, or of f32 images or points in [-1, 1]."""
  if examples.dtype == np.uint8:
    low, high, offset, scale = 0.0, 255.0, 127.5, 1 / 127.5
  else:
    low, high, offset, scale = -1.0, 1.0, 0.0, 1.0
  return Source(name, examples, labels, classes, low, high, offset, scale, flip)
