"""One step of an ODE solver along a field, from t to r: both f32[B], r < t."""

from cmjax.core import Array, Field, Solver, expand


def euler(field: Field, x: Array, t: Array, r: Array) -> Array:
  """First order, one evaluation; also DDIM for the VE process. x f32[B, ...]."""
  return x + expand(r - t, x) * field(x, t)


def heun(field: Field, x: Array, t: Array, r: Array) -> Array:
  """Second order, two evaluations; the field must exist at r. x f32[B, ...].

  Source: Karras et al. 2022 (EDM), algorithm 1.
  """
  slope = field(x, t)
  ahead = x + expand(r - t, x) * slope
  return x + expand(r - t, x) * (slope + field(ahead, r)) / 2


def runge_kutta4(field: Field, x: Array, t: Array, r: Array) -> Array:
  """Fourth order, four evaluations; the classical method. x f32[B, ...]."""
  step = expand(r - t, x)
  middle = (t + r) / 2
  k1 = field(x, t)
  k2 = field(x + step / 2 * k1, middle)
  k3 = field(x + step / 2 * k2, middle)
  k4 = field(x + step * k3, r)
  return x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def by_name(name: str) -> Solver:
  """The solver of a config: 'euler' or 'heun'. Raises: ValueError for another."""
  solvers = {'euler': euler, 'heun': heun}
  if name not in solvers:
    raise ValueError(f"solver must be 'euler' or 'heun', got {name!r}")
  return solvers[name]
