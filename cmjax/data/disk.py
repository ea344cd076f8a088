"""Examples on disk, decoded as they are indexed: data sets larger than memory."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from cmjax.core import UserError
from cmjax.data import decoded
from cmjax.data.reading import check_memory

_CHUNK = 64  # examples that one thread decodes at a time


class Reader(Protocol):
  """Reads examples of files by their index; can be pickled, and used by threads."""

  def __len__(self) -> int:
    """The number of examples."""
    ...

  def name(self, i: int) -> str:
    """What error messages call an example, such as its path."""
    ...

  def read(self, index: Sequence[int]) -> Iterable[np.ndarray]:
    """The decoded examples of these indices."""
    ...

  def identity(self) -> str:
    """A text that differs if the files or the way to decode them do."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class OnDisk:
  """Examples u8 or f32[N, ...] of a reader; indexing them decodes them.

  Raises UserError if an example is damaged, or unlike the first.
  """

  reader: Reader
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Bytes of all examples, decoded."""
    return int(np.prod(self.shape, dtype=float)) * self.dtype.itemsize

  def __len__(self) -> int:
    """The number of examples."""
    return self.shape[0]

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    """The examples of a slice or of indices i[R], decoded by threads if many."""
    if isinstance(rows, slice):
      rows = np.arange(*rows.indices(len(self)))
    out = np.empty((len(rows), *self.shape[1:]), self.dtype)
    starts = range(0, len(rows), _CHUNK)
    if len(starts) <= 1:
      self._fill(out, rows)
      return out
    with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as pool:
      parts = [(out[i : i + _CHUNK], rows[i : i + _CHUNK]) for i in starts]
      try:
        list(pool.map(self._fill, *zip(*parts)))
      finally:
        pool.shutdown(cancel_futures=True)
    return out

  def _fill(self, out: np.ndarray, index: np.ndarray) -> None:
    examples = self.reader.read(index.tolist())
    for row, i, example in zip(out, index.tolist(), examples, strict=True):
      if (example.shape, example.dtype) != (row.shape, row.dtype):
        raise UserError(
          f'config.data: examples differ: {self.reader.name(0)} is {_kind(row)}, '
          f'{self.reader.name(i)} is {_kind(example)}; resize them first, as '
          'config.data.size does with images'
        )
      row[...] = example

  def fingerprint(self) -> str:
    """A text that differs if the data does; of names, sizes and times of the files."""
    return self.reader.identity()


def _kind(example: np.ndarray) -> str:
  if example.ndim == 3 and example.dtype == np.uint8:
    height, width, channels = example.shape
    return f'{width}x{height}' + (f'x{channels}' if channels != 3 else '')
  return f'{example.dtype}{list(example.shape)}'


def examples_of(reader: Reader, memory_gib: float, what: str) -> np.ndarray | OnDisk:
  """The examples of a reader, in memory if they take at most `memory_gib` GiB there.

  Those in memory are cached, decoded, for the next start.

  Raises: UserError if they do not fit into the memory of this machine, or `OnDisk`
    raises it.
  """
  first = next(iter(reader.read([0])))
  on_disk = OnDisk(reader, (len(reader), *first.shape), first.dtype)
  if not fits(on_disk.nbytes, memory_gib, what):
    return on_disk

  def decode() -> dict[str, np.ndarray]:
    return {'images': on_disk[:]}

  def is_valid(arrays: dict[str, np.ndarray]) -> bool:
    images = arrays.get('images', np.zeros(0))
    return (images.shape, images.dtype) == (on_disk.shape, on_disk.dtype)

  return decoded.cached(reader.identity(), decode, is_valid)['images']


def fits(size: int, memory_gib: float, what: str) -> bool:
  """Whether examples of `size` bytes stay in memory.

  Raises: UserError if they should and this machine has too little, or memory_gib is not
    a number from 0.
  """
  if not memory_gib >= 0:  # written so that NaN fails too
    raise UserError(f'config.data.memory_gib: must not be negative, got {memory_gib}')
  if size > memory_gib * 2**30:
    return False
  hint = 'a smaller config.data.memory_gib, so that they stay on disk'
  check_memory(size, what, hint)
  return True


def facts_of(root: Path, names: Iterable[str]) -> list[tuple[str, int, int]]:
  """Name below `root`, size and time of change of each file."""
  found = []
  for name in names:
    status = os.stat(os.path.join(root, name))
    found.append((name, status.st_size, status.st_mtime_ns))
  return found
