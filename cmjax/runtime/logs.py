"""Metrics, tables and progress: clu, tqdm.

Libraries that are slow to import are imported where they are used.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import json
import math
from pathlib import Path
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm

from cmjax.runtime import paths, results
from cmjax.runtime.row_file import RowFile


def say(text: str) -> None:
  """Prints a line from the first process, above the progress bar if there is one."""
  if jax.process_index() != 0:
    return
  tqdm.tqdm.write(text, file=sys.stdout)
  sys.stdout.flush()


# Called with (step, values by name): scalars, and pictures as u8[H, W, 3].
Send = Callable[[int, Mapping[str, float | np.ndarray]], None]


class RunLog:
  """Writes `metrics.jsonl` and pictures, and hands them to `send`, if `primary`.

  Rows of `metrics.jsonl` after step `start` are dropped, as those steps are repeated,
  and so is a last row that a kill cut short. Other rows that cannot be read are dropped
  with a message.
  """

  def __init__(
    self, workdir: str | Path, primary: bool, start: int, send: Send | None = None
  ):
    self._workdir = paths.path(workdir)
    self._primary = primary
    self._send = send or (lambda step, values: None)
    if primary:
      path = self._workdir / 'metrics.jsonl'
      _drop_rows_after(path, start)
      self._rows = RowFile(path)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Adds a row; in JSON, values that are not finite are null."""
    if not self._primary:
      return
    row = {k: v if math.isfinite(v) else None for k, v in values.items()}
    self._rows.add(json.dumps({'step': step} | row))
    self._send(step, values)

  def picture(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes u8[H, W, 3] to `pictures/NAME_STEP.png`."""
    if not self._primary:
      return
    results.write_png(self._workdir / 'pictures' / f'{name}_{step:08d}.png', image)
    self._send(step, {name: image})

  def picture_once(self, name: str, image: Callable[[], np.ndarray]) -> None:
    """Writes u8[H, W, 3] to `pictures/NAME.png`, unless it exists."""
    path = self._workdir / 'pictures' / f'{name}.png'
    if self._primary and not path.exists():
      results.write_png(path, image())

  def flush(self) -> None:
    """Stores all rows, also in a bucket, where they are stored every few seconds."""
    if self._primary:
      self._rows.flush()

  def close(self) -> None:
    """Stores all rows, and closes the file."""
    if self._primary:
      self._rows.close()


def _drop_rows_after(path: Path, step: int) -> None:
  if not path.exists():
    return
  rows = [(line, _step_of(line)) for line in path.read_bytes().split(b'\n')]
  # A kill may cut the last line short, which does not count as damage.
  damaged = sum(at == math.inf and bool(line.strip()) for line, at in rows[:-1])
  if damaged:
    say(f'{path}: dropped {damaged} row(s) that cannot be read')
  paths.write_bytes(path, b''.join(line + b'\n' for line, at in rows if at <= step))


def _step_of(line: bytes) -> float:
  """The step of a row of `metrics.jsonl`; infinity if the line cannot be read."""
  try:
    step = json.loads(line.decode('utf-8'))['step']
  except (ValueError, TypeError, LookupError, RecursionError):
    return math.inf
  return step if type(step) is int else math.inf


class Progress:
  """A progress bar on a terminal; otherwise one line per report."""

  def __init__(self, start: int, total: int):
    self._total = total
    self._start = time.monotonic(), start
    terminal = sys.stderr.isatty() and jax.process_index() == 0
    self._bar = (
      tqdm.tqdm(total=total, initial=start, unit='step', dynamic_ncols=True)
      if terminal
      else None
    )

  def restart(self, step: int) -> None:
    """Estimates the remaining time from the steps after this one only."""
    self._start = time.monotonic(), step
    if self._bar is not None:
      self._bar.unpause()

  def advance(self) -> None:
    """Counts one more step as dispatched."""
    if self._bar is not None:
      self._bar.update()

  def report(self, step: int, values: Mapping[str, float]) -> None:
    """Shows the latest values, and without a bar also the remaining time."""
    text = ' '.join(f'{k}={v:.4g}' for k, v in values.items())
    if self._bar is not None:
      self._bar.set_postfix_str(text)
      return
    seconds, steps = time.monotonic() - self._start[0], step - self._start[1]
    left = f'{(self._total - step) * seconds / steps:.0f}s' if steps else '?'
    say(f'step {step}/{self._total} {text} left={left}')

  def close(self) -> None:
    """Closes the bar, which stays on the terminal."""
    if self._bar is not None:
      self._bar.close()


REPORT_S = 10.0  # seconds between the lines of `counted`


def counted(parts: Sequence[Any], size: int, unit: str) -> Iterator[Any]:
  """Yields the parts, of `size` units each, with a bar or a line per `REPORT_S`."""
  total, terminal = len(parts) * size, sys.stderr.isatty()
  if terminal and jax.process_index() == 0:
    with tqdm.tqdm(total=total, unit=unit, leave=False, dynamic_ncols=True) as bar:
      for part in parts:
        yield part
        bar.update(size)
    return
  start = last_report = time.monotonic()
  for done, part in enumerate(parts):
    now = time.monotonic()
    if done and now - last_report > REPORT_S:
      left, last_report = (now - start) / done * (len(parts) - done), now
      say(f'{done * size}/{total} {unit} left={left:.0f}s')
    yield part


def number(value: float) -> str:
  """Text of a number: integers in full, others to three significant digits."""
  whole = math.isfinite(value) and value == int(value) and abs(value) < 1e9
  return str(int(value)) if whole else f'{value:.3g}'


def parameter_table(params: Any) -> str:
  """The shape and size of each parameter, and the total."""
  from clu import parameter_overview

  return parameter_overview.get_parameter_overview(params, include_stats=False)


def digits(value: float) -> str:
  """The format of a number: three decimals, or three digits if that shows none."""
  return '.3g' if 0 < abs(value) < 0.01 else '.3f'


def markdown_table(rows: list[dict[str, Any]]) -> str:
  """Rows with the same keys as a Markdown table; floats are in `digits`."""

  def cell(value):
    return format(value, digits(value)) if isinstance(value, float) else str(value)

  columns = list(rows[0])
  lines = [
    columns,
    ['---'] * len(columns),
    *([cell(row[name]) for name in columns] for row in rows),
  ]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
