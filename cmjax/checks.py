"""Ranges of keywords: each check raises one ValueError that names what is outside."""

from collections.abc import Callable
import math
import operator
from typing import Any

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


def whole(least: int, most: int = MANY, **values: int) -> None:
  """Raises: ValueError for a value that is not whole, or outside [least, most]."""
  inside = f'a whole number from {least:,} to {most:,}'
  _each(values, lambda v: least <= operator.index(v) <= most, inside)


def _each(values: dict[str, Any], holds: Callable[[Any], bool], what: str) -> None:
  for name, value in values.items():
    try:
      fine = holds(value)
    except (TypeError, OverflowError):  # no number, or too large for a float
      fine = False
    if not fine:
      raise ValueError(f'{name} must be {what}, got {value!r}')
