"""Reports training steps that hang, from every process that waits."""

import sys
import threading
import time

import jax

LEAST_S = 20.0  # no report earlier; well before jax.distributed ends a silent job
FACTOR = 10.0  # times the longest step: reading metrics waits for all steps dispatched
WARM_UP = 10  # steps: the first are dispatched without waiting, so they seem to be fast


class Watchdog:
  """Reports on stderr a step that takes much longer than all before it, once per step.

  Call `step` at the start of a step, and `pause` before slow work between steps:
  compilation, pictures, evaluation, saving.
  """

  def __init__(self, least_s: float = LEAST_S):
    self._least_s = least_s
    self._longest_s, self._num_steps = 0.0, 0
    self._current: tuple[int, float] | None = None  # step, and when it started
    self._reported: float | None = None  # when the step that was reported started
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def step(self, step: int) -> None:
    """Starts a step, which ends the one before."""
    now = time.monotonic()
    if self._current is not None:
      start = self._current[1]
      self._num_steps += 1
      if start == self._reported:
        _report(f'resumed after {now - start:.0f} s')
      else:  # a hanging step must not raise the limit of later ones
        self._longest_s = max(self._longest_s, now - start)
    self._current = step, now

  def pause(self) -> None:
    """Ends a step without starting another."""
    self._current = None

  def close(self) -> None:
    """Ends the thread."""
    self._closed.set()
    self._thread.join()

  def _watch(self) -> None:
    while not self._closed.wait(self._least_s / 20):
      current = self._current  # read once, as the training thread sets it
      if current is None or self._num_steps < WARM_UP:
        continue
      step, start = current
      seconds = time.monotonic() - start
      limit = max(self._least_s, FACTOR * self._longest_s)
      if seconds > limit and start != self._reported:
        self._reported = start
        _report(
          f'step {step} has taken {seconds:.0f} s, and earlier steps at most '
          f'{self._longest_s:.1f} s; another process, a device or the data may hang'
        )


def _report(text: str) -> None:
  sys.stderr.write(f'cmjax: process {jax.process_index()}: {text}\n')
  sys.stderr.flush()
