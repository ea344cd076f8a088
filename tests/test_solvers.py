"""Solver steps: exact on polynomials, and of their order on the flow of a Gaussian."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import fields, oracles, process, solvers
from cmjax.core import expand

# Solver: its order, and when it evaluates the field, from 0 at t to 1 at r.
SOLVERS = {
  'euler': (solvers.euler, 1, [0]),
  'heun': (solvers.heun, 2, [0, 1]),
  'runge_kutta4': (solvers.runge_kutta4, 4, [0, 0.5, 0.5, 1]),
}
T, R = np.array([2.0, 1.0, 0.7]), np.array([1.5, 0.2, 0.0])


@pytest.fixture(params=SOLVERS)
def solver(request):
  return SOLVERS[request.param]


def test_solver_evaluates_the_field_where_its_method_says(solver, x64):
  step, _, where = solver
  seen = []

  def field(x, t):
    seen.append(np.asarray(t))
    return x

  step(field, jnp.ones((3, 2)), jnp.asarray(T), jnp.asarray(R))
  expected = [T + fraction * (R - T) for fraction in where]
  np.testing.assert_allclose(seen, expected, rtol=1e-15, atol=1e-16)


def test_solver_integrates_polynomials_of_its_order_exactly(solver, x64):
  step, order, _ = solver
  x = jnp.ones((3, 2))
  degrees = range(order + 1)
  errors = []
  for degree in degrees:  # dx/dt = t^degree

    def field(x, t, degree=degree):
      return expand(t**degree, x) * jnp.ones_like(x)

    exact = 1 + (R ** (degree + 1) - T ** (degree + 1)) / (degree + 1)
    found = step(field, x, jnp.asarray(T), jnp.asarray(R))
    errors.append(np.max(np.abs(found - exact[:, None])))
  assert max(errors[:order]) < 1e-14  # rounding of a few operations
  assert errors[order] > 1e-3


def test_solver_converges_with_its_order_on_a_gaussian(solver, x64):
  step, order, _ = solver
  oracle = oracles.gaussian(np.array([0.3, -0.2]), 0.4)
  advance = jax.jit(lambda x, t, r: step(oracles.field(oracle), x, t, r))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
  exact = oracles.consistency(oracle, x, jnp.full(3, 2.0), sigma_end=0.2)

  def error(n):
    y = x
    grid = np.linspace(2.0, 0.2, n + 1)
    for t, r in itertools.pairwise(grid):
      y = advance(y, np.full(3, t), np.full(3, r))
    return float(np.linalg.norm(y - exact))

  measured = np.log2(error(16) / error(32))
  # The next term of the error is of the relative size of a step, 1.8 / 16.
  assert measured == pytest.approx(order, abs=0.3)


def test_step_along_its_own_path_keeps_data_and_noise(solver, x64):
  step, _, _ = solver
  x0, z = (jnp.asarray(v) for v in np.random.default_rng(0).normal(size=(2, 3, 4, 2)))
  t, r = jnp.asarray(T), jnp.asarray(R)
  x_t = process.perturb(process.VE, x0, z, t)
  found = step(fields.conditional(process.VE, x0, z), x_t, t, r)
  # x0 + r z: a few roundings of numbers of the size of t z, also where r = 0.
  exact = process.perturb(process.VE, x0, z, r)
  np.testing.assert_allclose(found, exact, rtol=0, atol=1e-14)
