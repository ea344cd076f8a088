"""Searches for the noise levels of a sampler: one level at a time, by any measure."""

from collections.abc import Callable
import math
from typing import NamedTuple

from cmjax import checks

GOLDEN = (math.sqrt(5) - 1) / 2


class Searched(NamedTuple):
  """The minimum that a search has found, and all that it evaluated."""

  best: float
  value: float
  curve: list[tuple[float, float]]  # (x, value), ascending in x


def golden_section(
  value: Callable[[float], float],
  low: float,
  high: float,
  *,
  tolerance: float = 0.02,
  max_evaluations: int = 15,
  log: bool = False,
) -> Searched:
  """Minimises a function with one minimum in [low, high], each point evaluated once.

  Golden section with parabolic steps where the last three best points allow one. Ends
  when the minimum is known within `tolerance`, or after `max_evaluations`. A value that
  is NaN counts as infinity, in the curve too.

  Args:
    value: the function; costly, and not differentiable.
    low: left end; not evaluated.
    high: right end; not evaluated.
    tolerance: of x; relative if `log`.
    max_evaluations: the largest number of evaluations.
    log: whether to search in ln x.

  Raises: ValueError unless low < high are finite (with `log`, positive), tolerance > 0
    and max_evaluations >= 3.

  Source: Brent 1973, chapter 5. Song et al. 2023, section 3, use ternary search.
  """
  (checks.positive if log else checks.finite)(low=low, high=high)
  checks.positive(tolerance=tolerance)
  checks.whole(3, max_evaluations=max_evaluations)
  if low >= high:
    raise ValueError(f'needs low < high, got {low=}, {high=}')
  to, back = (math.log, math.exp) if log else (float, float)
  a, b = to(low), to(high)
  found: dict[float, float] = {}  # by position, to(x)

  def at(u: float) -> float:
    if u not in found:
      y = float(value(back(u)))
      found[u] = math.inf if math.isnan(y) else y
    return found[u]

  at(b - GOLDEN * (b - a))
  at(a + GOLDEN * (b - a))
  widths = [math.inf, math.inf]  # of the bracket, after each evaluation
  while len(found) < max_evaluations:
    best = min(found, key=lambda u: (found[u], u))
    left = max((u for u in found if u < best), default=a)
    right = min((u for u in found if u > best), default=b)
    if max(best - left, right - best) <= tolerance:
      break
    far = right if right - best > best - left else left
    u = _vertex(best, found)
    slow = right - left > widths[-2] / 2
    if slow or not left < u < right:
      u = best + (1 - GOLDEN) * (far - best)
    elif abs(u - best) < tolerance / 2:  # the minimum is known; confirm it
      u = best + math.copysign(tolerance / 2, far - best)
    widths.append(right - left)
    at(u)
  best = min(found, key=lambda u: (found[u], u))
  curve = [(back(u), found[u]) for u in sorted(found)]
  return Searched(back(best), found[best], curve)


def _vertex(best: float, found: dict[float, float]) -> float:
  """The extremum of the parabola through the three best points, or NaN."""
  points = sorted(found, key=lambda u: (found[u], u))[:3]
  y = [found[u] for u in points]
  if len(points) < 3 or not all(map(math.isfinite, y)):
    return math.nan
  p, q = (best - points[1]) * (y[0] - y[2]), (best - points[2]) * (y[0] - y[1])
  if p == q:
    return math.nan
  return best - ((best - points[1]) * p - (best - points[2]) * q) / (2 * (p - q))


class Times(NamedTuple):
  """The best noise levels that a greedy search has found for a number of steps."""

  sigmas: tuple[float, ...]  # descending, one per step
  value: float
  curve: list[tuple[float, float]]  # (last sigma, value), ascending in sigma


def greedy_times(
  value: Callable[[tuple[float, ...]], float],
  num_steps: int,
  sigma_max: float,
  sigma_min: float,
  *,
  tolerance: float = 0.02,
  max_evaluations: int = 15,
) -> list[Times]:
  """The best noise levels of multistep sampling for 1, 2, ..., num_steps steps.

  Each number of steps keeps the levels of the one before and adds one, between the last
  of them and sigma_min, by `golden_section` in ln sigma. More steps may be worse; there
  are fewer than num_steps if the last level is sigma_min within the tolerance.

  Args:
    value: of descending noise levels, to minimise, such as a Frechet distance.
    num_steps: the largest number of steps.
    sigma_max: the first noise level of all.
    sigma_min: lower end of the search.
    tolerance: relative, of each level.
    max_evaluations: the largest number of evaluations per level.

  Raises: ValueError unless num_steps >= 1 and 0 < sigma_min < sigma_max, or as for
    `golden_section`.

  Source: Song et al. 2023, section 3.
  Differs: golden section with parabolic steps on real numbers; ternary search of the
    indices of a grid, as released, takes more than twice the evaluations.
  """
  checks.whole(1, 1_000, num_steps=num_steps)
  checks.positive(sigma_max=sigma_max, sigma_min=sigma_min, tolerance=tolerance)
  if sigma_min >= sigma_max:
    raise ValueError(f'needs sigma_min < sigma_max, got {sigma_min=}, {sigma_max=}')
  first = float(value((sigma_max,)))
  first = math.inf if math.isnan(first) else first
  best = [Times((sigma_max,), first, [(sigma_max, first)])]
  for _ in range(num_steps - 1):
    before = best[-1].sigmas
    if before[-1] / sigma_min <= 1 + tolerance:
      break
    searched = golden_section(
      lambda sigma, before=before: value((*before, sigma)),
      sigma_min,
      before[-1],
      tolerance=tolerance,
      max_evaluations=max_evaluations,
      log=True,
    )
    best.append(Times((*before, searched.best), searched.value, searched.curve))
  return best
