"""Reference statistics of other repositories, read without running code in them.

| repository | file | arrays |
|---|---|---|
| EDM, torch-fidelity, clean-fid, pytorch-fid | .npz | mu, sigma |
| EDM2 | .pkl | fid: mu, sigma; fd_dinov2: mu, sigma |
| OpenAI | .npz | mu, sigma, mu_s, sigma_s, arr_0 (images) |
| codes in JAX | .npz | ref_mu, ref_sigma |
"""

from collections.abc import Mapping
import contextlib
import math
from pathlib import Path
from typing import Any
import zipfile

import numpy as np

from cmjax.core import UserError
from cmjax.data.reading import check_memory
from cmjax.metrics.reference import Statistics
from cmjax.port import read as files
from cmjax.port.names import short_repr

MAX_FEATURES = 8192  # a covariance of 512 MiB
MAX_MEMBERS = 64  # of an .npz
_PAIRS = ('mu', 'sigma'), ('ref_mu', 'ref_sigma')
_SPATIAL = ('mu_s', 'sigma_s')
_IMAGES = 'arr_0'
_READ = {*_PAIRS[0], *_PAIRS[1], *_SPATIAL, _IMAGES}


def read(*, path: str, key: str = '') -> Statistics:
  """Mean and covariance of features of data, and images, if the file has any.

  Args:
    path: an .npz, or a pickle of arrays.
    key: the entry of a file with several, such as EDM2's fid.

  Raises: UserError if the file is missing, damaged or hostile, lacks the entry or its
    arrays, or its covariance is not a finite symmetric matrix.
  """
  file = Path(path)
  if not file.is_file():
    problem = 'is a folder; give a file in it' if file.is_dir() else 'no such file'
    raise UserError(f'{path}: {problem}')
  content = _read_npz(file) if _is_npz(file) else files.read(file).content
  entry, name = _entry(content, key, path)
  pair = next((pair for pair in _PAIRS if set(pair) <= entry.keys()), None)
  if pair is None:
    raise UserError(
      f'{path}: has no mu and sigma, or ref_mu and ref_sigma; it has {_listed(entry)}'
    )
  spatial: tuple[Any, Any] = (None, None)
  if set(_SPATIAL) <= entry.keys():
    spatial = _gaussian(entry, _SPATIAL, path)
  images = None
  if _IMAGES in entry:
    images = _checked_images(entry[_IMAGES], path)
  return Statistics(name, *_gaussian(entry, pair, path), *spatial, images)


def _is_npz(file: Path) -> bool:
  """Whether a file is a zip of arrays; a zip of torch is not."""
  with file.open('rb') as stream:
    if stream.read(4) not in (b'PK\3\4', b'PK\5\6'):
      return False
  try:
    with _opened(file) as archive:
      return all(name.endswith('.npy') for name in archive.namelist())
  except Exception as error:
    raise _damaged(file, error) from error


@contextlib.contextmanager
def _opened(file: Path):
  with file.open('rb') as stream:
    files.check_directory(stream, file.stat().st_size)
    with zipfile.ZipFile(stream) as archive:
      yield archive


def _read_npz(file: Path) -> dict[str, np.ndarray | None]:
  """The arrays that are used, and None for any other."""
  try:
    with _opened(file) as archive:
      members = {m.filename.removesuffix('.npy'): m for m in archive.infolist()}
      if len(members) < len(archive.infolist()) or len(members) > MAX_MEMBERS:
        raise ValueError('too many arrays, or two with the same name')
      return {
        name: _read_member(archive, member, file) if name in _READ else None
        for name, member in members.items()
      }
  except UserError:
    raise
  except Exception as error:  # damaged bytes raise errors of many types
    raise _damaged(file, error) from error


def _read_member(
  archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: Path
) -> np.ndarray:
  """An array, whose header is checked before memory is allocated for it."""
  name = member.filename.removesuffix('.npy')
  with archive.open(member) as stream:
    headers = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    if version not in headers:
      raise ValueError(f'{name} has version {version[0]} of the format')
    shape, _, dtype = headers[version](stream)
    if dtype.kind not in 'fiu':
      raise ValueError(f'{name} is not an array of numbers')
    most_axes = 4 if name == _IMAGES else 2
    if len(shape) > most_axes or min(shape, default=0) < 0:
      raise ValueError(f'{name} has the shape {short_repr(shape)}')
    size = math.prod(shape) * dtype.itemsize
    # Deflated statistics of real data are at most a few times smaller.
    packed = member.file_size if not member.compress_type else 50 * member.compress_size
    if size > min(member.file_size, packed):
      raise ValueError(f'{name} is larger than its part of the file')
    check_memory(2 * size, f'{file}: the numbers of {name}')
  with archive.open(member) as stream:
    return np.lib.format.read_array(stream, allow_pickle=False)


def _entry(content: Any, key: str, path: str) -> tuple[Mapping[str, Any], str]:
  """The arrays of the file or of one of its entries, and their name."""
  name = Path(path).name
  if not isinstance(content, Mapping):
    raise UserError(f'{path}: contains no named arrays')
  nested = {k: v for k, v in content.items() if isinstance(v, Mapping)}
  if key:
    if key not in nested:
      known = f'it has {_listed(nested)}' if nested else 'it has one set; leave key out'
      raise UserError(f'{path}: has no entry {key!r}; {known}')
    return nested[key], f'{name}:{key}'
  if nested:
    raise UserError(f'{path}: has several entries; set key to one of {_listed(nested)}')
  return content, name


def _gaussian(
  entry: Mapping[str, Any], pair: tuple[str, str], path: str
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and covariance in float64, checked."""
  found = [entry[name] for name in pair]
  if not all(isinstance(x, np.ndarray) and x.dtype.kind in 'fiu' for x in found):
    raise UserError(f'{path}: {pair[0]} and {pair[1]} must be arrays of numbers')
  mean, covariance = found
  size = len(mean) if mean.ndim == 1 else 0
  if not 0 < size <= MAX_FEATURES or covariance.shape != (size, size):
    raise UserError(
      f'{path}: {pair[0]} and {pair[1]} must be [D] and [D, D] with D up to '
      f'{MAX_FEATURES}, got {short_repr(mean.shape)} and {short_repr(covariance.shape)}'
    )
  mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
  if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(covariance))):
    raise UserError(f'{path}: {pair[0]} or {pair[1]} has numbers that are not finite')
  # Rounding of a product in float32 leaves 1e-6.
  asymmetry = np.max(np.abs(covariance - covariance.T))
  if asymmetry > 1e-5 * np.max(np.abs(covariance)) or np.min(np.diag(covariance)) < 0:
    raise UserError(f'{path}: {pair[1]} is not the symmetric matrix of a covariance')
  return mean, (covariance + covariance.T) / 2


def _checked_images(images: Any, path: str) -> np.ndarray:
  valid = isinstance(images, np.ndarray) and images.dtype == np.uint8
  if not valid or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
    raise UserError(f'{path}: arr_0 must be images uint8[N, H, W, 1 or 3]')
  return images


def _listed(entries: Mapping[Any, Any]) -> str:
  names = [short_repr(name) for name in list(entries)[:20]]
  return ', '.join(names) or 'nothing'


def _damaged(file: Path, error: Exception) -> UserError:
  return UserError(
    f'{file}: damaged or not a file of statistics ({files.printable(error)}); download '
    'it again'
  )
