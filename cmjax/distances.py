"""Distances d(a, b) -> f32[B] over whole examples, and weightings w(t, r).

Every distance sums over all features of an example; none averages.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Array, Params, sum_features

Weighting = Callable[[Array, Array], Array]


class Distance(NamedTuple):
  """d(a, b), and how it grows near a = b."""

  measure: Callable[..., Array]  # f32[B, ...] twice -> f32[B]
  degree: int  # 2: twice differentiable at a = b; 1: a norm of a - b
  perceptual: bool = False  # whether `measure` takes a network's parameters first

  def __call__(self, a: Array, b: Array) -> Array:
    """f32[B, ...] twice -> f32[B]."""
    return self.measure(a, b)

  def given(self, perceptual: Params) -> 'Distance':
    """The same with the parameters of its network, if it has one.

    Raises: ValueError if it has one and there are none.
    """
    if not self.perceptual:
      return self
    if perceptual is None:
      raise ValueError(
        'this distance needs the weights of a perceptual network; give '
        "config.perceptual, such as dict(fn='cmjax.port.vision:load_lpips', ...)"
      )
    return Distance(functools.partial(self.measure, perceptual), self.degree)


def squared_l2() -> Distance:
  """d(a, b) = |a - b|^2: f32[B, ...] twice -> f32[B].

  Differs: Song et al. 2023 print the sum; their code takes the mean over features.
  """
  return Distance(lambda a, b: sum_features((a - b) ** 2), degree=2)


def l1() -> Distance:
  """d(a, b) = |a - b|_1: f32[B, ...] twice -> f32[B]; zero gradient where a = b."""

  def measure(a, b):
    d = a - b
    return sum_features(jnp.where(d == 0, 0.0, jnp.abs(d)))  # jax has abs'(0) = 1

  return Distance(measure, degree=1)


def pseudo_huber(*, c: float = 0.0) -> Distance:
  """d(a, b) = sqrt(|a - b|^2 + c^2) - c: f32[B, ...] twice -> f32[B].

  c = 0 is the unsquared l2 norm of ECT; its gradient at a = b is zero, not NaN.

  Raises: ValueError if c is negative.

  Source: Song & Dhariwal 2023 (iCT), where c = 0.00054 sqrt(features).
  """
  checks.not_negative(c=c)

  def measure(a, b):
    squared = sum_features((a - b) ** 2)
    positive = squared + c**2 > 0  # both branches of `where` are differentiated
    root = jnp.sqrt(jnp.where(positive, squared + c**2, 1.0))
    return squared / jnp.where(positive, root + c, 1.0)  # exactly zero at a = b

  return Distance(measure, degree=2 if c > 0 else 1)


def limit_cotangent(distance: Distance, y: Array, defect: Array) -> Array:
  """The gradient of the distance for an infinitely small defect, per its length.

  For a distance of degree 2 it is G(y) defect, where G is the matrix of second
  derivatives of d(., y) at y: one Hessian-vector product. For a norm it is the norm's
  gradient at the defect, bounded however small that is: for l2 the unit vector, which
  is how ECT's metric becomes sCM's tangent normalisation. All f32[B, ...].

  Source: Song et al. 2023, theorems 5 and 6 (G); norms: cmjax.
  """

  def gradient(a, b):
    return jax.grad(lambda a: jnp.sum(distance(a, b)))(a)

  if distance.degree == 2:
    return jax.jvp(lambda a: gradient(a, y), (y,), (defect,))[1]
  return gradient(defect, jnp.zeros_like(defect))


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

  Raises: ValueError unless sigma_data > 0.

  Source: Karras et al. 2022 (EDM), table 1.
  """
  checks.positive(sigma_data=sigma_data)
  return lambda t, r: 1.0 / t**2 + 1.0 / sigma_data**2


def truncated_snr() -> Weighting:
  """w(t, r) = max(1 / t^2, 1). Source: Salimans & Ho 2022, section 4."""
  return lambda t, r: jnp.maximum(1.0 / t**2, 1.0)


def inverse_time() -> Weighting:
  """w(t, r) = 1 / t: with it Theorem 6 is MeanFlow's gradient at r = 0."""
  return lambda t, r: 1.0 / t
