"""The notice that a machine is about to be taken away: SIGTERM, at one step of all."""

import signal
import threading
from types import TracebackType

import jax
from jax.experimental import multihost_utils


class Stop(Exception):  # noqa: N818, not an error
  """What takes long is to end now, because a notice has come."""


class Notice:
  """Keeps a SIGTERM until the loop asks for it, where it would have ended the process.

  With several processes one SIGTERM is enough: `jax.distributed` has a handler of its
  own, and all see the notice at the same place.
  """

  def __enter__(self) -> 'Notice':
    """Listens; only the main thread can."""
    self._given, self._before, self._asked = False, None, 0
    self._alone = jax.process_count() == 1
    if self._alone and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    """SIGTERM does again what it did before."""
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _note(self, number: int, frame: object) -> None:
    self._given = True

  def given(self) -> bool:
    """Whether to stop now; every process must ask as often, at the same places."""
    if self._alone:
      return self._given
    self._asked += 1  # agreed on by all as the place to stop
    self._given |= multihost_utils.reached_preemption_sync_point(self._asked)
    return self._given

  def check(self) -> None:
    """Raises Stop where `given` is true."""
    if self.given():
      raise Stop
