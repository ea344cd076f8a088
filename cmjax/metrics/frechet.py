"""The Frechet distance between Gaussian fits of two sets of features."""

from typing import NamedTuple

import numpy as np

from cmjax import checks

COVARIANCE = ('unbiased', 'biased')


class Moments(NamedTuple):
  """The mean of N features and their deviations from it, in float64."""

  count: int  # N
  mean: np.ndarray  # f64[D]
  scatter: np.ndarray  # f64[D, D]: sum of (x - mean) (x - mean)^T

  def covariance(self, rule: str = 'unbiased') -> np.ndarray:
    """f64[D, D]: the scatter over N - 1 ('unbiased') or over N ('biased').

    Raises: ValueError if the rule is unknown, or N is below 2 or 1.
    """
    checks.choice(COVARIANCE, rule=rule)
    divisor = self.count - (rule == 'unbiased')
    if divisor < 1:
      raise ValueError(f'a covariance of {self.count} features; more are needed')
    return self.scatter / divisor


def moments(features: np.ndarray) -> Moments:
  """The moments of one batch of features f[B, D]."""
  x = np.asarray(features, np.float64)
  mean = x.mean(axis=0) if len(x) else np.zeros(x.shape[1])
  centred = x - mean
  return Moments(len(x), mean, centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
  """The moments of two batches together; associative up to rounding.

  Source: Chan, Golub & LeVeque 1983, eq. (2.1). A sum of x x^T, from which the mean is
    subtracted at the end, loses the digits by which the mean exceeds the deviations.
  """
  if not a.count or not b.count:
    return a if a.count else b
  count, shift = a.count + b.count, b.mean - a.mean
  scatter = a.scatter + b.scatter
  scatter += np.outer(shift, shift) * (a.count * b.count / count)
  return Moments(count, a.mean + shift * (b.count / count), scatter)


def frechet(
  mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
  """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians, in float64.

  Means f[D], symmetric covariances f[D, D]. Returns NaN if a number is not finite.

  Source: Dowson & Landau 1982; Heusel et al. 2017, eq. (6).
  """
  a, b, cov_a, cov_b = (
    np.asarray(x, np.float64) for x in (mean_a, mean_b, cov_a, cov_b)
  )
  if not all(np.all(np.isfinite(x)) for x in (a, b, cov_a, cov_b)):
    return float('nan')
  # tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2). Unlike a square
  # root of A B, they stay real, and accurate for singular covariances of few samples.
  product = _symmetric_root(cov_a) @ _symmetric_root(cov_b)
  cross = np.sum(np.linalg.svd(product, compute_uv=False))
  distance = np.sum((a - b) ** 2)
  return float(distance + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def frechet_distance(
  a: np.ndarray, b: np.ndarray, *, covariance: str = 'unbiased'
) -> float:
  """The Frechet distance between the Gaussian fits of two sets of features.

  Features f[N, D] and f[M, D] of any dtype; computed in float64. It is an FID only if
  the features are those of the 2015 Inception network. Returns NaN if a feature is not
  finite.

  Raises: ValueError if a set has fewer than two rows, D differs, or the rule of the
    covariance is unknown.
  """
  if not a.ndim == b.ndim == 2 or min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
    raise ValueError(
      f'needs f[N >= 2, D] and f[M >= 2, D], got shapes {a.shape} and {b.shape}'
    )
  if not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
    return float('nan')
  one, two = moments(a), moments(b)
  return frechet(
    one.mean, one.covariance(covariance), two.mean, two.covariance(covariance)
  )


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
  values, vectors = np.linalg.eigh(matrix)
  return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
