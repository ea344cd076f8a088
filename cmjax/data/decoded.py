"""The cache of decoded data sets, so that a second start does not decode them again."""

from collections.abc import Callable
import contextlib
import math
import os
from pathlib import Path
import uuid

import numpy as np

from cmjax.core import first_line
from cmjax.runtime import logs
from cmjax.runtime.feature_store import cache_folder, digest

_VERSION = '1'  # of the format and of the code that decodes
_MAX_BYTES = 16 * 2**30  # of the folder; the files used last remain (cmjax choice)
_MAX_HEADERS = 4096  # bytes of a file besides its arrays; 300 are measured

Arrays = dict[str, np.ndarray]


def cached(
  identity: str,
  make: Callable[[], Arrays],
  is_valid: Callable[[Arrays], bool] = lambda arrays: True,
) -> Arrays:
  """The arrays that `make` returns, from CMJAX_CACHE_DIR/decoded if they are there.

  A file of the cache that is damaged or not valid is reported, and replaced; one that
  cannot be written is reported. The folder grows to at most 16 GiB.
  """
  path = _path(identity)
  arrays = found(identity)
  if arrays is not None and not is_valid(arrays):
    arrays = _drop(path, 'holds other arrays')
  if arrays is None:
    arrays = make()
    _write(path, arrays)
  return arrays


def found(identity: str, max_bytes: float = math.inf) -> Arrays | None:
  """The arrays in the cache; None if there are none, or they are damaged.

  Also None, without loading them, if they take more than `max_bytes`.
  """
  path = _path(identity)
  if not path.is_file() or path.stat().st_size - _MAX_HEADERS > max_bytes:
    return None
  try:
    with np.load(path, allow_pickle=False) as file:  # which checks CRC-32
      arrays = {name: file[name] for name in file.files}
  except Exception as error:  # damaged bytes raise errors of many types
    return _drop(path, first_line(error))
  with contextlib.suppress(OSError):  # of a cache that is read-only
    os.utime(path)  # the time of its last use
  return arrays


def _drop(path: Path, reason: str) -> None:
  logs.say(f'{path}: damaged, decoded again ({reason})')
  with contextlib.suppress(OSError):
    path.unlink()


def _path(identity: str) -> Path:
  folder = cache_folder().parent / 'decoded'
  return folder / f'{digest(_VERSION, identity)}.npz'


def _write(path: Path, arrays: Arrays) -> None:
  size = sum(array.nbytes for array in arrays.values())
  if size > _MAX_BYTES or path.is_file():  # another process may have written it
    return
  unfinished = path.with_suffix(f'.{uuid.uuid4().hex}.unfinished')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _prune(path.parent, _MAX_BYTES - size)
    with open(unfinished, 'wb') as file:
      np.savez(file, allow_pickle=False, **arrays)
    os.replace(unfinished, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      unfinished.unlink()
    logs.say(f'{path}: cannot cache the decoded data ({error.strerror})')


def _prune(folder: Path, limit: int) -> None:
  """Deletes the files that were used first, until the others take `limit` bytes."""
  files = []
  for path in folder.iterdir():
    with contextlib.suppress(FileNotFoundError):  # another process may have deleted it
      if path.is_file():
        files.append((path.stat(), path))
  for status, path in sorted(files, key=lambda f: f[0].st_mtime, reverse=True):
    limit -= status.st_size
    if limit < 0:
      path.unlink(missing_ok=True)
