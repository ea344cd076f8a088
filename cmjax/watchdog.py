"""The notice that training stands still: a line from every process that waits."""

import sys
import threading
import time

import jax

LEAST_S = 20.0  # well before jax.distributed ends a job whose processes are silent
TIMES = 10.0  # a report waits for all steps that were dispatched ahead
SEEN = 10  # the first steps are dispatched and not waited for, and take no time


class Watchdog:
  """Reports on stderr a step that takes far longer than those before it, once each.

  Call `step` where a step begins, and `rest` before what is not a step and may take
  long: compilation, pictures, evaluation, saving.
  """

  def __init__(self, least_s: float = LEAST_S):
    self._least_s = least_s
    self._longest, self._seen = 0.0, 0
    self._begun = None  # the step under way and since when
    self._late = None  # since when, of a step that was reported
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def step(self, step: int) -> None:
    """The step before, if any, has ended, and this one begins."""
    now = time.monotonic()
    if self._begun is not None:
      took = now - self._begun[1]
      self._seen += 1
      if self._begun[1] == self._late:
        _say(f'went on after {took:.0f} s')
      else:  # an interruption must not count as how long a step may take
        self._longest = max(self._longest, took)
    self._begun = step, now

  def rest(self) -> None:
    """What follows is not a step."""
    self._begun = None

  def close(self) -> None:
    """Ends the thread."""
    self._closed.set()
    self._thread.join()

  def _watch(self) -> None:
    while not self._closed.wait(self._least_s / 20):
      begun = self._begun  # read once: the training thread sets it
      if begun is None or self._seen < SEEN:
        continue
      step, since = begun
      took = time.monotonic() - since
      if took > max(self._least_s, TIMES * self._longest) and since != self._late:
        self._late = since
        _say(
          f'step {step} has taken {took:.0f} s, and those before at most '
          f'{self._longest:.1f} s; another process, a device or the data does not '
          'answer'
        )


def _say(text: str) -> None:
  sys.stderr.write(f'cmjax: process {jax.process_index()}: {text}\n')
  sys.stderr.flush()
