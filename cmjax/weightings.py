"""Loss weightings w(t, r) f32[B] of pairs of times r <= t; r = t in continuous time.

The process is variance exploding, so t and r are noise levels sigma.
"""

from collections.abc import Callable

import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Array

Weighting = Callable[[Array, Array], Array]  # (t, r) -> w, all f32[B]


def uniform() -> Weighting:
  """w(t, r) = 1. Source: Song et al. 2023, section 4."""
  return lambda t, r: jnp.ones_like(t)


def inverse_gap() -> Weighting:
  """w(t, r) = 1 / (t - r) for r < t, and 0 at r = t, where the loss is zero.

  Source: Song & Dhariwal 2023 (iCT); locuslab/ect `loss.py`.
  """

  def weighting(t, r):
    gap = t - r
    return jnp.where(gap > 0, 1.0 / jnp.where(gap > 0, gap, 1.0), 0.0)

  return weighting


def edm(*, sigma_data: float = 0.5) -> Weighting:
  """w(t, r) = 1 / t^2 + 1 / sigma_data^2: the weighting of EDM.

  Raises: ValueError unless sigma_data > 0.

  Source: Karras et al. 2022 (EDM), table 1.
  """
  checks.positive(sigma_data=sigma_data)
  return lambda t, r: 1.0 / t**2 + 1.0 / sigma_data**2


def truncated_snr() -> Weighting:
  """w(t, r) = max(1 / t^2, 1). Source: Salimans & Ho 2022, section 4."""
  return lambda t, r: jnp.maximum(1.0 / t**2, 1.0)


def inverse_time() -> Weighting:
  """w(t, r) = 1 / t: with it, Theorem 6 is the gradient of MeanFlow at r = 0."""
  return lambda t, r: 1.0 / t
