"""The batches of a run on its devices."""

from collections.abc import Generator
import contextlib
import itertools

import jax

from cmjax.core import Batch
from cmjax.data.source import batch_at, first_row
from cmjax.runtime import sharding
from cmjax.runtime.loader import read_ahead
from cmjax.runtime.run import Run


def batch(run: Run, step: int) -> Batch:
  """The global batch of a step; each process reads only its own rows."""
  size = run.config.batch_size
  rows = sharding.local_rows(run.mesh, size)
  host = batch_at(run.source, run.config.seed, step, size, rows)
  return sharding.place_rows(host, rows, size, run.mesh)


def batches(run: Run, first: int = 0) -> Generator[Batch, None, None]:
  """The global batches of the steps `first`, `first` + 1, ..., without end.

  Data on disk is read ahead, as `config.loader` states; closing the iterator ends that.
  """
  if run.source.in_memory:
    for step in itertools.count(first):
      yield batch(run, step)
  config, size = run.config, run.config.batch_size
  rows = sharding.local_rows(run.mesh, size)
  on_hosts = read_ahead(run.source, config.seed, first, size, rows, config.loader)
  with contextlib.closing(on_hosts):
    # `map`, since a variable would hold the batch of the host while it is trained on.
    yield from map(
      lambda host: sharding.place_rows(host, rows, size, run.mesh), on_hosts
    )


def abstract_batch(run: Run) -> Batch:
  """Shapes, dtypes and shardings of a batch, from the first example."""
  size = run.config.batch_size
  row = first_row(run.source, size)
  by_example = sharding.by_example(run.mesh)

  def abstract(a):
    return jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype, sharding=by_example)

  return jax.tree.map(abstract, row)
