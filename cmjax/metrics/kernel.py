"""The kernel distance (KID): an unbiased squared maximum mean discrepancy."""

import numpy as np

from cmjax import checks

MAX_SUBSETS = 10_000


def polynomial(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """The cubic kernel (a.b / D + 1)^3: f[N, D] and f[M, D] -> f[N, M]."""
  return (a @ b.T / a.shape[1] + 1) ** 3


def squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
  """The unbiased estimate of MMD^2 between f[N, D] and f[M, D] under `polynomial`.

  N and M are at least 2. It is computed in float64, and may be negative.

  Source: Gretton et al. 2012, eq. (3); Binkowski et al. 2018, section 4.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  terms = []
  for x in (a, b):
    kernel = polynomial(x, x)
    terms.append((kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)))
  return float(terms[0] + terms[1] - 2 * polynomial(a, b).mean())


def kernel_distance(
  samples: np.ndarray,
  data: np.ndarray,
  *,
  num_subsets: int = 100,
  subset_size: int = 1000,
  seed: int = 2020,
) -> tuple[float, float]:
  """Mean and standard deviation of `squared_mmd` over random subsets of both sets.

  Features f[N, D] and f[M, D]; rows of a subset are drawn without replacement. It is a
  KID only if the features are those of the 2015 Inception network.

  Raises: ValueError if a set has fewer than `subset_size` rows, D differs, or a number
    is out of range.

  Source: Binkowski et al. 2018; toshas/torch-fidelity `metric_kid.py`, whose subsets
    these are, for sets in the same order.
  """
  check_subsets(num_subsets, subset_size)
  if min(len(samples), len(data)) < subset_size:
    raise ValueError(
      f'a kernel distance with subsets of {subset_size} needs as many samples and '
      f'examples, got {len(samples)} and {len(data)}'
    )
  if samples.shape[1] != data.shape[1]:
    raise ValueError(f'features of sizes {samples.shape[1]} and {data.shape[1]}')
  draw = np.random.RandomState(seed)
  values = []
  for _ in range(num_subsets):
    a, b = (x[draw.choice(len(x), subset_size, replace=False)] for x in (samples, data))
    values.append(squared_mmd(a, b))
  return float(np.mean(values)), float(np.std(values))


def check_subsets(num_subsets: int, subset_size: int) -> None:
  """Raises: ValueError if a number is out of range."""
  checks.whole(1, MAX_SUBSETS, num_subsets=num_subsets)
  checks.whole(2, subset_size=subset_size)
