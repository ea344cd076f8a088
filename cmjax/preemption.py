"""The notice that a machine is about to be taken away: SIGTERM, at one step of all."""

import signal
import threading
from types import TracebackType

import jax
from jax.experimental import multihost_utils


class Notice:
  """Keeps a SIGTERM until a step asks for it, where it would have ended the process.

  With several processes it is enough that one is told: `jax.distributed` has a handler
  of its own, and all see the notice at the same step.
  """

  def __enter__(self) -> 'Notice':
    """Listens; only the main thread can."""
    self._told, self._before = False, None
    self._alone = jax.process_count() == 1
    if self._alone and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._tell)
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

  def _tell(self, number: int, frame: object) -> None:
    self._told = True

  def given(self, step: int) -> bool:
    """Whether to stop after this step; every process must ask at every step."""
    if self._alone:
      return self._told
    return multihost_utils.reached_preemption_sync_point(step)
