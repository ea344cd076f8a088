"""Metrics of training steps: their means, and whether training has failed."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import math
import time
from typing import Any

import jax

from cmjax.core import Array
from cmjax.runtime.renamed import METRICS

MAX_RISE = 1e4  # of the loss over a run; schedules of the gap change it far less


class Window:
  """The metrics since the last report, on the device until they are needed.

  `saved` is the `partial` window of a checkpoint: a run that resumes from it averages
  its next row over as many steps as without the interruption.
  """

  def __init__(self, saved: Mapping[str, Any] | None = None):
    saved = saved or {}
    sums: dict[str, float] = saved.get('sums', {})
    self._rows: list[dict[str, Array]] = []
    self._num_steps: int = saved.get('steps', 0)
    self._sums = {METRICS.get(name, name): total for name, total in sums.items()}
    self._skipped: list[int] = list(saved.get('skipped', ()))  # positions in the window
    self.restart_clock()

  def add(self, metrics: dict[str, Array]) -> None:
    """Adds the metrics of a step."""
    self._rows.append(metrics)
    self._num_timed += 1

  @contextlib.contextmanager
  def waiting_for_data(self) -> Iterator[None]:
    """Counts the time within as one of waiting for the next batch."""
    start = time.monotonic()
    yield
    self._data_s += time.monotonic() - start

  def restart_clock(self) -> None:
    """Excludes the time and the steps so far from images_per_s and data_wait."""
    self._start, self._num_timed, self._data_s = time.monotonic(), 0, 0.0

  def partial(self) -> dict[str, Any]:
    """The state of an unfinished window, for JSON."""
    self._fetch()
    return {'steps': self._num_steps, 'sums': self._sums, 'skipped': self._skipped}

  def close(self, step: int, batch_size: int) -> tuple[list[int], dict[str, float]]:
    """Skipped steps and mean metrics up to `step`, with speeds; empties the window.

    `images_per_s`, and `data_wait`: the fraction of the time in which this process
    waited for the next batch.
    """
    self._fetch()
    seconds = time.monotonic() - self._start
    means = {name: total / self._num_steps for name, total in self._sums.items()}
    if self._num_timed:
      means['images_per_s'] = self._num_timed * batch_size / seconds
      means['data_wait'] = self._data_s / seconds
    first = step - self._num_steps + 1
    skipped = [first + i for i in self._skipped]
    self._num_steps, self._sums, self._skipped = 0, {}, []
    self.restart_clock()
    return skipped, means

  def _fetch(self) -> None:
    """Adds the rows to the sums."""
    for row in jax.device_get(self._rows):
      if row.pop('skipped') > 0:
        self._skipped.append(self._num_steps)
      for name, value in row.items():
        self._sums[name] = self._sums.get(name, 0.0) + float(value)
      self._num_steps += 1
    self._rows = []


def check_skipped(skipped: Sequence[int], limit: int, seed: int) -> None:
  """Raises FloatingPointError if more steps were skipped than the limit."""
  if len(skipped) > limit:
    raise FloatingPointError(
      f'config.max_skipped_steps: {len(skipped)} steps were skipped, as loss, gradient '
      f'or update was not finite, the last at batch {skipped[-1] - 1} of config.seed '
      f'{seed}; start a new --workdir from this one with --config.init_from, and a '
      'lower learning rate or config.grad_clip_norm'
    )


def check_learned(
  losses: Sequence[float], skipped: Sequence[int], num_steps: int
) -> None:
  """Raises FloatingPointError if all steps were skipped, or the loss diverged."""
  if num_steps and len(skipped) == num_steps:
    raise FloatingPointError(
      f'all {num_steps} steps were skipped, as loss, gradient or update was not '
      'finite; lower the learning rate, or check the data'
    )
  finite = [loss for loss in losses if math.isfinite(loss)]  # not if a step was skipped
  if finite and finite[-1] > MAX_RISE * max(abs(finite[0]), 1.0):
    raise FloatingPointError(
      f'the loss rose from {finite[0]:.4g} to {finite[-1]:.4g}: the run diverged; '
      'start again in a new --workdir with a lower learning rate, or with '
      'config.grad_clip_norm'
    )
