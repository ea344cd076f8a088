"""Distances against numpy, their derivatives at zero, and weightings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import distances, weightings

C = 0.03
# The distance, and itself on one flat difference in numpy.
DISTANCES = {
  'squared_l2': (distances.squared_l2(), lambda d: np.sum(d**2)),
  'l1': (distances.l1(), lambda d: np.sum(np.abs(d))),
  'l2': (distances.pseudo_huber(), np.linalg.norm),
  'pseudo_huber': (
    distances.pseudo_huber(c=C),
    lambda d: np.sqrt(np.sum(d**2) + C**2) - C,
  ),
}


def two(shape, seed=0):
  return (jnp.asarray(v) for v in np.random.default_rng(seed).normal(size=(2, *shape)))


@pytest.mark.parametrize('name', DISTANCES)
@pytest.mark.parametrize('shape', [(3, 5), (3, 4, 4, 2)])
def test_distance_sums_over_all_features_of_an_example(name, shape, x64):
  distance, reference = DISTANCES[name]
  a, b = two(shape)
  expected = [reference(np.ravel(d)) for d in np.asarray(a - b)]
  # Float64, a sum of 32 terms.
  np.testing.assert_allclose(distance(a, b), expected, rtol=1e-13)
  np.testing.assert_allclose(distance(b, a), expected, rtol=1e-13)


@pytest.mark.parametrize('name', ['squared_l2', 'l1', 'l2', 'pseudo_huber'])
def test_equal_points_have_zero_distance_and_zero_gradient(name):
  distance, _ = DISTANCES[name]
  a, b = two((3, 4, 2))
  b = b.at[1].set(a[1])  # one equal example beside two that differ
  d, pullback = jax.vjp(distance, a, b)
  assert d[1] == 0
  for gradient in pullback(jnp.ones(3)):
    assert np.all(np.isfinite(gradient))
    assert [bool(np.any(row != 0)) for row in gradient] == [True, False, True]
  tangent = jax.jvp(lambda a: distance(a, b), (a,), (jnp.ones_like(a),))[1]
  assert np.all(np.isfinite(tangent))
  assert tangent[1] == 0


@pytest.mark.parametrize('c', [0.0, 0.03, 2.0])
def test_pseudo_huber_gradient_is_the_bounded_unit_direction(c, x64):
  a, b = two((3, 7))
  gradient = jax.grad(lambda a: jnp.sum(distances.pseudo_huber(c=c)(a, b)))(a)
  offset = np.asarray(a - b)
  length = np.sqrt(np.sum(offset**2, axis=1, keepdims=True) + c**2)
  np.testing.assert_allclose(gradient, offset / length, rtol=1e-12)


def test_pseudo_huber_tends_to_half_the_squared_distance_over_c(x64):
  a, b = two((3, 7))
  squared = np.asarray(distances.squared_l2()(a, b))
  for c in (1e2, 1e4):
    # sqrt(c^2 + s) - c = s / (2 c) (1 - s / (4 c^2) + ...); its rounding is c 1e-16,
    # against s / (2 c) ~ 1 / c.
    np.testing.assert_allclose(
      2 * c * distances.pseudo_huber(c=c)(a, b) / squared,
      1 - squared / (4 * c**2),
      rtol=(np.max(squared) / c**2) ** 2 + 1e-15 * c**2,
    )


@pytest.mark.parametrize(
  ('distance', 'curvature'),
  [(distances.squared_l2(), 2.0), (distances.pseudo_huber(c=C), 1 / C)],
  ids=['squared_l2', 'pseudo_huber'],
)
def test_curvature_at_equal_points_is_that_of_the_limit(distance, curvature, x64):
  a, direction = two((3, 7))
  gradient = jax.grad(lambda b: jnp.sum(distance(a, b)))
  product = jax.jvp(gradient, (a,), (direction,))[1]
  np.testing.assert_allclose(product, curvature * direction, rtol=1e-12)


@pytest.mark.parametrize('name', DISTANCES)
def test_distance_grows_near_equal_points_with_its_degree(name, x64):
  distance, _ = DISTANCES[name]
  a, direction = two((3, 7))
  near, nearer = (distance(a + h * direction, a) for h in (1e-4, 1e-5))
  growth = np.full(3, 10.0**distance.degree)
  # Of pseudo-Huber the next term is of the relative size |h v|^2 / 4 c^2 ~ 1e-5.
  np.testing.assert_allclose(near / nearer, growth, rtol=1e-4)


def test_the_degree_of_pseudo_huber_falls_to_one_without_c():
  assert distances.pseudo_huber(c=0.0).degree == distances.l1().degree == 1
  assert distances.pseudo_huber(c=1e-9).degree == distances.squared_l2().degree == 2


@pytest.mark.parametrize(
  ('t', 'snr', 'inverse'),
  [(0.002, 250_000, 500), (0.1, 100, 10), (0.5, 4, 2), (1, 1, 1), (5, 1, 0.2)],
)
def test_truncated_snr_and_inverse_time_look_at_t_alone(t, snr, inverse, x64):
  t = jnp.full(2, t, jnp.float64)
  r = jnp.array([0.0, 0.001])
  for weighting, weight in (
    (weightings.truncated_snr(), snr),
    (weightings.inverse_time(), inverse),
  ):
    np.testing.assert_allclose(weighting(t, r), np.full(2, weight), rtol=1e-12)


def test_uniform_weighting_is_one_everywhere():
  t = jnp.array([0.002, 1.0, 80.0])
  np.testing.assert_array_equal(weightings.uniform()(t, t / 2), np.ones(3))


def test_inverse_gap_is_one_over_the_gap_and_zero_without_one():
  t, r = jnp.array([2.0, 1.0, 0.5, 3.0]), jnp.array([1.5, 0.0, 0.5, 3.0])
  np.testing.assert_array_equal(weightings.inverse_gap()(t, r), [2.0, 1.0, 0.0, 0.0])
  slope = jax.grad(lambda t: jnp.sum(weightings.inverse_gap()(t, r)))(t)
  np.testing.assert_array_equal(slope, [-4.0, -1.0, 0.0, 0.0])


@pytest.mark.parametrize(
  ('t', 'weight'),
  [(0.002, 250004), (0.01, 10004), (0.1, 104), (0.5, 8), (1, 5), (5, 4.04)],
)
def test_edm_weighting_is_one_over_both_variances(t, weight, x64):
  t = jnp.full(2, t, jnp.float64)
  weights = weightings.edm(sigma_data=0.5)(t, jnp.array([0.0, 0.001]))
  np.testing.assert_allclose(weights, np.full(2, weight), rtol=1e-12)


def test_pseudo_huber_of_equal_points_is_exactly_zero_for_every_c():
  x = jnp.ones((1, 3))  # float32, where sqrt(c^2) - c is often not zero
  for c in np.linspace(0.01, 3.0, 300):
    assert distances.pseudo_huber(c=float(c))(x, x) == 0
