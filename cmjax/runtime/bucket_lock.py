"""The lock of a work directory in a bucket: an object that its owner renews.

It is created, renewed, taken over and deleted under the condition that its generation
is the one last seen, which the storage itself checks: of two processes one fails.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
from pathlib import Path
import secrets
import signal
import socket
import sys
import threading
import time
from typing import Any, NamedTuple, NoReturn

from cmjax.core import UserError, first_line
from cmjax.runtime import errors, logs, paths

BEAT_S = 5.0  # how often an owner renews its lock
PATIENCE_S = 30.0  # without renewal, an owner is presumed dead
LOST = 2  # the exit code of an owner that was: a launcher must not start it again
# Of one request; tensorstore's own would take a quarter of an hour.
RETRIES = {'max_retries': 4, 'initial_delay': '500ms', 'max_delay': '2s'}
KEY = '.lock'


class Owner(NamedTuple):
  """The process that has a lock."""

  host: str
  process: int

  def __str__(self) -> str:
    """A phrase for messages."""
    return f'process {self.process} on host {self.host}'


def owner_in(content: bytes) -> Owner | None:
  """The owner named in a lock, if any."""
  try:
    owner = json.loads(content)
    return Owner(str(owner['host'])[:80], int(owner['process']))
  except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
    return None


def refuse(workdir: Path, owner: Owner | None) -> NoReturn:
  """Raises UserError naming the owner of a lock."""
  raise UserError(
    f'{workdir}: {owner or "another process"} is training in it; wait until it ends, '
    'or give another --workdir'
  )


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[Callable[[], None]]:
  """Keeps every other process from training in a folder of a bucket.

  If the lock has an owner, waits `PATIENCE_S` for it to renew the lock, and otherwise
  takes it over. If another process takes over this one, because it was stopped or could
  not reach the bucket for so long, this process ends at once with the code `LOST`, as
  all that it would still write is the other's. Within an interactive Python, the main
  thread is interrupted instead.

  Yields a function to call before a checkpoint is written: it renews the lock.

  Raises: UserError if another owner is alive, the bucket cannot be written, or another
    process has taken the lock over, in an interactive Python; RetryError if the bucket
    does not answer.
  """
  try:
    store = _store(workdir)
    held = _Held(workdir, store, _acquired(workdir, store))
  except ValueError as error:  # of tensorstore, for failures of any kind
    if isinstance(error, UserError):
      raise
    reason = first_line(error)
    text = f'--workdir: cannot write {workdir} ({reason})'
    raise paths.failure(workdir, text) from error
  try:
    yield held.check
  except KeyboardInterrupt:
    if not held.lost:
      raise
    raise UserError(held.loss) from None
  finally:
    held.release()


class _Held:
  """A lock with the thread that renews it."""

  def __init__(self, workdir: Path, store: Any, taken: tuple[bytes, bytes]):
    self.lost = False
    self.loss = (
      f'{workdir}: another process took the lock over, as this one did not renew it '
      f'for {PATIENCE_S:.0f} s; this one stops'
    )
    self._store, self._renewing = store, threading.Lock()
    self._content, self._generation = taken
    self._ended = threading.Event()
    self._heartbeat = threading.Thread(target=self._beat, daemon=True)
    self._heartbeat.start()

  def _beat(self) -> None:
    while not self.lost and not self._ended.wait(BEAT_S):
      self.check()

  def check(self) -> None:
    """Renews the lock; ends the process if another one has taken it over."""
    with self._renewing:
      if self.lost or self._ended.is_set():
        return
      try:
        self.lost = not self._renewed()
      except ValueError:  # the bucket does not answer
        return
    if self.lost and hasattr(sys, 'ps1'):
      main = threading.main_thread().ident
      signal.pthread_kill(main or 0, signal.SIGINT)  # also ends a wait
    elif self.lost:
      errors.say(self.loss)
      os._exit(LOST)  # a normal exit completes checkpoints and rows

  def _renewed(self) -> bool:
    written = _write(self._store, self._content, self._generation)
    if not written:  # or an earlier write succeeded whose answer was lost
      found = self._store.read(KEY).result()
      written = found.stamp.generation if found.value == self._content else b''
    self._generation = written
    return bool(written)

  def release(self) -> None:
    """Deletes the lock, unless another process has it or the bucket fails."""
    self._ended.set()
    self._heartbeat.join(timeout=2 * BEAT_S)  # a request may hang
    if not self.lost:
      with contextlib.suppress(ValueError):
        _write(self._store, None, self._generation)


def _acquired(workdir: Path, store: Any) -> tuple[bytes, bytes]:
  """The content and the generation of a lock that is now this process's."""
  found = store.read(KEY).result()
  if (owner := owner_in(found.value)) is not None:
    logs.say(
      f'{workdir}: locked by {owner}; waits up to {PATIENCE_S:.0f} s to see whether '
      'it is alive'
    )
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and owner is not None:
      time.sleep(min(1.0, PATIENCE_S / 10))
      seen, found = found, store.read(KEY).result()
      owner = owner_in(found.value)
      if owner and found.stamp.generation != seen.stamp.generation:
        refuse(workdir, owner)
  # The token tells locks of one process apart.
  facts = {'host': socket.gethostname(), 'process': os.getpid()}
  content = json.dumps(facts | {'token': secrets.token_hex(8)}).encode()
  generation = _write(store, content, found.stamp.generation)
  if not generation:
    found = store.read(KEY).result()
    if found.value != content:  # or the answer to the first of two requests was lost
      refuse(workdir, owner_in(found.value))
    generation = found.stamp.generation
  return content, generation


def _write(store: Any, content: bytes | None, generation: bytes) -> bytes:
  """Replaces a generation of the lock; returns the new one, empty if it is another."""
  return store.write(KEY, content, if_equal=generation).result().generation


def _store(workdir: Path) -> Any:
  import tensorstore

  bucket, _, prefix = str(workdir).removeprefix('gs://').partition('/')
  spec: Any = {'driver': 'gcs', 'bucket': bucket, 'path': f'{prefix}/'}
  context = tensorstore.Context({'gcs_request_retries': RETRIES})
  return tensorstore.KvStore.open(spec, context=context).result()


def trained_by(workdir: Path) -> str | None:
  """The process that has renewed the lock of a folder lately, or None."""
  path = workdir / KEY
  try:
    owner = owner_in(path.read_bytes())
    stat: Any = path.stat()
  except Exception as error:
    if paths.reason(error):  # also if there is no lock
      return None
    raise
  return str(owner) if owner and time.time() - stat.mtime < PATIENCE_S else None
