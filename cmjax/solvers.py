"""One step of an ODE solver along a field, from t to r < t, both f32[B]."""

from cmjax.core import Array, Field, Solver, expand


def euler(field: Field, x: Array, t: Array, r: Array) -> Array:
  """Euler's method: one evaluation. x f32[B, ...]. On the VE process it is DDIM."""
  return x + expand(r - t, x) * field(x, t)


def heun(field: Field, x: Array, t: Array, r: Array) -> Array:
  """Heun's method, second order: two evaluations, at t and r. x f32[B, ...].

  Source: Karras et al. 2022 (EDM), algorithm 1.
  """
  slope = field(x, t)
  x_r = x + expand(r - t, x) * slope
  return x + expand(r - t, x) * (slope + field(x_r, r)) / 2


def runge_kutta4(field: Field, x: Array, t: Array, r: Array) -> Array:
  """The classical Runge-Kutta method, fourth order: four evaluations. x f32[B, ...]."""
  step = expand(r - t, x)
  middle = (t + r) / 2
  k1 = field(x, t)
  k2 = field(x + step / 2 * k1, middle)
  k3 = field(x + step / 2 * k2, middle)
  k4 = field(x + step * k3, r)
  return x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def by_name(name: str) -> Solver:
  """`euler` or `heun` by name. Raises: ValueError for any other name."""
  solvers = {'euler': euler, 'heun': heun}
  if name not in solvers:
    raise ValueError(f"solver must be 'euler' or 'heun', got {name!r}")
  return solvers[name]
