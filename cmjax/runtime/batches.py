"""The batches of a run on its devices."""

from collections.abc import Iterator
import itertools

import jax
import numpy as np

from cmjax.core import Batch
from cmjax.data.source import batch_at
from cmjax.runtime import sharding
from cmjax.runtime.run import Run


def batch(run: Run, step: int) -> Batch:
  """The global batch of a step; each process reads only its own rows."""
  size = run.config.batch_size
  rows = sharding.local_rows(run.mesh, size)
  host = batch_at(run.source, run.config.seed, step, size, rows)
  return sharding.place_rows(host, rows, size, run.mesh)


def batches(run: Run, first: int = 0) -> Iterator[Batch]:
  """The global batches of the steps `first`, `first` + 1, ..., without end."""
  for step in itertools.count(first):
    yield batch(run, step)


def abstract_batch(run: Run) -> Batch:
  """Shapes, dtypes and shardings of a batch, from the first example."""
  size = run.config.batch_size
  row = batch_at(run.source, run.config.seed, 0, size, np.zeros(1, int))
  by_example = sharding.by_example(run.mesh)

  def abstract(a):
    return jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype, sharding=by_example)

  return jax.tree.map(abstract, row)
