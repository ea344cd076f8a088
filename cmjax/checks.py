"""Range checks of keyword arguments; an error names the argument and its range."""

from collections.abc import Callable, Sequence
import math
import operator
import reprlib
from typing import Any

import numpy as np

MAX_COUNT = 1_000_000  # default upper bound of counts


def finite(**values: float) -> None:
  """Raises: ValueError if a value is not a finite number."""
  _each(values, math.isfinite, 'a finite number')


def positive(**values: float) -> None:
  """Raises: ValueError if a value is not finite and above 0."""
  _each(values, lambda v: math.isfinite(v) and v > 0, 'finite and above 0')


def not_negative(**values: float) -> None:
  """Raises: ValueError if a value is not finite and at least 0."""
  _each(values, lambda v: math.isfinite(v) and v >= 0, 'finite and at least 0')


def fraction(**values: float) -> None:
  """Raises: ValueError if a value is outside [0, 1]."""
  _each(values, lambda v: math.isfinite(v) and 0 <= v <= 1, 'in [0, 1]')


def real(least: float, most: float, **values: float) -> None:
  """Raises: ValueError if a value is not a number in [least, most)."""

  def inside(v: Any) -> bool:
    number = isinstance(v, int | float | np.integer | np.floating)
    return number and not isinstance(v, bool) and bool(least <= v < most)

  _each(values, inside, f'a number in [{least:g}, {most:g})')


def whole(least: int, most: int = MAX_COUNT, **values: int) -> None:
  """Raises: ValueError if a value is not a whole number in [least, most]."""
  expected = f'a whole number in [{least}, {most}]'
  _each(values, lambda v: _is_whole(v, least, most), expected)


def wholes(length: int, least: int, most: int, **values: Sequence[int]) -> None:
  """Raises: ValueError unless a value is a sequence of whole numbers.

  A tuple or list of at most `length` entries, each in [least, most].
  """

  def inside(v: Any) -> bool:
    short = isinstance(v, tuple | list) and len(v) <= length
    return short and all(_is_whole(part, least, most) for part in v)

  expected = f'a tuple of at most {length} whole numbers in [{least}, {most}]'
  _each(values, inside, expected)


def choice(choices: Sequence[str | bool], **values: str | bool) -> None:
  """Raises: ValueError if a value is not one of the choices."""
  expected = f'one of {", ".join(map(str, choices))}'
  _each(values, lambda v: isinstance(v, str | bool) and v in choices, expected)


def _is_whole(value: Any, least: int, most: int) -> bool:
  return not isinstance(value, bool) and least <= operator.index(value) <= most


def _each(values: dict[str, Any], valid: Callable[[Any], bool], expected: str) -> None:
  for name, value in values.items():
    try:
      passed = valid(value)
    except (TypeError, OverflowError):  # not a number, or too large for a float
      passed = False
    if not passed:
      got = ' '.join(reprlib.repr(value).split())[:80]
      raise ValueError(f'{name} must be {expected}, got {got}')
