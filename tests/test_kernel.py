"""The kernel distance against sums written out, and its expectation."""

import numpy as np
import pytest

from cmjax.metrics import kernel


def written_out(a, b):
  """The unbiased estimate, pair by pair."""

  def k(x, y):
    return (sum(x * y) / len(x) + 1) ** 3

  within = []
  for x in (a, b):
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
    within.append(np.mean([k(x[i], x[j]) for i, j in pairs]))
  return sum(within) - 2 * np.mean([k(x, y) for x in a for y in b])


def test_squared_mmd_is_the_sum_over_pairs():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(6, 3)), rng.normal(size=(5, 3)) + 1
  # Float64, sums of 30 terms.
  assert kernel.squared_mmd(a, b) == pytest.approx(written_out(a, b), rel=1e-12)


def test_squared_mmd_of_points_has_its_closed_form():
  # k(0, .) = 1 and k(1, 1) = 8: 1 + 8 - 2.
  zeros, ones = np.zeros((3, 4)), np.ones((2, 4))
  assert kernel.squared_mmd(zeros, ones) == 7.0
  assert kernel.squared_mmd(ones, ones) == 0.0


def test_estimate_is_unbiased():
  rng = np.random.default_rng(0)
  values = [kernel.squared_mmd(*rng.normal(size=(2, 10, 4))) for _ in range(400)]
  # Both sets have one distribution. The biased estimate has mean 0.3.
  assert abs(np.mean(values)) < 4 * np.std(values) / 20


def test_distance_is_the_mean_over_subsets_of_that_size():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(7, 3)), rng.normal(size=(6, 3)) + 1
  whole = kernel.kernel_distance(a[:6], b, num_subsets=3, subset_size=6)
  expected = kernel.squared_mmd(a[:6], b)
  assert whole == pytest.approx((expected, 0.0), rel=1e-12, abs=1e-12)
  mean, std = kernel.kernel_distance(a, b, num_subsets=20, subset_size=4)
  assert std > 0
  assert abs(mean - expected) < 3 * std
  again = kernel.kernel_distance(a, b, num_subsets=20, subset_size=4)
  assert again == (mean, std)
  other = kernel.kernel_distance(a, b, num_subsets=20, subset_size=4, seed=1)
  assert other[0] != mean


def test_distance_computes_in_float64_whatever_the_features_are():
  rng = np.random.default_rng(0)
  a, b = rng.integers(0, 9, size=(2, 8, 3)).astype(np.float32)
  exact = kernel.squared_mmd(a.astype(np.float64), b.astype(np.float64))
  assert kernel.squared_mmd(a, b) == exact


@pytest.mark.parametrize(
  ('a', 'b', 'sizes', 'message'),
  [
    ((5, 3), (4, 3), dict(subset_size=5), 'subsets of 5 .* got 5 and 4'),
    ((5, 3), (5, 4), dict(subset_size=5), 'sizes 3 and 4'),
    ((5, 3), (5, 3), dict(subset_size=1), 'subset_size must be'),
    ((5, 3), (5, 3), dict(subset_size=5, num_subsets=0), 'num_subsets must be'),
  ],
)
def test_refused_in_one_line(a, b, sizes, message):
  with pytest.raises(ValueError, match=message):
    kernel.kernel_distance(np.zeros(a), np.zeros(b), **sizes)


def test_features_that_are_not_finite_give_nan():
  a = np.zeros((4, 2))
  a[1] = np.nan
  assert np.isnan(kernel.kernel_distance(a, np.zeros((4, 2)), subset_size=4)[0])
