"""A lock: only one process at a time trains in a work directory."""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import json
import os
from pathlib import Path
import socket
import threading
import time
from typing import IO

from cmjax.core import UserError
from cmjax.runtime import bucket_lock, paths
from cmjax.runtime.bucket_lock import Owner, owner_in, refuse

BEAT_S = 5.0  # how often the owner of a lock touches its file
PATIENCE_S = 3 * BEAT_S  # without a touch, an owner on another host is presumed dead


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[Callable[[], None]]:
  """Makes the folder, and keeps every other process from training in it.

  The operating system holds the lock, on the file `.lock`, until the process ends. On a
  file system whose locks are local to a host, an owner on another host is presumed
  alive as long as it touches the file. In a bucket, see `bucket_lock`, for which the
  function that this yields is to be called before a checkpoint is written.

  Raises: UserError naming the host and the process of another owner.
  """
  if paths.remote(workdir):
    with bucket_lock.lock(workdir) as check:
      yield check
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # A link may point to a file of the user's, which must not be overwritten.
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    file = os.fdopen(os.open(workdir / '.lock', flags, 0o666), 'a+b')
  except OSError as error:
    raise UserError(f'--workdir: cannot write {workdir} ({error.strerror})') from error
  with file:
    locked = _locked(file)
    if locked is False:
      refuse(workdir, _owner(file, wait=True))
    owner = _owner(file)
    # An owner whose lock is not visible may be alive; if so, it touches the file.
    unseen = locked is None or (owner and owner.host != socket.gethostname())
    if owner and unseen and _beats(file):
      refuse(workdir, owner)
    _write_owner(file, Owner(socket.gethostname(), os.getpid()))
    ended = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(file.fileno(), ended), daemon=True)
    heartbeat.start()
    try:
      yield lambda: None  # the operating system holds it
    finally:
      ended.set()
      heartbeat.join()
      _write_owner(file, None)  # removing the file could free another's lock


def trained_by(workdir: Path) -> str | None:
  """The process that trains in a work directory, as far as can be seen, or None."""
  if paths.remote(workdir):
    return bucket_lock.trained_by(workdir)
  try:
    with (workdir / '.lock').open('rb') as file:
      owner = _owner(file)
      age_s = time.time() - os.fstat(file.fileno()).st_mtime
  except OSError:
    return None
  if owner is None:
    return None
  if owner.host == socket.gethostname():
    if not Path('/proc', str(owner.process)).exists() and Path('/proc/1').exists():
      return None
  elif age_s > PATIENCE_S:
    return None
  return str(owner)


def _locked(file: IO[bytes]) -> bool | None:
  """Whether the lock was taken; None if the file system has no locks."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:
    return None
  return True


def _owner(file: IO[bytes], wait: bool = False) -> Owner | None:
  """The owner named in a lock file, if any; with `wait`, it may be about to write."""
  for _ in range(20 if wait else 1):
    file.seek(0)
    if owner := owner_in(file.read(4096)):
      return owner
    time.sleep(0.05 if wait else 0)
  return None


def _write_owner(file: IO[bytes], owner: Owner | None) -> None:
  file.truncate(0)  # opened for appending, so what follows is the whole file
  file.write(json.dumps(owner._asdict()).encode() if owner else b'')
  file.flush()


def _beats(file: IO[bytes]) -> bool:
  """Whether an owner on another host touches the file within `PATIENCE_S`."""
  before, until = os.fstat(file.fileno()).st_mtime_ns, time.monotonic() + PATIENCE_S
  while time.monotonic() < until:
    time.sleep(BEAT_S / 10)
    if os.fstat(file.fileno()).st_mtime_ns != before:
      return True
  return False


def _beat(descriptor: int, ended: threading.Event) -> None:
  while not ended.wait(BEAT_S):
    with contextlib.suppress(OSError):
      os.utime(descriptor)
