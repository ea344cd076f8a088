"""The Frechet distance between Gaussian fits of two sets of features."""

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
  """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B unbiased covariances.

  Features f[N, D] and f[M, D] of any dtype; computed in float64. It is an FID only if
  the features are those of the 2015 Inception network. Returns NaN if a feature is not
  finite.

  Raises: ValueError if a set has fewer than two rows, or D differs.

  Source: Dowson & Landau 1982; Heusel et al. 2017, eq. (6).
  """
  if not a.ndim == b.ndim == 2 or min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
    raise ValueError(
      f'needs f[N >= 2, D] and f[M >= 2, D], got shapes {a.shape} and {b.shape}'
    )
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
    return float('nan')
  cov_a, cov_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
  # tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2). Unlike a square
  # root of A B, they stay real, and accurate for singular covariances of few samples.
  product = _symmetric_root(cov_a) @ _symmetric_root(cov_b)
  cross = np.sum(np.linalg.svd(product, compute_uv=False))
  distance = np.sum((a.mean(0) - b.mean(0)) ** 2)
  return float(distance + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
  values, vectors = np.linalg.eigh(matrix)
  return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
