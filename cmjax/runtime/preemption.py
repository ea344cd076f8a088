"""Preemption notices: SIGTERM, seen by all processes at the same step."""

import signal
import threading
from types import TracebackType

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):  # noqa: N818, not an error
  """Ends a long computation after a preemption notice."""


class Notice:
  """Records a SIGTERM, which would otherwise end the process, for polling.

  With several processes, a SIGTERM to one of them is enough: `jax.distributed` handles
  the signal, and all processes see the notice at the same poll.
  """

  def __enter__(self) -> 'Notice':
    """Installs the handler; Python allows that in the main thread only."""
    self._given, self._previous, self._polls = False, None, 0
    self._single_process = jax.process_count() == 1
    if self._single_process and threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(signal.SIGTERM, self._record)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    """Restores the previous handler."""
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)

  def _record(self, number: int, frame: object) -> None:
    self._given = True

  def given(self) -> bool:
    """Whether to stop now; all processes must poll equally often."""
    if self._single_process:
      return self._given
    self._polls += 1  # the processes agree on the number of a poll at which to stop
    self._given |= multihost_utils.reached_preemption_sync_point(self._polls)
    return self._given

  def check(self) -> None:
    """Raises Preempted once `given` is true."""
    if self.given():
      raise Preempted
