"""Distances d(a, b) -> f32[B] over whole examples, and weightings w(t, r).

Every distance sums over all features of an example; none averages.
"""

from collections.abc import Callable

import jax.numpy as jnp

from cmjax.core import Array, sum_features

Distance = Callable[[Array, Array], Array]
Weighting = Callable[[Array, Array], Array]


def squared_l2() -> Distance:
  """d(a, b) = |a - b|^2: f32[B, ...] twice -> f32[B].

  Differs: Song et al. 2023 print the sum; their code takes the mean over features.
  """
  return lambda a, b: sum_features((a - b) ** 2)


def l1() -> Distance:
  """d(a, b) = |a - b|_1: f32[B, ...] twice -> f32[B]; zero gradient where a = b."""

  def distance(a, b):
    d = a - b
    return sum_features(jnp.where(d == 0, 0.0, jnp.abs(d)))  # jax has abs'(0) = 1

  return distance


def pseudo_huber(*, c: float = 0.0) -> Distance:
  """d(a, b) = sqrt(|a - b|^2 + c^2) - c: f32[B, ...] twice -> f32[B].

  c = 0 is the unsquared l2 norm of ECT; its gradient at a = b is zero, not NaN.

  Source: Song & Dhariwal 2023 (iCT), where c = 0.00054 sqrt(features).
  """

  def distance(a, b):
    squared = sum_features((a - b) ** 2)
    positive = squared + c**2 > 0  # both branches of `where` are differentiated
    root = jnp.sqrt(jnp.where(positive, squared + c**2, 1.0))
    return squared / jnp.where(positive, root + c, 1.0)  # exactly zero at a = b

  return distance


def uniform() -> Weighting:
  """w(t, r) = 1. Source: Song et al. 2023, section 4."""
  return lambda t, r: jnp.ones_like(t)


def inverse_gap() -> Weighting:
  """w(t, r) = 1 / (t - r), for r < t.

  Source: Song & Dhariwal 2023 (iCT); locuslab/ect `loss.py`.
  Differs: zero where r = t, where the loss is zero whatever the weight.
  """

  def weighting(t, r):
    gap = t - r
    return jnp.where(gap > 0, 1.0 / jnp.where(gap > 0, gap, 1.0), 0.0)

  return weighting


def edm_weighting(*, sigma_data: float = 0.5) -> Weighting:
  """w(t, r) = 1 / t^2 + 1 / sigma_data^2: the EDM weight, independent of r.

  Source: Karras et al. 2022 (EDM), table 1.
  """
  return lambda t, r: 1.0 / t**2 + 1.0 / sigma_data**2
