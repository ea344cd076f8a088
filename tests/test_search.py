"""Searches against minima that are known."""

import functools
import math

import jax
import numpy as np
import pytest

from cmjax import samplers
from cmjax.search import golden_section, greedy_times

LOW, HIGH = 0.002, 80.0
# Functions of ln(x / best): symmetric, with a corner, flat, skewed, nearly constant.
SHAPES = {
  'parabola': lambda u: u**2,
  'corner': abs,
  'quartic': lambda u: u**4,
  'steep above': lambda u: math.exp(u) - u,
  'steep below': lambda u: math.exp(-2 * u) + 2 * u,
  'bounded': lambda u: -1 / (1 + u**2),
  'narrow': lambda u: -math.exp(-2 * u**2),
}


@pytest.mark.parametrize('shape', SHAPES)
def test_best_sigma_is_found_within_two_per_cent_in_fifteen_evaluations(shape):
  for best in np.geomspace(0.004, 40.0, 25):
    seen = []

    def value(x, best=best, seen=seen):
      seen.append(x)
      return SHAPES[shape](math.log(x / best))

    found = golden_section(value, LOW, HIGH, log=True)
    assert len(seen) <= 15
    assert abs(found.best / best - 1) < 0.02
    assert found.value == SHAPES[shape](math.log(found.best / best))
    assert [x for x, _ in found.curve] == sorted(set(seen))  # each of them once


def test_search_without_logarithm_finds_the_minimum_of_a_parabola():
  found = golden_section(lambda x: (x - 0.7) ** 2 + 3, -2.0, 5.0, tolerance=1e-3)
  assert abs(found.best - 0.7) < 1e-3
  assert len(found.curve) < 10  # exact after one parabola


def test_values_that_are_nan_count_as_infinite():
  def value(x):
    return math.nan if x > 1.0 else (math.log(x / 0.3)) ** 2

  found = golden_section(value, LOW, HIGH, log=True)
  assert abs(found.best / 0.3 - 1) < 0.02
  assert found.curve[-1][1] == math.inf
  assert not any(math.isnan(y) for _, y in found.curve)
  lost = golden_section(lambda x: math.nan, LOW, HIGH, log=True)
  assert lost.value == math.inf
  assert len(lost.curve) <= 15


def test_evaluations_end_at_their_limit_or_at_the_tolerance():
  sharp = golden_section(abs, -1.0, 1.3, tolerance=1e-12, max_evaluations=7)
  assert len(sharp.curve) == 7
  wide = golden_section(abs, -1.0, 1.3, tolerance=0.5)
  assert len(wide.curve) < 6
  assert abs(wide.best) < 0.5


# A consistency function of N(0, STD^2 I) with too little variance, the more so the
# larger sigma is: f(x, sigma) = shrink(sigma) x. Samples stay Gaussian.
STD, DIM = 0.5, 2


def shrink(sigma):
  exact = STD / (STD**2 + sigma**2) ** 0.5
  return exact * (1 - 0.3 * sigma**3 / (8 + sigma**3) - 0.004)


def frechet(sigmas):
  """Frechet distance of multistep sampling to the data, in closed form."""
  variance = 0.0
  for sigma in sigmas:
    variance = shrink(sigma) ** 2 * (variance + sigma**2)
  return DIM * (variance**0.5 - STD) ** 2


def dense_best(before):
  sigmas = np.geomspace(LOW, before[-1], 200_001)
  return sigmas[np.argmin(frechet((*before, sigmas)))]


def test_frechet_distance_is_that_of_the_sampler():
  def f(params, x, sigma, cond, *, key=None):
    return jax.vmap(lambda s: shrink(s))(sigma)[:, None] * x

  keys = jax.random.split(jax.random.key(0), 40_000)
  sampler = samplers.multistep(sigmas=(HIGH, 1.0, 0.3))
  x = np.asarray(sampler(f, None, keys, None, (DIM,)).x, np.float64)
  # The standard deviation of a deviation from 80,000 numbers is 0.25 per cent.
  expected = STD - (frechet((HIGH, 1.0, 0.3)) / DIM) ** 0.5
  np.testing.assert_allclose(x.std(), expected, rtol=0.01)


def test_greedy_search_finds_the_best_intermediate_levels():
  count = functools.lru_cache(maxsize=None)(frechet)
  found = greedy_times(count, 3, HIGH, LOW)
  assert [len(times.sigmas) for times in found] == [1, 2, 3]
  assert found[0].sigmas == (HIGH,)
  assert count.cache_info().hits == 0
  for times in found[1:]:
    best = dense_best(times.sigmas[:-1])
    assert 10 * LOW < best < 0.9 * times.sigmas[-2]  # not at an end
    assert abs(times.sigmas[-1] / best - 1) < 0.02
    assert len(times.curve) <= 15
    assert times.value == frechet(times.sigmas)
  assert found[2].value < found[1].value < found[0].value


def test_greedy_search_ends_where_no_level_is_left():
  found = greedy_times(lambda sigmas: sigmas[-1], 5, 0.1, 0.09)  # lower is better
  assert 2 <= len(found) < 5
  assert all(0.09 < times.sigmas[-1] <= 0.1 for times in found)
  assert math.isinf(greedy_times(lambda sigmas: math.nan, 1, 1.0, 0.1)[0].value)


INVALID = {
  'reversed': (lambda: golden_section(abs, 1.0, 0.0), 'low < high'),
  'zero in ln': (lambda: golden_section(abs, 0.0, 1.0, log=True), 'low must be'),
  'infinite': (lambda: golden_section(abs, 0.0, math.inf), 'high must be'),
  'tolerance': (lambda: golden_section(abs, 0.0, 1.0, tolerance=0.0), 'tolerance must'),
  'few': (lambda: golden_section(abs, 0.0, 1.0, max_evaluations=2), 'max_evaluations'),
  'no step': (lambda: greedy_times(sum, 0, 80.0, 0.002), 'num_steps must be'),
  'ends': (lambda: greedy_times(sum, 2, 1.0, 1.0), 'sigma_min < sigma_max'),
  'zero': (lambda: greedy_times(sum, 2, 1.0, 0.0), 'sigma_min must be'),
}


@pytest.mark.parametrize('name', INVALID)
def test_invalid_values_are_refused(name):
  call, match = INVALID[name]
  with pytest.raises(ValueError, match=match) as error:
    call()
  assert '\n' not in str(error.value)
