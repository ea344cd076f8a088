"""What a study measures, and the table that it returns."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks
from cmjax.core import Array, Batch, Key, Loss, Model, Nets


class Subject(NamedTuple):
  """A trained model, with the data and the objective that it was trained on."""

  f: Model
  nets: Nets  # `online` is measured
  x0: Array  # f32[N, ...] examples
  cond: Array | None  # f32[N, K] their labels
  batch: Callable[[int], Batch] | None = None  # step -> a batch of the training data
  loss: Loss | None = None
  teacher: Model | None = None
  in_dtype: Callable[[str], Model] | None = None  # the same model in another dtype
  step: int = 0  # of training, at which the schedules of the loss are evaluated


class Study(NamedTuple):
  """A table, what its columns mean, and which of them to plot."""

  title: str
  rows: list[dict[str, float]]
  x: str  # the column of the horizontal axis
  ys: tuple[str, ...]  # the columns to plot against it
  columns: dict[str, str]  # the meaning of each column in one line, in order


SIGMA_COLUMN = 'noise level, in units of the data'


def sigmas(sigma_min: float, sigma_max: float, num_sigmas: int) -> np.ndarray:
  """Noise levels f64[num_sigmas] from sigma_min to sigma_max, log-spaced.

  Raises: ValueError unless 0 < sigma_min <= sigma_max and num_sigmas >= 1.
  """
  checks.positive(sigma_min=sigma_min, sigma_max=sigma_max)
  checks.whole(1, 10_000, num_sigmas=num_sigmas)
  if sigma_min > sigma_max:
    raise ValueError(f'needs sigma_min <= sigma_max, got {sigma_min=}, {sigma_max=}')
  return np.geomspace(sigma_min, sigma_max, num_sigmas)


def rms(x: Array) -> Array:
  """Root mean square f32[] over all entries."""
  return jnp.sqrt(jnp.mean(x**2))


def by_sigma(
  measure: Callable[[Array, Key], Mapping[str, Array]], sigmas: Iterable[float]
) -> list[dict[str, float]]:
  """One row per noise level, of a function (sigma f32[], key) -> f32[] by column."""
  measure = jax.jit(measure)
  rows = []
  for i, sigma in enumerate(sigmas):
    values = measure(jnp.float32(sigma), jax.random.fold_in(jax.random.key(0), i))
    rows.append({'sigma': float(sigma)} | {k: float(v) for k, v in values.items()})
  return rows


def study(
  title: str,
  rows: Sequence[Mapping[str, float]],
  x: str,
  ys: Sequence[str],
  columns: Mapping[str, str],
) -> Study:
  """A study whose rows follow the order of `columns`; unused columns are dropped."""
  ordered = [{name: row[name] for name in columns if name in row} for row in rows]
  columns = {name: text for name, text in columns.items() if name in ordered[0]}
  return Study(title, ordered, x, tuple(y for y in ys if y in columns), columns)
