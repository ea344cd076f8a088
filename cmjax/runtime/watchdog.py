"""Reports training steps that hang and what hangs, and ends those that never return."""

from collections.abc import Iterator
import contextlib
import faulthandler
import os
from pathlib import Path
import sys
import tempfile
import threading
import time
from typing import NamedTuple

import jax

from cmjax.runtime import errors, processes
from cmjax.runtime.records import Watchdog as Settings

FACTOR = 10.0  # times the longest step: reading metrics waits for all steps dispatched
WARM_UP = 10  # steps: the first are dispatched without waiting, so they seem to be fast
PERIOD_S = 5.0  # between writes of a process, at most
# A pause of the thread for longer than this is one of the whole process, such as a stop
# by a signal, which does not count as time in which a step hangs.
AWAKE_S = 5.0


class _Current(NamedTuple):
  step: int
  start: float
  doing: str  # a key of processes.DOING


class Watchdog:
  """Reports on stderr a step that takes much longer than all before it, once per step.

  Call `step` at the start of a step, and `pause` before slow work between steps:
  compilation, pictures, evaluation, saving. A report names what hangs, and in a job of
  several processes which of them; the stacks of all threads follow. A step that hangs
  for longer than `stop_s` ends the process with the code `errors.RETRY`. With several
  processes, creating one is a collective.
  """

  def __init__(self, settings: Settings, workdir: Path):
    self._report_s, self._stop_s = settings.report_s, settings.stop_s
    self._period_s = min(PERIOD_S, self._report_s / 4)
    self._longest_s, self._num_steps, self._last_step = 0.0, 0, 0
    self._current: _Current | None = None
    self._reported: float | None = None  # when the step that was reported started
    self._clock = 0.0, time.monotonic()  # seconds awake, at this time
    self._others = None
    if jax.process_count() > 1:
      self._others = processes.Processes(workdir, self._period_s)
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def step(self, step: int) -> None:
    """Starts a step, which ends the one before."""
    now, current = self._now(), self._current
    if current is not None:
      self._num_steps += 1
      if current.start == self._reported:
        _say(f'resumed after {now - current.start:.0f} s')
      else:  # a hanging step must not raise the limit of later ones
        self._longest_s = max(self._longest_s, now - current.start)
    self._set(_Current(step, now, 'compute'))

  def pause(self) -> None:
    """Ends a step without starting another."""
    self._set(None)

  @contextlib.contextmanager
  def doing(self, what: str, step: int) -> Iterator[None]:
    """What the process does: a key of `processes.DOING`; also before the first step."""
    before = self._current
    start = before.start if before else self._now()
    self._set(_Current(step, start, what))
    yield
    self._set(before and before._replace(doing='compute'))

  def close(self) -> None:
    """Ends the threads."""
    self._closed.set()
    self._thread.join()
    if self._others:
      self._others.close()

  def _set(self, current: _Current | None) -> None:
    self._current = current
    self._last_step = current.step if current else self._last_step
    if self._others:
      self._others.update(self._last_step, current.doing if current else 'pause')

  def _now(self) -> float:
    awake, at = self._clock
    return awake + min(AWAKE_S, time.monotonic() - at)

  def _watch(self) -> None:
    while not self._closed.wait(min(1.0, self._report_s / 20)):
      self._clock = self._now(), time.monotonic()
      if (current := self._current) is not None:  # read once, as another thread sets it
        self._check(current, self._clock[0] - current.start)
      elif self._others:
        self._others.read(False)

  def _check(self, current: _Current, seconds: float) -> None:
    limit = max(self._report_s, FACTOR * self._longest_s)
    if self._num_steps < WARM_UP:
      limit = max(limit, FACTOR * self._report_s)
    readings, ready = [], True
    if self._others:
      self._others.read(seconds > limit - processes.NUM_READS * self._period_s)
      readings = self._others.readings()
      ready = len(readings) == processes.NUM_READS or seconds > limit + self._report_s
    if seconds > limit and ready and current.start != self._reported:
      self._reported = current.start
      self._report(current, seconds, readings)
    stop = self._stop_s and seconds > max(self._stop_s, limit)
    # In a notebook, the user decides. Another process may evaluate for long.
    if stop and not hasattr(sys, 'ps1') and not processes.paused(readings):
      _say(
        f'step {current.step} has taken {seconds:.0f} s, more than '
        f'config.watchdog.stop_s: ends with exit code {errors.RETRY}; the same command '
        'continues from the last checkpoint'
      )
      os._exit(errors.RETRY)  # a normal exit waits for the threads that hang

  def _report(
    self, current: _Current, seconds: float, readings: list[processes.Reading]
  ) -> None:
    mine = processes.Status('', 0, current.step, current.doing)
    if self._others:
      mine = self._others.mine
    cause = processes.diagnosis(jax.process_index(), mine, readings)
    _say(
      f'step {current.step} has taken {seconds:.0f} s, and earlier steps at most '
      f'{self._longest_s:.1f} s: {cause}; its threads:\n{_stacks()}'
    )


def _stacks() -> str:
  """The stack of every other thread, most recent call first."""
  with tempfile.TemporaryFile() as file:  # stderr may have no descriptor
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    threads = file.read().decode(errors='replace').strip().split('\n\n')
  return '\n'.join(text for text in threads if not text.startswith('Current thread'))


def _say(text: str) -> None:
  sys.stderr.write(f'cmjax: process {jax.process_index()}: {text}\n')
  sys.stderr.flush()
