"""Ranges of keywords: each check raises one ValueError that names what is outside."""

from collections.abc import Callable, Sequence
import math
import operator
import reprlib
from typing import Any

import numpy as np

MANY = 1_000_000  # of what is drawn, counted or stepped through


def finite(**values: float) -> None:
  """Raises: ValueError for a value that is not a finite number."""
  _each(values, math.isfinite, 'a finite number')


def positive(**values: float) -> None:
  """Raises: ValueError for a value that is not finite and above 0."""
  _each(values, lambda v: math.isfinite(v) and v > 0, 'finite and above 0')


def not_negative(**values: float) -> None:
  """Raises: ValueError for a value that is not finite and at least 0."""
  _each(values, lambda v: math.isfinite(v) and v >= 0, 'finite and at least 0')


def share(**values: float) -> None:
  """Raises: ValueError for a value outside [0, 1]."""
  _each(values, lambda v: math.isfinite(v) and 0 <= v <= 1, 'in [0, 1]')


def real(least: float, most: float, **values: float) -> None:
  """Raises: ValueError for a value that is not a number in [least, most)."""

  def inside(v):
    number = isinstance(v, int | float | np.integer | np.floating)
    return number and not isinstance(v, bool) and least <= v < most

  _each(values, inside, f'a number in [{least:g}, {most:g})')


def whole(least: int, most: int = MANY, **values: int) -> None:
  """Raises: ValueError for a value that is not a whole number in [least, most]."""
  inside = f'a whole number in [{least}, {most}]'
  _each(values, lambda v: _is_whole(v, least, most), inside)


def wholes(length: int, least: int, most: int, **values: Sequence[int]) -> None:
  """Raises: ValueError for a value that is not a tuple of at most `length` of those."""

  def inside(v):
    known = isinstance(v, tuple | list) and len(v) <= length
    return known and all(_is_whole(part, least, most) for part in v)

  wanted = f'a tuple of at most {length} whole numbers in [{least}, {most}]'
  _each(values, inside, wanted)


def choice(choices: Sequence[str | bool], **values: str | bool) -> None:
  """Raises: ValueError for a value that is none of the choices."""
  wanted = f'one of {", ".join(map(str, choices))}'
  _each(values, lambda v: isinstance(v, str | bool) and v in choices, wanted)


def _is_whole(value: Any, least: int, most: int) -> bool:
  return not isinstance(value, bool) and least <= operator.index(value) <= most


def _each(values: dict[str, Any], holds: Callable[[Any], bool], what: str) -> None:
  for name, value in values.items():
    try:
      fine = holds(value)
    except (TypeError, OverflowError):  # no number, or too large for a float
      fine = False
    if not fine:
      got = ' '.join(reprlib.repr(value).split())[:80]
      raise ValueError(f'{name} must be {what}, got {got}')
