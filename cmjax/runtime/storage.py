"""Saves and restores the items of a checkpoint with orbax, and checks their hashes."""

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
import contextlib
import functools
import gc
import logging
from pathlib import Path
import sys
import threading
import time
from typing import Any, NamedTuple, TypeVar
import warnings

import jax
import orbax.checkpoint as ocp

from cmjax.core import RetryError
from cmjax.runtime import checksums, paths, sharding

T = TypeVar('T')

FOLDERS = CHECKPOINTS, SNAPSHOTS = ('checkpoints', 'snapshots')  # of a work directory
SILENCE_S = 60.0  # until a bucket that does not answer is given up


class Restored(NamedTuple):
  """What is read from a checkpoint."""

  items: dict[str, Any]
  meta: dict[str, Any]  # as given to `save_args`
  records: checksums.Records | None  # None: of version 0.2, which has no records


def is_step(path: Path) -> bool:
  """Whether a path is `checkpoints/STEP` or `snapshots/STEP` of a work directory."""
  named = _is_number(path.name) and path.parent.name in FOLDERS
  return named and paths.is_dir(path)


def steps_in(folder: Path) -> list[int]:
  """The steps stored in a folder, newest first; none if it does not exist."""
  steps = [int(name) for name in paths.folders_in(folder) if _is_number(name)]
  if paths.remote(folder):  # a step is not renamed when it is complete, but marked
    steps = [s for s in steps if (folder / str(s) / 'commit_success.txt').exists()]
  return sorted(steps, reverse=True)


def _is_number(name: str) -> bool:
  return name.isascii() and name.isdigit()


def save_args(items: Mapping[str, Any], meta: dict[str, Any]) -> ocp.args.Composite:
  """Arguments to save `items`, and `meta` with the records of their arrays."""
  records = {name: checksums.records_of(tree) for name, tree in items.items()}
  return ocp.args.Composite(
    meta=ocp.args.JsonSave(checksums.sign(meta, records)),
    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
  )


def read(folder: Path, step: int, likes: Mapping[str, Any]) -> Restored:
  """`restore` from a folder of checkpoints, which is opened read-only."""
  with quiet(), ocp.CheckpointManager(folder, options=_READ_ONLY) as manager:
    return answering(folder, lambda: restore(manager, step, likes))


def restore(
  manager: ocp.CheckpointManager, step: int, likes: Mapping[str, Any]
) -> Restored:
  """The items of a step that `likes` names, in its shapes and shardings.

  Arrays without records are not verified.

  Raises: in all processes if in any: ValueError if a hash differs, or whatever orbax
    raises.
  """
  args: dict[str, Any] = {
    name: ocp.args.StandardRestore(_abstract(like)) for name, like in likes.items()
  }
  args['meta'] = ocp.args.JsonRestore()

  def read_items():
    items: Any = manager.restore(step, args=ocp.args.Composite(**args))
    return Restored(items, *_verified(items['meta'], step))

  result = _in_all_processes(read_items)
  if result.records is not None:
    for name in likes:
      saved = result.records[name]
      restored = checksums.records_of(result.items[name], saved)
      _in_all_processes(functools.partial(checksums.compare, name, saved, restored))
  return result


def _verified(meta: Any, step: int) -> tuple[dict[str, Any], checksums.Records | None]:
  if not isinstance(meta, dict):
    raise ValueError('meta is not a dict')
  given, records = checksums.verify(meta)
  if given.get('step') != step or not {'config', 'shape', 'classes'} <= given.keys():
    raise ValueError('meta is not that of this step')
  return given, records


_READ_ONLY = ocp.CheckpointManagerOptions(
  read_only=True, create=False, save_interval_steps=0
)


def unrecorded(folder: Path, step: int, item: str) -> checksums.Records:
  """The items of a step of version 0.2, with the arrays of `item` alone."""
  records: checksums.Records = {
    p.name: {} for p in (folder / str(step)).iterdir() if p.is_dir()
  }
  if item in records:
    handlers: dict[str, Any] = {item: ocp.StandardCheckpointHandler()}
    with (
      quiet(),
      ocp.CheckpointManager(
        folder, options=_READ_ONLY, item_handlers=handlers
      ) as manager,
    ):
      metadata = checksums.by_path(manager.item_metadata(step)[item].tree)
    records[item] = {
      key: checksums.Record(str(a.dtype), tuple(a.shape)) for key, a in metadata.items()
    }
  return records


def answering(folder: Path, call: Callable[[], T]) -> T:
  """The result of a call that reads or writes a folder.

  Raises: OSError if the folder is in a bucket that does not answer for `SILENCE_S`
    during the call, which continues in a thread: tensorstore repeats requests for a
    quarter of an hour, and orbax does not pass on its settings.
  """
  if not paths.remote(folder):
    return call()
  result: futures.Future[T] = futures.Future()

  def run() -> None:
    try:
      result.set_result(call())
    except BaseException as error:
      result.set_exception(error)

  threading.Thread(target=run, daemon=True).start()
  answered = time.monotonic()
  while not futures.wait([result], timeout=paths.PROBE_S).done:
    now = time.monotonic()
    if paths.answers(folder):
      answered = now
    elif now - answered > SILENCE_S:
      raise OSError(f'the bucket has not answered for {now - answered:.0f} s')
  return result.result()


def check_answers(folder: Path) -> None:
  """Raises RetryError if a folder is in a bucket that does not answer."""
  if not paths.answers(folder):  # then its checkpoints are not damaged
    raise RetryError(f'{folder}: the bucket does not answer; repeat the command later')


def _in_all_processes(call: Callable[[], T]) -> T:
  """The result of `call`, if it raises in no process.

  Raises: its own error, or OSError if it raised in another process only.
  """
  result, failure = [], None
  try:
    result.append(call())
  except Exception as error:  # damaged files raise errors of many types
    failure = error
  if not sharding.all_true(failure is None):
    raise failure or OSError('another process failed to read it')
  return result[0]


def _abstract(tree: Any) -> Any:
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree
  )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Silences orbax, which prints a page for each array that it cannot read or write."""
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  levels = {name: logging.getLogger(name).level for name in ('absl', 'asyncio')}
  for name in levels:
    logging.getLogger(name).setLevel(logging.CRITICAL)
  try:
    yield
  except BaseException:
    collect()
    raise
  finally:
    for name, level in levels.items():
      logging.getLogger(name).setLevel(level)
    sys.unraisablehook = hook


def collect() -> None:
  """Frees failed tasks; call it within `quiet`, as their destructors print again."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    gc.collect()
