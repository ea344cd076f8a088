"""Saves and restores the items of a checkpoint with orbax, and checks their hashes."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import gc
import logging
from pathlib import Path
import sys
from typing import Any, NamedTuple, TypeVar
import warnings

import jax
import orbax.checkpoint as ocp

from cmjax.runtime import checksums, sharding

T = TypeVar('T')

FOLDERS = CHECKPOINTS, SNAPSHOTS = ('checkpoints', 'snapshots')  # of a work directory


class Restored(NamedTuple):
  """What is read from a checkpoint."""

  items: dict[str, Any]
  meta: dict[str, Any]  # as given to `save_args`
  records: checksums.Records | None  # None: of version 0.2, which has no records


def is_step(path: Path) -> bool:
  """Whether a path is `checkpoints/STEP` or `snapshots/STEP` of a work directory."""
  return _is_number(path.name) and path.parent.name in FOLDERS and path.is_dir()


def steps_in(folder: Path) -> list[int]:
  """The steps stored in a folder, newest first; none if it does not exist."""
  steps = (p for p in folder.glob('*') if _is_number(p.name) and p.is_dir())
  return sorted((int(p.name) for p in steps), reverse=True)


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
    return restore(manager, step, likes)


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
