"""Precision and recall, density and coverage, from balls around nearest neighbours.

Pairwise distances are computed in blocks; besides the features, a few arrays of at
most `BLOCK` numbers are in memory.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cmjax import checks

BLOCK = 2**24  # float64 numbers: 128 MiB


class PrecisionRecall(NamedTuple):
  """Fractions in [0, 1]."""

  precision: float  # of samples within a ball of the data: fidelity
  recall: float  # of examples of the data within a ball of the samples: diversity


class DensityCoverage(NamedTuple):
  """Density may exceed 1; coverage is in [0, 1]."""

  density: float  # balls of the data that contain a sample, over k: fidelity
  coverage: float  # fraction of the data whose ball contains a sample: diversity


def precision_recall(
  samples: np.ndarray, data: np.ndarray, *, num_neighbours: int = 3
) -> PrecisionRecall:
  """Improved precision and recall of features f[N, D] of samples, f[M, D] of data.

  The ball of a feature reaches to its k-th nearest neighbour in its own set. NaN if a
  feature is not finite.

  Raises: ValueError if a set has fewer than k + 1 rows, D differs, or k is not in
    [1, 1000].

  Source: Kynkaanniemi et al. 2019, eq. (1) and (2); k = 3.
  Differs: in float64; OpenAI's evaluator computes distances in float16 where they are
    finite.
  """
  _check(samples, data, num_neighbours)
  if not _finite(samples, data):
    return PrecisionRecall(float('nan'), float('nan'))
  of_samples = _radii(samples, num_neighbours)
  of_data = _radii(data, num_neighbours)
  precise, recalled = np.zeros(len(samples), bool), np.zeros(len(data), bool)
  for rows, distances in _blocks(samples, data):
    precise[rows] = np.any(distances <= of_data[None], axis=1)
    recalled |= np.any(distances <= of_samples[rows, None], axis=0)
  return PrecisionRecall(float(precise.mean()), float(recalled.mean()))


def density_coverage(
  samples: np.ndarray, data: np.ndarray, *, num_neighbours: int = 5
) -> DensityCoverage:
  """Density and coverage of features f[N, D] of samples, f[M, D] of data.

  NaN if a feature is not finite.

  Raises: ValueError if a set has fewer than k + 1 rows, D differs, or k is not in
    [1, 1000].

  Source: Naeem et al. 2020, eq. (3) and (5); k = 5.
  Differs: the balls are closed, as for precision and recall; in clovaai's `prdc` they
    are open.
  """
  _check(samples, data, num_neighbours)
  if not _finite(samples, data):
    return DensityCoverage(float('nan'), float('nan'))
  radii = _radii(data, num_neighbours)
  contained, covered = 0, np.zeros(len(data), bool)
  for _, distances in _blocks(samples, data):
    inside = distances <= radii[None]
    contained += np.count_nonzero(inside)
    covered |= np.any(inside, axis=0)
  density = float(contained) / (num_neighbours * len(samples))
  return DensityCoverage(density, float(covered.mean()))


def check_neighbours(**values: int) -> None:
  """Raises: ValueError if a number of neighbours is out of range."""
  checks.whole(1, 1000, **values)


def _check(samples: np.ndarray, data: np.ndarray, num_neighbours: int) -> None:
  check_neighbours(num_neighbours=num_neighbours)
  if min(len(samples), len(data)) <= num_neighbours:
    raise ValueError(
      f'{num_neighbours} nearest neighbours need at least {num_neighbours + 1} samples '
      f'and examples, got {len(samples)} and {len(data)}'
    )
  if samples.shape[1] != data.shape[1]:
    raise ValueError(f'features of sizes {samples.shape[1]} and {data.shape[1]}')


def _finite(*sets: np.ndarray) -> bool:
  return all(np.all(np.isfinite(x)) for x in sets)


def _blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
  """Squared distances f64[R, M] between blocks of rows of a and all rows of b."""
  num_rows, num_columns = max(1, BLOCK // len(b)), max(1, BLOCK // b.shape[1])
  for start in range(0, len(a), num_rows):
    rows = slice(start, min(start + num_rows, len(a)))
    x = np.asarray(a[rows], np.float64)
    distances = np.empty((len(x), len(b)))
    for first in range(0, len(b), num_columns):
      columns = slice(first, first + num_columns)
      y = np.asarray(b[columns], np.float64)
      # |x - y|^2 without an array of all differences.
      distances[:, columns] = x @ y.T
      distances[:, columns] *= -2
      distances[:, columns] += np.sum(y**2, axis=1)[None]
    distances += np.sum(x**2, axis=1)[:, None]
    yield rows, np.maximum(distances, 0, out=distances)


def _radii(x: np.ndarray, k: int) -> np.ndarray:
  """Squared distances f64[N] to the k-th nearest other row."""
  radii = np.empty(len(x))
  for rows, distances in _blocks(x, x):
    index = np.arange(rows.start, rows.stop)
    distances[index - rows.start, index] = 0.0  # to itself, free of rounding
    radii[rows] = np.partition(distances, k, axis=1)[:, k]
  return radii
