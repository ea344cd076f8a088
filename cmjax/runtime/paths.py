"""Paths of runs and weights: in a file system, or in a bucket as `gs://BUCKET/FOLDER`.

Object storage differs from a file system, and this module hides where it can:

- An object is written as a whole or not at all: no file is renamed to be atomic.
- Nothing is appended to an object: see `row_file`.
- Folders are prefixes of names: they exist as long as an object in them does.
- There are no links and no locks of an operating system: see `lock`.
- Libraries that write to file names need a local folder: see `staging` and `upload`.
"""

from collections.abc import Iterable, Iterator
import contextlib
import fnmatch
import functools
from importlib import util
import logging
import os
from pathlib import Path
import re
import tempfile
from typing import Any, cast
import urllib.error
import urllib.request

from cmjax.core import RetryError, UserError, first_line

TIMEOUT_S = 60.0  # of one request; gcsfs makes up to six, over about 35 s
PROBE_S = 5.0  # for `answers`
_ADDRESS = re.compile(r'([A-Za-z][A-Za-z0-9+.-]+):/+')  # Path collapses two slashes
_LIBRARIES = {'gcsfs', 'fsspec', 'aiohttp', 'google', 'requests'}  # raise of their own


def path(text: str | os.PathLike[str]) -> Path:
  """The path of a text: an `epath.Path` for `gs://`, otherwise a local one.

  An `epath.Path` has the methods of a `pathlib.Path` that are used in cmjax, so it is
  annotated as one; `resolve`, `stat`, `rename` and text modes of `open` differ.

  Raises: UserError for other kinds of storage, or if gcsfs is missing.
  """
  text = os.fspath(text)
  address = _ADDRESS.match(text)
  if address is None:
    return Path(text)
  if address[1] != 'gs':
    raise UserError(
      f'{text}: only local or mounted folders and gs:// can be opened; copy it to '
      'one, or mount the bucket'
    )
  name = text[address.end() :].strip('/')
  if '/' not in name or '..' in name.split('/'):
    raise UserError(f'{text}: must be gs://BUCKET/FOLDER')
  if util.find_spec('gcsfs') is None:
    raise UserError(f"{text}: needs the package gcsfs; pip install 'cmjax[gcs]'")
  _files()
  from etils import epath

  return cast(Path, epath.Path(f'gs://{name}'))


def remote(path: str | os.PathLike[str]) -> bool:
  """Whether a path is in object storage."""
  return str(path).startswith('gs://')


def absolute(path: Path) -> Path:
  """The path without links and `..`."""
  return path if remote(path) else path.resolve()


@functools.cache
def _files() -> Any:
  """gcsfs, for all of this process; its settings also hold for epath and orbax."""
  # Otherwise epath imports TensorFlow if it is installed, and gcsfs asks each bucket
  # for its kind by gRPC, which emulators do not answer.
  os.environ.setdefault('EPATH_USE_TF', 'false')
  os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  import fsspec
  import fsspec.config

  settings = fsspec.config.conf.setdefault('gcs', {})
  settings.setdefault('use_listings_cache', False)  # other processes write, too
  settings.setdefault('requests_timeout', TIMEOUT_S)
  if os.environ.get('STORAGE_EMULATOR_HOST'):
    settings.setdefault('token', 'anon')  # otherwise the credentials of this machine
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # a page for each failure
  return fsspec.filesystem('gcs')


def reason(error: BaseException) -> str:
  """What an error of storage says, in one line; empty if it is of another kind."""
  library = type(error).__module__.partition('.')[0]
  if isinstance(error, OSError) or library in _LIBRARIES:
    return f'{first_line(cast(Exception, error))} ({type(error).__name__})'
  return ''


def check_access(folder: Path) -> None:
  """Checks that the objects of a bucket can be listed.

  Raises: UserError, RetryError if the bucket does not answer.
  """
  bucket, _, prefix = str(folder).removeprefix('gs://').partition('/')
  try:
    _files().call('GET', 'b/{}/o', bucket, prefix=f'{prefix}/', maxResults=1)
  except FileNotFoundError:
    raise UserError(f'{folder}: there is no bucket {bucket!r}; create it') from None
  except Exception as error:
    if why := reason(error):
      text = f'{folder}: no access to bucket {bucket!r}: {why}'
      raise failure(folder, text) from error
    raise


def failure(folder: Path, text: str) -> UserError:
  """The error of a folder: a RetryError if it is in a bucket that does not answer."""
  return UserError(text) if answers(folder) else RetryError(text)


def answers(folder: Path) -> bool:
  """Whether the server of a bucket answers at all, asked once; true if local."""
  if not remote(folder):
    return True
  server = os.environ.get('STORAGE_EMULATOR_HOST') or 'https://storage.googleapis.com'
  server = server if '://' in server else f'http://{server}'
  try:
    with urllib.request.urlopen(server, timeout=PROBE_S):
      return True
  except urllib.error.HTTPError:  # an answer
    return True
  except (OSError, ValueError):
    return False


# Unlike those of epath, these do not take a bucket that fails for an empty one -------


def _kind(path: Path) -> str:
  try:
    return _files().info(str(path))['type']
  except FileNotFoundError:
    return ''


def is_dir(path: Path) -> bool:
  """Whether there is a folder at a path."""
  return _kind(path) == 'directory' if remote(path) else path.is_dir()


def is_file(path: Path) -> bool:
  """Whether there is a file at a path."""
  return _kind(path) == 'file' if remote(path) else path.is_file()


def size(path: Path) -> int:
  """The bytes of a file."""
  return _files().info(str(path))['size'] if remote(path) else path.stat().st_size


def folders_in(folder: Path) -> list[str]:
  """The names of the folders in a folder; none if it does not exist."""
  if not remote(folder):
    return [path.name for path in folder.glob('*') if path.is_dir()]
  try:
    entries = _files().ls(str(folder), detail=True)
  except FileNotFoundError:
    return []
  return [e['name'].split('/')[-1] for e in entries if e['type'] == 'directory']


def write_bytes(path: Path, data: bytes) -> None:
  """Writes a file as a whole or not at all; a link is replaced, not followed."""
  if remote(path):
    _files().pipe_file(str(path), data)  # one request; epath's would be two
    return
  new = path.with_name(f'{path.name}.new')
  new.unlink(missing_ok=True)  # it may be a link
  new.write_bytes(data)
  new.replace(path)


def write_text(path: Path, text: str) -> None:
  """`write_bytes` of a text in UTF-8."""
  write_bytes(path, text.encode())


def rename(old: Path, new: Path) -> None:
  """Renames a folder. In a bucket it is copied, and a kill leaves parts of both."""
  if not remote(old):
    old.rename(new)
    return
  top = str(old).removeprefix('gs://')
  names = _files().find(top)
  targets = [str(new) + name.removeprefix(top) for name in names]
  _files().copy(names, targets)
  _files().rm(names)


# Local copies ------------------------------------------------------------------------


def cache_root() -> Path:
  """CMJAX_CACHE_DIR, or ~/.cache/cmjax."""
  return Path(os.environ.get('CMJAX_CACHE_DIR') or Path.home() / '.cache' / 'cmjax')


def staging(folder: Path) -> Path:
  """A local folder in place of one in a bucket, of the same name; it is kept."""
  if not remote(folder):
    return folder
  return cache_root() / 'staging' / str(folder).removeprefix('gs://')


def upload(source: Path, target: Path, done: dict[Path, tuple[int, int]]) -> None:
  """Copies the files of a local folder that are new or have changed since `done`."""
  for file in sorted(source.rglob('*')):
    if file.is_file():
      stat, name = file.stat(), file.relative_to(source)
      state = stat.st_size, stat.st_mtime_ns
      if done.get(name) != state:
        write_bytes(target / name, file.read_bytes())
        done[name] = state


@contextlib.contextmanager
def fetched(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
  """A folder with the files of patterns: itself if local, else a temporary copy.

  A `*` of a pattern matches within one name.
  """
  if not remote(folder):
    yield folder
    return
  top = str(folder).removeprefix('gs://')
  wanted = [pattern.split('/') for pattern in patterns]
  names = [name.removeprefix(f'{top}/') for name in _files().find(top)]
  parts = ((name, name.split('/')) for name in names)
  chosen = [name for name, p in parts if any(_matches(p, q) for q in wanted)]
  with tempfile.TemporaryDirectory(prefix='cmjax_') as scratch:
    local = Path(scratch) / top
    local.mkdir(parents=True)
    targets = [local / name for name in chosen]
    for target in targets:
      target.parent.mkdir(parents=True, exist_ok=True)
    if chosen:
      _files().get([f'{top}/{name}' for name in chosen], list(map(str, targets)))
    yield local


def _matches(name: list[str], pattern: list[str]) -> bool:
  return len(name) == len(pattern) and all(map(fnmatch.fnmatchcase, name, pattern))


@contextlib.contextmanager
def fetched_file(path: Path) -> Iterator[Path]:
  """A file: itself if local, otherwise a temporary copy whose path ends the same."""
  if not remote(path):
    yield path
    return
  with fetched(path.parent, [re.sub(r'([*?[])', r'[\1]', path.name)]) as local:
    yield local / path.name


@contextlib.contextmanager
def written_file(path: Path) -> Iterator[Path]:
  """A file to write: itself if local, otherwise one that is uploaded at the end."""
  if not remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix='cmjax_') as scratch:
    yield Path(scratch) / path.name
    write_bytes(path, (Path(scratch) / path.name).read_bytes())
