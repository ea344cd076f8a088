"""Precision, recall, density and coverage against brute force and known sets."""

import numpy as np
import pytest

from cmjax.metrics import manifold
from cmjax.metrics.manifold import density_coverage, precision_recall


def whole_numbers(n, seed, shift=0):
  """Features whose distances are exact in float64."""
  rng = np.random.default_rng(seed)
  return rng.integers(-50, 50, size=(n, 3)).astype(np.float32) + np.float32(shift)


def squared(a, b):
  return np.array([[sum((x - y) ** 2) for y in b] for x in a])


def in_balls(points, centres, k):
  """bool[points, centres]: whether a point is in the ball of a centre."""
  radii = np.sort(squared(centres, centres), axis=1)[:, k]
  return squared(points, centres) <= radii


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(manifold, 'BLOCK', 64)


def check_against_brute_force(k):
  a, b = whole_numbers(31, 0, shift=10), whole_numbers(23, 1)
  found = precision_recall(a, b, num_neighbours=k)
  assert found.precision == in_balls(a, b, k).any(1).mean()
  assert found.recall == in_balls(b, a, k).any(1).mean()
  found = density_coverage(a, b, num_neighbours=k)
  inside = in_balls(a, b, k)
  assert found.density == pytest.approx(inside.sum() / (k * len(a)), rel=1e-15)
  assert found.coverage == inside.any(0).mean()
  assert 0 < found.coverage < 1


@pytest.mark.parametrize('k', [1, 3, 5])
def test_all_are_those_of_brute_force(k):
  check_against_brute_force(k)


def test_blocks_do_not_change_the_values(small_blocks):
  check_against_brute_force(3)


def test_identical_sets_are_precise_recalled_and_covered():
  a = whole_numbers(20, 0)
  assert precision_recall(a, a) == (1.0, 1.0)
  found = density_coverage(a, a)
  # Each ball contains its centre and at least the k nearest others.
  assert found.density >= 6 / 5
  assert found.coverage == 1.0


def test_distant_sets_are_none_of_it():
  a, b = whole_numbers(20, 0), whole_numbers(20, 1, shift=10_000)
  assert precision_recall(a, b) == (0.0, 0.0)
  assert density_coverage(a, b) == (0.0, 0.0)


def test_one_mode_of_two_is_precise_and_half_recalled():
  near, far = whole_numbers(20, 0), whole_numbers(20, 1, shift=10_000)
  found = precision_recall(near, np.concatenate([near, far]))
  assert found == (1.0, 0.5)
  assert precision_recall(np.concatenate([near, far]), near) == (0.5, 1.0)
  assert density_coverage(near, np.concatenate([near, far])).coverage == 0.5


@pytest.mark.parametrize('measure', [precision_recall, density_coverage])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_feature_that_is_not_finite_is_not_hidden(measure, value):
  a, b = whole_numbers(20, 0), whole_numbers(20, 1)
  bad = a.copy()
  bad[3, 1] = value
  assert np.all(np.isfinite(measure(a, b)))
  assert np.all(np.isnan(measure(bad, b)))
  assert np.all(np.isnan(measure(a, bad)))


@pytest.mark.parametrize('measure', [precision_recall, density_coverage])
@pytest.mark.parametrize(
  ('a', 'b', 'k', 'message'),
  [
    ((3, 2), (9, 2), 3, 'at least 4 samples and examples, got 3 and 9'),
    ((9, 2), (3, 2), 3, 'at least 4 samples and examples, got 9 and 3'),
    ((9, 2), (9, 3), 3, 'sizes 2 and 3'),
    ((9, 2), (9, 2), 0, 'num_neighbours must be'),
  ],
)
def test_refused_in_one_line(measure, a, b, k, message):
  with pytest.raises(ValueError, match=message):
    measure(np.zeros(a), np.zeros(b), num_neighbours=k)
