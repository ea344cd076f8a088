"""Distances d(a, b) -> f32[B] between examples: sums over all features, not means."""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Array, Params, sum_features


class Distance(NamedTuple):
  """A distance d(a, b), and its degree: it grows as |a - b|^degree near a = b."""

  measure: Callable[..., Array]  # (a f32[B, ...], b f32[B, ...]) -> f32[B]
  degree: int  # 2: twice differentiable at a = b; 1: a norm of a - b
  perceptual: bool = False  # True: `measure` takes a network's parameters before a, b

  def __call__(self, a: Array, b: Array) -> Array:
    """a, b f32[B, ...] -> f32[B]."""
    return self.measure(a, b)

  def bind(self, perceptual: Params) -> 'Distance':
    """This distance with the parameters of its network, if it is perceptual.

    Raises: ValueError if it is perceptual and `perceptual` is None.
    """
    if not self.perceptual:
      return self
    if perceptual is None:
      raise ValueError(
        'a perceptual distance needs the parameters of its network, and '
        'Nets.perceptual is None'
      )
    return Distance(functools.partial(self.measure, perceptual), self.degree)


def squared_l2() -> Distance:
  """d(a, b) = |a - b|^2, for a, b f32[B, ...].

  Differs: sums over features, as in Song et al. 2023; their code takes the mean.
  """
  return Distance(lambda a, b: sum_features((a - b) ** 2), degree=2)


def l1() -> Distance:
  """d(a, b) = |a - b|_1, for a, b f32[B, ...]; the gradient is zero where a = b."""

  def measure(a, b):
    d = a - b
    return sum_features(jnp.where(d == 0, 0.0, jnp.abs(d)))  # jax has abs'(0) = 1

  return Distance(measure, degree=1)


def pseudo_huber(*, c: float = 0.0) -> Distance:
  """d(a, b) = sqrt(|a - b|^2 + c^2) - c, for a, b f32[B, ...].

  With c = 0 it is the l2 norm, as in ECT; its gradient at a = b is zero, not NaN.

  Raises: ValueError unless c >= 0.

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
  """The leading term of the distance's gradient for a vanishing defect, f32[B, ...].

  For a distance of degree 2 it is G(y) defect, where G is the matrix of second
  derivatives of d(., y) at y: one Hessian-vector product. For a norm it is the norm's
  gradient at the defect, which does not vanish with the defect: for l2 it is the unit
  vector, which is the tangent normalisation of sCM. y and defect f32[B, ...].

  Source: Song et al. 2023, theorems 5 and 6 (G); the case of norms is a cmjax choice.
  """

  def gradient(a, b):
    return jax.grad(lambda a: jnp.sum(distance(a, b)))(a)

  if distance.degree == 2:
    return jax.jvp(lambda a: gradient(a, y), (y,), (defect,))[1]
  return gradient(defect, jnp.zeros_like(defect))
