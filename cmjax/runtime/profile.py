"""A trace of training steps, for TensorBoard's profile plugin and for Perfetto."""

from collections.abc import Callable, Iterator
import itertools
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax

from cmjax.core import UserError, first_line
from cmjax.runtime import errors, logs, paths

Step = TypeVar('Step', bound=tuple)  # (step, state, metrics)


class Span(NamedTuple):
  """The first and the last step of a trace."""

  first: int
  last: int


def check(span: Span | None, start: int, total: int) -> None:
  """Raises UserError unless all steps of a span are trained after step `start`."""
  if span is None or start < span.first <= span.last <= total:
    return
  steps = f'steps {start + 1} to {total}' if start < total else 'no step'
  raise UserError(f'--profile={span.first}:{span.last}: this start trains {steps}')


class Trace:
  """Traces the steps of a span; without a span, nothing.

  The files are in `tensorboard/plugins/profile` of the work directory; with several
  processes, in `tensorboard/process_I/plugins/profile`, as their names may be equal.
  Those of a run in a bucket are written into a local folder, and copied.
  """

  def __init__(self, workdir: Path, span: Span | None):
    name = 'tensorboard'
    if jax.process_count() > 1:
      name += f'/process_{jax.process_index()}'
    self._target, self._folder = workdir / name, paths.staging(workdir) / name
    self._span = span
    self._active = False

  def around(
    self, steps: Iterator[Step], start: int, interrupt: Callable[[], None]
  ) -> Iterator[Step]:
    """The steps after `start`; calls `interrupt` when the trace starts."""
    return steps if self._span is None else self._traced(steps, start, interrupt)

  def _traced(
    self, steps: Iterator[Step], start: int, interrupt: Callable[[], None]
  ) -> Iterator[Step]:
    assert self._span is not None
    item = None
    for number in itertools.count(start + 1):
      if number == self._span.first:
        jax.block_until_ready(item)  # a trace has no step before its first
        self._start()
        interrupt()
      if self._active:
        with jax.profiler.StepTraceAnnotation('train', step_num=number):
          item = next(steps, None)
      else:
        item = next(steps, None)
      if item is None:
        return
      yield item

  def end(self, step: int, metrics: object, interrupt: Callable[[], None]) -> None:
    """Writes the trace after its last step; calls `interrupt` before and after."""
    if self._active and self._span is not None and step == self._span.last:
      interrupt()
      jax.block_until_ready(metrics)
      self.close()
      interrupt()

  def _start(self) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python would fill the trace
    try:
      jax.profiler.start_trace(
        self._folder, create_perfetto_trace=True, profiler_options=options
      )
    except Exception as error:  # such as another trace that is running
      errors.say(f'--profile: no trace ({first_line(error)})')
    else:
      self._active = True

  def close(self) -> None:
    """Writes a trace that has been started, also if it was cut short."""
    if not self._active:
      return
    self._active = False
    try:
      jax.profiler.stop_trace()
      if self._target != self._folder:
        name = 'plugins'  # not the events of trackers
        paths.upload(self._folder / name, self._target / name, {})
    except Exception as error:  # training is worth more than its trace
      errors.say(f'--profile: the trace is not written ({first_line(error)})')
    else:
      logs.say(f'trace: {self._target}/plugins/profile')
