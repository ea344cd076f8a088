"""Reads `metrics.jsonl`, thins its curves for a plot, and smooths them."""

from collections.abc import Iterable, Iterator, Mapping
import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CHUNK = 5_000  # rows that are held as Python objects at a time
_NUMBERS = {float, type(None)}  # integers are read as floats


class Series(NamedTuple):
  """The values f64[N] of a metric at steps f64[N]; NaN where it was not finite."""

  steps: np.ndarray
  values: np.ndarray


class Metrics(NamedTuple):
  """What a run has logged, by the names of `metrics.jsonl`."""

  series: dict[str, Series]
  num_rows: int
  num_damaged: int  # rows that cannot be read, apart from a last row that is cut short


def read_metrics(path: Path) -> Metrics:
  """The rows of a file, which may be growing; none if it does not exist."""
  parts: dict[str, list[Series]] = {}
  num_rows = num_damaged = 0
  if path.is_file():
    with path.open('rb') as file:
      for lines in _chunks(_until_cut(file)):
        rows = _rows(lines)
        ended = sum(line.endswith(b'\n') and bool(line.strip()) for line in lines)
        num_rows += len(rows)
        num_damaged += max(0, ended - len(rows))
        by_keys: dict[tuple[str, ...], list[Any]] = {}
        for row in rows:
          by_keys.setdefault(tuple(row), []).append(tuple(row.values()))
        for keys, values in by_keys.items():
          columns = np.array(values, np.float64).T  # None becomes NaN
          steps = columns[keys.index('step')]
          for key, column in zip(keys, columns):
            if key != 'step':
              parts.setdefault(key, []).append(Series(steps, column))
  return Metrics({k: _joined(p) for k, p in parts.items()}, num_rows, num_damaged)


def _until_cut(lines: Iterable[bytes]) -> Iterator[bytes]:
  """Lines up to one without an end, whose rest may be written while it is read."""
  for line in lines:
    yield line
    if not line.endswith(b'\n'):
      return


def _chunks(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
  while chunk := list(itertools.islice(lines, CHUNK)):
    yield chunk


def _rows(lines: list[bytes]) -> list[dict[str, Any]]:
  """The lines that are rows of numbers with a step; quick if all are."""
  try:
    rows = json.loads(b'[%s]' % b','.join(lines), parse_int=float)
    if all(map(_is_row, rows)):
      return rows
  except (ValueError, RecursionError):
    pass
  rows = []
  for line in lines:
    try:
      row = json.loads(line, parse_int=float)
    except (ValueError, RecursionError):
      continue
    if _is_row(row):
      rows.append(row)
  return rows


def _is_row(row: Any) -> bool:
  return (
    isinstance(row, dict)
    and {type(value) for value in row.values()} <= _NUMBERS
    and (row.get('step') or math.nan).is_integer()  # of step 0 there is no row
  )


def _joined(parts: list[Series]) -> Series:
  """Series one after the other, in the order of their steps."""
  steps, values = (np.concatenate(column) for column in zip(*parts))
  order = np.argsort(steps, kind='stable')
  return Series(steps[order], np.where(np.isfinite(values), values, np.nan)[order])


def thinned(series: Series, most: int = 400) -> Series:
  """At most about `most` points: first, last, extremes and a gap of each stretch."""
  num = len(series.steps)
  if num <= most:
    return series
  kept = [np.array([0, num - 1])]
  for index in np.array_split(np.arange(num), most // 3):
    values = series.values[index]
    missing = np.isnan(values)
    if not missing.all():
      kept.append(index[[np.nanargmin(values), np.nanargmax(values)]])
    kept.append(index[missing][:1])
  index = np.unique(np.concatenate(kept))
  return Series(series.steps[index], series.values[index])


class Smoothed(NamedTuple):
  """A running mean, and over what."""

  series: Series
  num_rows: int  # of `metrics.jsonl` in the window
  num_steps: float  # of training in the window


def smoothed(series: Series, most: int = 200) -> Smoothed | None:
  """A running mean over about a fortieth of the rows; None if there are too few.

  Values that are missing are left out. Where a window has none, the mean is NaN.
  """
  num = len(series.steps)
  if num < 20:
    return None
  size = max(1, num // most)  # rows in a bin
  starts = np.arange(0, num, size)
  present = np.isfinite(series.values)
  sums = np.add.reduceat(np.where(present, series.values, 0.0), starts)
  counts = np.add.reduceat(present.astype(float), starts)
  steps = np.add.reduceat(series.steps, starts) / np.diff(np.append(starts, num))
  half = max(1, round(len(starts) / 80))
  width = 2 * half + 1
  total, count = (
    np.lib.stride_tricks.sliding_window_view(np.pad(a, half), width).sum(axis=-1)
    for a in (sums, counts)
  )
  mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
  apart = (series.steps[-1] - series.steps[0]) / (num - 1)
  return Smoothed(Series(steps, mean), width * size, width * size * apart)


def skipped_at(series: Mapping[str, Series]) -> np.ndarray:
  """The steps of the rows in which the count `skipped_steps` rises."""
  if 'skipped_steps' not in series:
    return np.zeros(0)
  steps, counts = series['skipped_steps']
  return steps[np.diff(counts, prepend=0.0) > 0]
