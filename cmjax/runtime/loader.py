"""Batches of examples on disk, read ahead by threads or worker processes (grain)."""

from collections.abc import Generator
import contextlib
import multiprocessing
import os
import re
import signal
import threading
from typing import Any, NamedTuple

import jax
import numpy as np

from cmjax.core import Batch, UserError
from cmjax.data.source import Source, batch_at
from cmjax.runtime.records import Loader

_ROWS = 32  # of a batch that are read together


def read_ahead(
  source: Source,
  seed: int,
  first: int,
  batch_size: int,
  rows: np.ndarray,
  settings: Loader,
) -> Generator[Batch, None, None]:
  """`batch_at` of the steps `first`, `first` + 1, ..., read before they are asked for.

  Batches depend on (seed, step, rows) alone, so that a run resumes without a saved
  position, with any settings. Closing the iterator ends its threads and processes.

  Raises: UserError if a worker process dies, or an example cannot be read.
  """
  parts = np.array_split(rows, -(-len(rows) // _ROWS))
  read = _Parts(source, seed, first, batch_size, parts)
  with contextlib.closing(_elements(read, settings)) as elements:
    while True:
      yield _joined(elements, len(parts), settings)


class _Parts(NamedTuple):
  """Reads batches of a source in parts, of at most `_ROWS` rows each."""

  source: Source
  seed: int
  first: int  # step
  batch_size: int
  parts: list[np.ndarray]  # rows i[R] of each part

  def __call__(self, i: int) -> Batch:
    """Part i, counted from that of the first step."""
    step, part = divmod(i, len(self.parts))
    rows = self.parts[part]
    return batch_at(self.source, self.seed, self.first + step, self.batch_size, rows)


def _elements(read: _Parts, settings: Loader) -> Any:
  """The iterator of grain over the parts of batches."""
  from absl import flags
  import grain  # slow to import

  workers = settings.workers
  ahead = -(
    -settings.ahead * len(read.parts) // max(workers, 1)
  )  # parts, of each process
  threads = min(settings.threads, ahead)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
  parts = grain.MapDataset.range(2**62).map(read).to_iter_dataset(options)
  if workers:
    if not flags.FLAGS.is_parsed():  # which grain needs, and which has no flags of ours
      flags.FLAGS.mark_as_parsed()
    processes = grain.MultiprocessingOptions(num_workers=workers)
    parts = parts.mp_prefetch(processes, worker_init_fn=_start_worker)
  return iter(parts)


def _joined(elements: Any, num_parts: int, settings: Loader) -> Batch:
  """The next batch; its parts are freed before it is used."""
  parts = [_next(elements, settings) for _ in range(num_parts)]
  if num_parts == 1 and not settings.workers:
    return parts[0]
  # Also copies, as arrays of workers lie in memory that is freed with them.
  return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _next(elements: Any, settings: Loader) -> Batch:
  try:
    return next(elements)
  except RuntimeError as error:
    ended = re.search('terminated unexpectedly with (exit code -?[0-9]+)', str(error))
    if not settings.workers or not ended:
      raise
    raise UserError(
      f'config.loader.workers: a worker process ended unexpectedly ({ended[1]}); '
      'repeat the command to resume, with fewer workers if memory, or that of '
      '/dev/shm, ran out'
    ) from error


def _start_worker(index: int, count: int) -> None:
  """Runs in a worker: it ends with its parent, and only then."""
  del index, count
  # Signals to the process group are for the trainer, which saves and closes the worker.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)
