"""Arrays in one or several `.npz` files."""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple
import zipfile

import numpy as np

from cmjax.core import UserError
from cmjax.data.archives import data_offset
from cmjax.data.disk import OnDisk, facts_of, fits
from cmjax.data.reading import check_memory, checked_images, checked_labels, reading


class _Images(NamedTuple):
  """The array `images` within an `.npz`."""

  shape: tuple[int, ...]
  dtype: np.dtype
  offset: int  # in the file, of its bytes; -1 if they are compressed or not in C order


@dataclasses.dataclass(frozen=True, eq=False)
class Shards:
  """The arrays `images` of `.npz` files, one after the other: a `disk.Reader`."""

  paths: list[Path]
  offsets: list[int]
  starts: np.ndarray  # i64[number of files + 1], the first example of each
  shape: tuple[int, ...]  # of one example
  dtype: np.dtype  # as stored; what `read` returns is uint8 or float32

  def __len__(self) -> int:
    """The number of examples."""
    return int(self.starts[-1])

  def name(self, i: int) -> str:
    """The path of a file, and the number of an example in it."""
    shard = self._shard(i)
    return f'example {i - self.starts[shard]} of {self.paths[shard]}'

  def _shard(self, i: int) -> int:
    return int(np.searchsorted(self.starts, i, side='right')) - 1

  def read(self, index):
    """The examples of these indices."""
    size = int(np.prod(self.shape)) * self.dtype.itemsize
    for i in index:
      shard = self._shard(i)
      start = self.offsets[shard] + (i - int(self.starts[shard])) * size
      with reading(f'config.data.path: cannot read {self.name(i)}'):
        with open(self.paths[shard], 'rb', buffering=0) as file:
          content = os.pread(file.fileno(), size, start)
        example = np.frombuffer(content, self.dtype).reshape(self.shape)
      yield checked_images(example[None], f'config.data.path: {self.name(i)}')[0]

  def identity(self) -> str:
    """Paths, sizes and times of the files."""
    folder = self.paths[0].parent
    return repr(
      (str(folder.resolve()), facts_of(folder, [path.name for path in self.paths]))
    )


def read_shards(
  paths: list[Path], conditional: bool, memory_gib: float
) -> tuple[np.ndarray | OnDisk, np.ndarray | None]:
  """The examples and labels i64[N] of `.npz` files, in the order of the paths.

  Raises: UserError if a file cannot be read, has no images, no labels although
    `conditional` is set, or other images than the first; or if the images are to stay
    on disk and one file is compressed.
  """
  sizes = [_size(path, conditional) for path in paths]
  what = 'config.data.path: the arrays of '
  what += str(paths[0] if len(paths) == 1 else paths[0].parent)
  if fits(sum(sizes), memory_gib, what):
    return _in_memory(paths, conditional)
  found = [_images(path) for path in paths]
  first = found[0]
  for path, images in zip(paths, found):
    _check_like(paths[0], path, (first.shape, first.dtype), images[:2])
    if images.offset < 0:
      raise UserError(
        f'config.data.path: {path} is compressed, or not in C order, and larger than '
        'config.data.memory_gib; save it with np.savez, or raise that'
      )
  counts = [images.shape[0] for images in found]
  starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
  offsets = [images.offset for images in found]
  reader = Shards(paths, offsets, starts, first.shape[1:], first.dtype)
  checked_images(np.zeros((1, *first.shape[1:]), first.dtype), f'{what}')
  example = next(iter(reader.read([0])))  # so that a wrong range is reported first
  labels = None
  if conditional:
    labels = [_labels(path, count) for path, count in zip(paths, counts)]
    labels = _joined_labels(labels, len(reader), what)
  return OnDisk(reader, (len(reader), *reader.shape), example.dtype), labels


def _in_memory(
  paths: list[Path], conditional: bool
) -> tuple[np.ndarray, np.ndarray | None]:
  if len(paths) == 1:
    images, labels = _arrays(paths[0], conditional)
    what = f"config.data.path: 'labels' of {paths[0]}"
    return images, None if labels is None else checked_labels(labels, len(images), what)
  all_images, all_labels = [], []
  for path in paths:
    images, labels = _arrays(path, conditional)
    all_images.append(images)
    all_labels.append(labels)
    first = all_images[0]
    _check_like(
      paths[0], path, (first.shape, first.dtype), (images.shape, images.dtype)
    )
  check_memory(2 * sum(a.nbytes for a in all_images), 'config.data.path: the shards')
  images = np.concatenate(all_images)
  what = f"config.data.path: 'labels' of {paths[0].parent}"
  labels = _joined_labels(all_labels, len(images), what) if conditional else None
  return images, labels


def _joined_labels(labels: list, num_examples: int, what: str) -> np.ndarray:
  # uint64 with int64 would become float64.
  if any(a.dtype.kind not in 'iu' for a in labels):
    raise UserError(f'{what} must be integers from 0')
  joined = np.concatenate([a.astype(object) for a in labels])
  if joined.max() >= 2**63:
    raise UserError(f'{what}: {joined.max()} is too large for a class')
  return checked_labels(joined.astype(np.int64), num_examples, what)


def _check_like(first: Path, path: Path, wanted: tuple, got: tuple) -> None:
  (shape, dtype), (other, other_dtype) = wanted, got
  if (shape[1:], dtype) != (other[1:], other_dtype):
    raise UserError(
      f"config.data.path: 'images' differ: those of {first} are {dtype}{list(shape)}, "
      f'those of {path} {other_dtype}{list(other)}'
    )


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
  with reading(f'config.data.path: cannot read {path}'):
    if not path.is_file():  # opening a pipe would block
      raise OSError('not a file')
    with zipfile.ZipFile(path) as file:
      members = {m.filename.removesuffix('.npy'): m for m in file.infolist()}
  if 'images' not in members:
    raise UserError(f"config.data.path: {path} has no 'images'; it has {[*members]}")
  return members


def _size(path: Path, conditional: bool) -> int:
  members = _members(path)
  keys = ('images', 'labels') if conditional else ('images',)
  return sum(members[key].file_size for key in keys if key in members)


def _images(path: Path) -> _Images:
  member = _members(path)['images']
  with reading(f'config.data.path: cannot read {path}'):
    with zipfile.ZipFile(path) as file, file.open(member) as stream:
      version = np.lib.format.read_magic(stream)
      if version not in ((1, 0), (2, 0)):
        raise OSError(f'version {version} of the .npy format')
      header = np.lib.format.read_array_header_1_0
      if version == (2, 0):
        header = np.lib.format.read_array_header_2_0
      shape, fortran, dtype = header(stream)
      start = stream.tell()
    if dtype.hasobject:
      raise OSError('images are Python objects')
    size = dtype.itemsize
    for n in shape:
      size *= n
    if min(shape, default=0) < 1 or start + size != member.file_size:
      raise OSError(f'the array is not the {list(shape)} that it should be')
    if member.compress_type or (fortran and len(shape) > 1):
      return _Images(shape, dtype, -1)
    with open(path, 'rb') as raw:
      return _Images(shape, dtype, data_offset(raw, member.header_offset) + start)


def _arrays(path: Path, conditional: bool) -> tuple[np.ndarray, np.ndarray | None]:
  names = _members(path)
  labels, what = None, f'config.data.path: cannot read {path}'
  with reading(what), np.load(path, allow_pickle=False) as file:
    images = np.asarray(file['images'])
    if conditional and 'labels' in names:
      labels = np.asarray(file['labels'])
  images = checked_images(images, f"config.data.path: 'images' of {path}")
  if conditional:
    _check_labels(path, labels, len(images))
  return images, labels


def _labels(path: Path, num_examples: int) -> np.ndarray:
  labels, what = None, f'config.data.path: cannot read {path}'
  if 'labels' in _members(path):
    with reading(what), np.load(path, allow_pickle=False) as file:
      labels = np.asarray(file['labels'])
  _check_labels(path, labels, num_examples)
  assert labels is not None  # checked above
  return labels


def _check_labels(path: Path, labels: np.ndarray | None, num_examples: int) -> None:
  if labels is None or labels.shape != (num_examples,):
    raise UserError(
      f"config.data.path: {path} has no 'labels' of shape ({num_examples},), and the "
      'model is conditional; add them, or set config.data.conditional=False'
    )
