"""Post-hoc reconstruction of exponential moving averages from stored snapshots.

After n steps the average of `schedules.power` weights the parameters after step k by
(k / n)^(gamma + 1) - ((k - 1) / n)^(gamma + 1): the integral over (k - 1, k] of the
profile (gamma + 1) t^gamma / n^(gamma + 1). A weighted sum of such averages has the
weighted sum of their profiles, and so approximates the average of another profile.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from cmjax import checks
from cmjax.core import Params
from cmjax.schedules import power_gamma


class Profile(NamedTuple):
  """A power-function average: its relative standard deviation, and after which step."""

  relative_std: float
  step: int


class Reconstruction(NamedTuple):
  """The weights of snapshots that reproduce a profile, and how well they do."""

  weights: np.ndarray  # f64[N], sums to 1
  error: float  # L2 distance of the profiles, relative to the norm of the target


def inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> np.ndarray:
  """The integrals f64[N, M] of the products of profiles.

  Raises: ValueError unless 0 < relative_std < 0.288 and step >= 1.

  Source: Karras et al. 2024 (EDM2), appendix C, algorithm 3.
  """
  gamma_a, step_a = (column[:, None] for column in _exponents(a))
  gamma_b, step_b = (row[None, :] for row in _exponents(b))
  first = np.minimum(step_a, step_b)
  ratio = (first / step_a) ** gamma_a * (first / step_b) ** gamma_b  # both <= 1
  scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
  return scale * ratio * first / (step_a * step_b)


def _exponents(profiles: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
  """gamma f64[N] and step f64[N]."""
  for relative_std, step in profiles:
    check_relative_std(relative_std)
    checks.whole(1, 2**31 - 1, step=step)
  gammas = [power_gamma(relative_std) for relative_std, _ in profiles]
  return np.array(gammas, np.float64), np.array([p.step for p in profiles], np.float64)


def check_relative_std(relative_std: float) -> None:
  """Raises: ValueError unless 0 < relative_std < 0.288, which makes gamma positive."""
  checks.finite(relative_std=relative_std)
  if not 0 < relative_std < 12**-0.5:
    raise ValueError(f'relative_std must be in (0, 0.288), got {relative_std}')


def reconstruct(stored: Sequence[Profile], target: Profile) -> Reconstruction:
  """The sum of stored profiles that is closest to a target, by least squares.

  The weights of the sum are constrained to sum to 1. `error` is the relative error of
  an average of white noise; that of weights, which change slowly, is smaller.

  Raises: ValueError if nothing is stored, or a relative_std or step is out of range.

  Source: Karras et al. 2024 (EDM2), section 3.2 and algorithm 3.
  Differs: the sum is constrained in the minimisation; theirs is normalised after it.
  """
  if not stored:
    raise ValueError('needs at least one stored profile')
  products = inner_products(stored, stored)
  towards = inner_products(stored, [target])[:, 0]
  square = float(inner_products([target], [target])[0, 0])
  # Minimise |sum_i w_i p_i - target|^2 with a Lagrange multiplier for sum_i w_i = 1.
  # In units of the norms of the profiles the equations are best conditioned.
  norms = np.sqrt(np.diag(products))
  ones = norms[-1] / norms
  matrix = np.block(
    [[products / np.outer(norms, norms), ones[:, None]], [ones[None, :], 0.0]]
  )
  right = np.append(towards / norms, norms[-1])
  weights = np.linalg.lstsq(matrix, right, rcond=1e-14)[0][:-1] / norms
  weights /= np.sum(weights)  # up to rounding, it is 1
  distance = square - 2 * weights @ towards + weights @ products @ weights
  return Reconstruction(weights, float(np.sqrt(max(distance, 0.0) / square)))


def combine(weights: Sequence[float], snapshots: Iterable[Params]) -> Params:
  """sum_i weights_i snapshots_i, in float64; one snapshot is held at a time.

  Arrays are NumPy, in the dtypes of the snapshots.

  Raises: ValueError if there are not as many snapshots as weights, or none.
  """

  def add(weight, total, tree):
    return jax.tree.map(
      lambda a, b: a + weight * np.asarray(b, np.float64), total, tree
    )

  total, like = None, None
  for weight, tree in zip(weights, snapshots, strict=True):
    if total is None:
      like, total = tree, jax.tree.map(lambda a: np.zeros(np.shape(a)), tree)
    total = add(float(weight), total, tree)
  if total is None:
    raise ValueError('needs at least one snapshot')
  return jax.tree.map(lambda a, b: a.astype(b.dtype), total, like)
