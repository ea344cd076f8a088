"""Saves and restores TrainState and config with orbax.

A checkpoint holds the parameters, the target network, the optimiser state and each EMA
as separate items, so that one set of weights can be read by itself, and `meta`: the
config, the step, the shape of an example, and hashes of every array and of the meta
itself. A step is committed as a whole or not at all, and restored arrays are compared
with their hashes.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp

from cmjax.core import Params, TrainState, UserError, first_line, unused
from cmjax.runtime import matching, paths, sharding, storage

T = TypeVar('T')

ONLINE = 'online'  # the item of the trained parameters; EMAs have names of their own
TARGET = 'target'  # the item of the target network


class Checkpoints:
  """The checkpoints of one run, under `workdir/checkpoints` or another folder.

  If `keep` is None, none is deleted.
  """

  def __init__(
    self, workdir: str | Path, keep: int | None, folder: str = storage.CHECKPOINTS
  ):
    self._silence = contextlib.ExitStack()
    # Failures of background writes are reported by `_reporting_failures`.
    self._silence.enter_context(storage.quiet())
    self._folder = paths.absolute(paths.path(workdir)) / folder
    self._failed = False
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True
      ),
    )

  def save(self, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts saving; the state may be donated as soon as this returns."""
    self.save_items(int(state.step), _items(state), meta)

  def save_items(
    self, step: int, items: Mapping[str, Any], meta: dict[str, Any]
  ) -> None:
    """`save`, of items by name."""
    if step in self._manager.all_steps():
      return
    args = storage.save_args(items, meta | {'step': step})
    with self._reporting_failures():
      # Without `force` it ignores steps before the newest one that is stored.
      storage.answering(
        self._folder, lambda: self._manager.save(step, args=args, force=True)
      )

  @contextlib.contextmanager
  def _reporting_failures(self) -> Iterator[None]:
    """Raises UserError for a failed write, for which orbax raises errors of many types.

    It is a RetryError if the bucket does not answer. A failed background write raises
    at the next call of the manager.
    """
    try:
      yield
    except Exception as error:
      self._failed = True
      full = any(sign in str(error) for sign in ('RESOURCE_EXHAUSTED', 'No space left'))
      reason = 'no space left' if full else first_line(error)
      then = 'resumes from the newest one'
      if not paths.remote(self._folder):
        _, steps = _find(self._folder.parent)
        then = f'resumes from step {steps[0]}' if steps else 'starts from step 0'
      raise paths.failure(
        self._folder,
        f'{self._folder}: saving a checkpoint failed ({reason}); fix the cause and '
        f'repeat the command, which then {then}',
      ) from error

  def restore(
    self, like: TrainState, say: Callable[[str], None]
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest intact checkpoint and its meta, or None if there is no checkpoint.

    Arrays have the shapes and shardings of `like`. Newer checkpoints that are damaged
    are reported and renamed to `STEP.damaged`: their steps can then be saved again, and
    nothing is deleted.

    Raises: UserError if all checkpoints are damaged; in that case none is renamed.
    """
    damaged: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        restored = self._read(step, _items(like))
      except Exception as error:  # damaged files raise errors of many types
        storage.check_answers(self._folder)
        damaged[step] = first_line(error)
      else:
        for newer, reason in damaged.items():
          path = self._rename_damaged(newer)
          say(f'checkpoint {newer} is damaged ({reason}); renamed to {path}')
        return _state(restored.items, like), restored.meta
      storage.collect()
    if damaged:
      step, reason = next(iter(damaged.items()))
      raise UserError(
        f'{self._folder}: all checkpoints are damaged (step {step}: {reason}); start '
        'again in a new --workdir'
      )
    return None

  def holds(
    self, step: int, items: Mapping[str, Any], say: Callable[[str], None]
  ) -> bool:
    """Whether a step is stored, with such items, and intact.

    A damaged one is reported and renamed, as by `restore`.
    """
    if step not in self._manager.all_steps():
      return False
    try:
      self._read(step, items)
    except Exception as error:  # damaged files raise errors of many types
      storage.check_answers(self._folder)
      reason = first_line(error)
      say(f'{self._folder / str(step)} is damaged ({reason}) and is saved again')
      self._rename_damaged(step)
      return False
    return True

  def _read(self, step: int, items: Mapping[str, Any]) -> storage.Restored:
    folder, manager = self._folder, self._manager
    return storage.answering(folder, lambda: storage.restore(manager, step, items))

  def wait(self) -> None:
    """Waits for pending saves."""
    with self._reporting_failures():
      storage.answering(self._folder, self._manager.wait_until_finished)

  def _rename_damaged(self, step: int) -> Path:
    path = unused(self._folder / f'{step}.damaged')
    if jax.process_index() == 0:
      paths.rename(self._folder / str(step), path)
    multihost_utils.sync_global_devices(f'checkpoint {step} is renamed')
    self._manager.reload()  # it caches the list of steps
    return path

  def close(self) -> None:
    """Waits for pending saves, and closes the manager."""
    with self._silence:
      if self._failed and paths.remote(self._folder):
        return  # it would wait for the same bucket again
      with self._reporting_failures():
        storage.answering(self._folder, self._manager.close)


def save_weights(
  workdir: str | Path, step: int, params: Params, meta: dict[str, Any]
) -> None:
  """Saves a checkpoint of weights alone, from which no run can resume."""
  args = storage.save_args({ONLINE: params}, meta | {'step': step})
  folder = paths.absolute(paths.path(workdir)) / storage.CHECKPOINTS
  with ocp.CheckpointManager(folder) as manager:
    manager.save(step, args=args)


def any_in(workdir: str | Path) -> bool:
  """Whether a work directory holds a checkpoint, intact or damaged."""
  return bool(storage.steps_in(paths.path(workdir) / storage.CHECKPOINTS))


def check_there(path: str | Path, where: str) -> None:
  """Raises UserError, naming the key `where`, if there are no weights to load."""
  path = paths.path(path)
  if not (paths.is_file(path) or storage.is_step(path) or any_in(path)):
    raise UserError(f'{where}: {path}: no checkpoints; is it the --workdir of a run?')


def is_run(path: str | Path) -> bool:
  """Whether the checkpoints hold an optimiser state, so that training can resume.

  Raises: UserError if there is no folder of checkpoints.
  """
  folder, steps = _find(path)
  return any(paths.is_dir(folder / str(step) / 'opt_state') for step in steps)


def newest(
  path: str | Path, read: Callable[[int, dict[str, Any]], T], say: Callable[[str], None]
) -> T:
  """The result of `read(step, meta)` on the newest intact checkpoint.

  Args:
    path: a work directory, or one of its `checkpoints/STEP` or `snapshots/STEP`, which
      is then the only candidate.
    read: reads more of that checkpoint; if it fails, the next older one is tried.
    say: receives one line per damaged checkpoint.

  Raises: UserError if no checkpoint is intact, or if `read` raises it.
  """
  # All processes read the same, also while a run saves.
  steps = sharding.from_process_0(lambda: _find(path)[1])
  folder, _ = _find(path)
  for step in steps:
    with storage.quiet():
      try:
        return read(step, storage.read(folder, step, {}).meta)
      except UserError:
        raise
      except Exception as error:  # damaged files raise errors of many types
        storage.check_answers(folder)
        reason = first_line(error)
      storage.collect()
    say(f'checkpoint {folder / str(step)} is damaged ({reason}); trying an older one')
  raise UserError(f'{path}: no intact checkpoint; is it the --workdir of a run?')


def read_meta(path: str | Path) -> dict[str, Any]:
  """The meta of the newest checkpoint whose meta is intact, or of the one at `path`.

  Raises: UserError if there is none.
  """
  return newest(path, lambda step, meta: meta, lambda line: None)


def read_weights(
  path: str | Path,
  step: int,
  name: str,
  like: Params,
  optional: Collection[str] = (),
) -> Params:
  """One set of weights, in the shapes and shardings of `like`.

  Args:
    path: a work directory, or one of its `checkpoints/STEP`.
    step: which checkpoint.
    name: `online`, `target` or the name of an EMA.
    like: the abstract parameters.
    optional: entries that are left out if only one of the two has them.

  Raises: UserError if the checkpoint has no such weights, or those of another network,
    naming the first parameter that differs; ValueError if a checksum differs, or
    whatever orbax raises for damaged files.
  """
  folder, _ = _find(path)
  item = name if name in (ONLINE, TARGET) else f'ema.{name}'
  records = storage.read(folder, step, {}).records
  if records is None:
    records = storage.unrecorded(folder, step, item)
  if item not in records:
    names = [n for n in (ONLINE, TARGET) if n in records]
    names += sorted(i.removeprefix('ema.') for i in records if i.startswith('ema.'))
    raise UserError(f'{path}: no weights {name!r}; choose from {", ".join(names)}')
  saved = records[item]
  fitted, dropped = matching.fitted(path, saved, like, optional)
  params = storage.read(folder, step, {item: fitted | dropped}).items[item]
  return {key: value for key, value in params.items() if key not in dropped}


def _find(path: str | Path) -> tuple[Path, list[int]]:
  """The folder of checkpoints of a path, and its steps, newest first."""
  path = paths.absolute(paths.path(path))
  if storage.is_step(path):
    return path.parent, [int(path.name)]
  folder = path / storage.CHECKPOINTS
  if not paths.is_dir(folder):
    raise UserError(f'{path}: no checkpoints; is it the --workdir of a run?')
  return folder, storage.steps_in(folder)


def _items(state: TrainState) -> dict[str, Any]:
  items = {ONLINE: state.params, 'opt_state': state.opt_state, 'step': [state.step]}
  if state.target is not None:
    items[TARGET] = state.target
  return items | {f'ema.{name}': tree for name, tree in state.ema.items()}


def _state(items: Mapping[str, Any], like: TrainState) -> TrainState:
  return TrainState(
    step=items['step'][0],
    params=items[ONLINE],
    target=None if like.target is None else items[TARGET],
    ema={name: items[f'ema.{name}'] for name in like.ema},
    opt_state=items['opt_state'],
  )
