"""The Frechet distance against closed forms."""

import functools

import numpy as np
import pytest
from scipy import linalg

from cmjax.metrics import frechet
from cmjax.metrics.frechet import frechet_distance


def features(n, d, seed=0):
  """n features with correlations and a mean."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def with_moments(mean, stds, n=50, seed=0):
  """n features whose mean and unbiased, diagonal covariance are exactly these."""
  x = np.random.default_rng(seed).normal(size=(n, len(stds)))
  x -= x.mean(0)
  white = np.linalg.solve(np.linalg.cholesky(np.cov(x.T)), x.T).T
  return mean + white * stds


def test_distance_between_diagonal_gaussians_has_its_closed_form():
  mean_a, mean_b = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.25])
  std_a, std_b = np.array([1.0, 0.5, 3.0]), np.array([2.0, 0.1, 3.0])
  distance = frechet_distance(
    with_moments(mean_a, std_a), with_moments(mean_b, std_b, n=80, seed=1)
  )
  exact = np.sum((mean_a - mean_b) ** 2) + np.sum((std_a - std_b) ** 2)
  assert distance == pytest.approx(exact, rel=1e-12)  # float64


def test_distance_matches_the_matrix_square_root():
  a, b = features(60, 5), features(40, 5, seed=1)
  cov_a, cov_b = np.cov(a.T), np.cov(b.T)
  exact = np.sum((a.mean(0) - b.mean(0)) ** 2)
  exact += np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
  # Float64; the square root of a product of condition 1e4 keeps ten digits.
  assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-9)


def test_covariances_are_unbiased():
  a, b = np.array([[0.0], [2.0]]), np.array([[1.0], [1.0]])
  # Variance 2 of two numbers around 1; dividing by 2 instead of 1 would give 1.
  assert frechet_distance(a, b) == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize(
  ('n', 'd'), [(60, 5), (10, 30)], ids=['full', 'fewer rows than features']
)
def test_distance_to_itself_is_zero(n, d):
  a = features(n, d)
  largest = np.linalg.eigvalsh(np.cov(a.T))[-1]
  distance = frechet_distance(a, np.random.default_rng(2).permutation(a))
  assert abs(distance) < 1e-13 * d * largest  # rounding of d sums


def test_distance_is_symmetric_and_invariant_to_a_common_rotation_and_shift():
  a, b = features(60, 5), features(40, 5, seed=1)
  distance = frechet_distance(a, b)
  assert distance > 0.1
  rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))[0]
  moved = frechet_distance(a @ rotation + 3, b @ rotation + 3)
  assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-10)
  assert moved == pytest.approx(distance, rel=1e-10)


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_distance_computes_in_float64_whatever_the_features_are(dtype):
  rng = np.random.default_rng(0)
  a, b = rng.integers(0, 256, size=(2, 40, 3))
  exact = frechet_distance(a.astype(np.float64), b.astype(np.float64))
  assert frechet_distance(a.astype(dtype), b.astype(dtype)) == exact


@pytest.mark.parametrize(
  ('a', 'b'),
  [
    ((1, 3), (5, 3)),
    ((5, 3), (1, 3)),
    ((5, 3), (5, 4)),
    ((5,), (5,)),
    ((), (5, 3)),
    ((5, 3), ()),
    ((0, 3), (5, 3)),
    ((5, 2, 2),) * 2,
  ],
)
def test_distance_refuses_shapes_it_cannot_compare(a, b):
  with pytest.raises(ValueError, match='shapes'):
    frechet_distance(np.zeros(a), np.zeros(b))


def test_distance_of_features_that_are_not_finite_is_nan():
  a, b = features(10, 3), features(10, 3, seed=1)
  b[2, 1] = np.nan
  assert np.isnan(frechet_distance(a, b))


# Moments --------------------------------------------------------------------------


def streamed(x, sizes):
  parts = np.split(x, np.cumsum(sizes)[:-1])
  return functools.reduce(frechet.merge, map(frechet.moments, parts))


def test_merged_moments_are_those_of_all_features():
  x = features(60, 5)
  for sizes in ((60,), (1, 59), (20, 0, 40), (0, 13, 47)):
    total = streamed(x, sizes)
    assert total.count == 60
    np.testing.assert_allclose(total.mean, x.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(total.covariance(), np.cov(x.T), rtol=1e-11, atol=1e-12)


def test_merging_is_associative_and_the_empty_set_is_neutral():
  a, b, c = (frechet.moments(features(n, 3, seed=n)) for n in (5, 7, 9))
  left = frechet.merge(frechet.merge(a, b), c)
  right = frechet.merge(a, frechet.merge(b, c))
  for one, other in zip(left, right):
    np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)  # float64
  empty = frechet.moments(np.zeros((0, 3)))
  assert frechet.merge(empty, a) is a
  assert frechet.merge(a, empty) is a


def test_moments_keep_the_digits_of_small_deviations_from_a_large_mean():
  x = np.random.default_rng(0).normal(size=(4000, 2)) + 1e7
  total = streamed(x, (1000,) * 4)
  # The spacing of float64 at 1e7 is 2e-9. Sums of x^2 about 0 would be off by 1e-2.
  np.testing.assert_allclose(total.covariance(), np.cov(x.T - 1e7), atol=1e-7)


def test_covariance_rules_divide_by_n_less_one_or_by_n():
  two = frechet.moments(np.array([[0.0], [2.0]]))
  assert two.covariance('unbiased') == 2.0
  assert two.covariance('biased') == 1.0
  with pytest.raises(ValueError, match='rule must be one of unbiased, biased'):
    two.covariance('n')
  with pytest.raises(ValueError, match='1 features'):
    frechet.moments(np.zeros((1, 2))).covariance()


def test_biased_covariances_give_another_distance():
  a, b = (with_moments(0.0, np.array([std, 1.0])) for std in (1.0, 2.0))
  assert frechet_distance(a, b) == pytest.approx(1.0, rel=1e-12)
  biased = frechet_distance(a, b, covariance='biased')
  assert biased == pytest.approx(1.0 * 49 / 50, rel=1e-12)


def test_distance_of_moments_that_are_not_finite_is_nan():
  good, bad = np.zeros(2), np.array([0.0, np.inf])
  assert np.isnan(frechet.frechet(good, np.eye(2), bad, np.eye(2)))
  assert np.isnan(frechet.frechet(good, np.eye(2), good, np.diag(bad)))
