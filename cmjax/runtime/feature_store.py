"""Batches of arrays in a folder of .npz files, each written once.

Memory does not grow with the number of batches, and a program that was killed continues
after the last batch that it finished.
"""

from collections.abc import Iterator, Mapping
import hashlib
import os
from pathlib import Path
import shutil
from typing import Any
import uuid
import zipfile

import jax
import numpy as np

from cmjax.core import Params
from cmjax.runtime import paths


class FeatureStore:
  """The batches of one folder; iterating yields them in order, one in memory."""

  def __init__(self, folder: Path, names: Mapping[str, str] | None = None):
    """`names`: the arrays to yield and their names in the files; None: all."""
    self.folder, self._names = folder, names

  def finished(self) -> list[int]:
    """The indices of all whole batches."""
    paths = self.folder.glob('[0-9]*.npz')
    return sorted(int(path.stem) for path in paths if zipfile.is_zipfile(path))

  def write(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a batch as a whole or not at all."""
    self.folder.mkdir(parents=True, exist_ok=True)
    # Of a new name, as another command may be writing the same batch.
    unfinished = self.folder / f'{index:06d}.{uuid.uuid4().hex}.unfinished'
    with open(unfinished, 'wb') as file:
      # `np.savez` has keywords of its own, such as `file`, which have no underscore.
      underscored: Any = {f'_{name}': array for name, array in arrays.items()}
      np.savez(file, **underscored)
    os.replace(unfinished, self.folder / f'{index:06d}.npz')

  def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
    """Yields the arrays of each batch by name, in the order of the batches."""
    for index in self.finished():
      with np.load(self.folder / f'{index:06d}.npz', allow_pickle=False) as file:
        names = self._names
        if names is None:
          names = {name[1:]: name[1:] for name in file.files}
        yield {name: file[f'_{stored}'] for name, stored in names.items()}

  def of(self, prefix: str) -> 'FeatureStore':
    """The same batches, with only the arrays PREFIX/NAME, as NAME."""
    batch = next(iter(FeatureStore(self.folder)), {})
    names = {
      name.removeprefix(f'{prefix}/'): name
      for name in batch
      if name.startswith(f'{prefix}/')
    }
    return FeatureStore(self.folder, names)

  def remove(self) -> None:
    """Deletes the batches, and the folder."""
    shutil.rmtree(self.folder, ignore_errors=True)


def cache_folder() -> Path:
  """Where features of data are kept between runs: CMJAX_CACHE_DIR or ~/.cache/cmjax."""
  return paths.cache_root() / 'features'


def digest(*parts: str | np.ndarray | Params) -> str:
  """A hash of texts, arrays and trees of arrays."""
  hasher = hashlib.blake2b(digest_size=16)
  for part in parts:
    if isinstance(part, str):
      hasher.update(part.encode())
      continue
    for leaf in jax.tree.leaves(part):
      array = np.ascontiguousarray(leaf)
      hasher.update(f'{array.dtype}{array.shape}'.encode())
      hasher.update(array)
  return hasher.hexdigest()
