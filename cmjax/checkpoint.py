"""Save and restore of TrainState and config: the only door for orbax.

A checkpoint holds params, target, optimiser state and each EMA as separate items, so
that one set of weights can be read alone, and `meta`: the resolved config, the step and
the shape of an example. A step is there whole or not at all.
"""

from collections.abc import Callable, Iterator
import contextlib
import gc
import logging
from pathlib import Path
import sys
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from cmjax.core import Params, TrainState, UserError, first_line, unused

T = TypeVar('T')

ONLINE = 'online'  # the name of the weights that are trained, beside those of EMAs


class Checkpoints:
  """The checkpoints of one run, under `workdir/checkpoints`."""

  def __init__(self, workdir: str | Path, keep: int):
    self._silence = contextlib.ExitStack()
    self._silence.enter_context(_quiet())  # what fails in the background is said below
    self._folder = Path(workdir).resolve() / 'checkpoints'
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True
      ),
    )

  def save(self, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts saving; the state may be donated as soon as this returns."""
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    items = {name: ocp.args.StandardSave(v) for name, v in _items(state).items()}
    items['meta'] = ocp.args.JsonSave(meta | {'step': step})
    with self._writing():
      self._manager.save(step, args=ocp.args.Composite(**items))

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """A disk that is full or gone surfaces as many kinds of error, here or later."""
    try:
      yield
    except Exception as error:
      full = any(sign in str(error) for sign in ('RESOURCE_EXHAUSTED', 'No space left'))
      reason = 'no space left' if full else first_line(error)
      _, steps = _find(self._folder.parent)
      rest = f'goes on from step {steps[0]}' if steps else 'starts again'
      raise UserError(
        f'{self._folder}: a checkpoint could not be saved ({reason}); mend that and '
        f'give the same command, which {rest}'
      ) from error

  def restore(self, like: TrainState, say: Callable[[str], None]) -> TrainState | None:
    """The newest whole checkpoint in the shapes and shardings of `like`, or None.

    Damaged ones that are newer are said, and renamed to `STEP.damaged` so that their
    steps can be saved again and their owner can still look at them.

    Raises: UserError if there are checkpoints and none is whole; then all stay as they
      are.
    """
    damaged = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      state, reason = None, 'another process could not read it'
      try:
        state = self._read(step, like)
      except Exception as error:  # a cut file surfaces as many kinds of error
        reason = first_line(error)
      if not _everywhere(state is not None):
        damaged[step] = reason
        continue
      for newer, reason in damaged.items():
        say(f'checkpoint {newer} is damaged ({reason}), now {self._set_aside(newer)}')
      return state
    if damaged:
      step, reason = next(iter(damaged.items()))
      raise UserError(
        f'no checkpoint in {self._folder} can be read (of step {step}: {reason}); '
        'start again in another --workdir'
      )
    return None

  def _read(self, step: int, like: TrainState) -> TrainState:
    items = {
      name: ocp.args.StandardRestore(_abstract(tree))
      for name, tree in _items(like).items()
    }
    found = self._manager.restore(step, args=ocp.args.Composite(**items))
    return TrainState(
      step=found['step'][0],
      params=found[ONLINE],
      target=None if like.target is None else found['target'],
      ema={name: found[f'ema.{name}'] for name in like.ema},
      opt_state=found['opt_state'],
    )

  def _set_aside(self, step: int) -> Path:
    aside = unused(self._folder / f'{step}.damaged')
    if jax.process_index() == 0:
      (self._folder / str(step)).rename(aside)
    multihost_utils.sync_global_devices(f'{step} is set aside')
    self._manager.reload()  # it remembers the steps it has seen
    return aside

  def close(self) -> None:
    """Waits for what is being saved, then lets go."""
    with self._silence, self._writing():
      self._manager.close()


def save_weights(
  workdir: str | Path, step: int, params: Params, meta: dict[str, Any]
) -> None:
  """A checkpoint of weights alone, without an optimiser: to load, not to go on from."""
  items = {
    ONLINE: ocp.args.StandardSave(params),
    'meta': ocp.args.JsonSave(meta | {'step': step}),
  }
  folder = Path(workdir).resolve() / 'checkpoints'
  with ocp.CheckpointManager(folder) as manager:
    manager.save(step, args=ocp.args.Composite(**items))


def any_in(workdir: str | Path) -> bool:
  """Whether a work directory holds a checkpoint, whole or not."""
  folders = (p for p in (Path(workdir) / 'checkpoints').glob('*') if p.is_dir())
  return any(p.name.isdigit() for p in folders)


def newest(
  path: str | Path, read: Callable[[int, dict[str, Any]], T], say: Callable[[str], None]
) -> T:
  """What `read(step, meta)` makes of a run's newest whole checkpoint, or the one named.

  Args:
    path: a work directory, or one of its `checkpoints/STEP`.
    read: reads more of that checkpoint; if it fails, the next older one is tried.
    say: told of each damaged checkpoint that is passed over.

  Raises: UserError if there is none, and whatever UserError `read` raises.
  """
  folder, steps = _find(path)
  for step in steps:
    try:
      meta = _read(folder, step, meta=ocp.args.JsonRestore())['meta']
      return read(step, meta)
    except UserError:
      raise
    except Exception as error:  # a cut file surfaces as many kinds of error
      where = folder / str(step)
      say(f'checkpoint {where} is damaged ({first_line(error)}), looking further')
  raise UserError(f'{path}: no whole checkpoint; is it the --workdir of a run?')


def read_weights(
  path: str | Path, step: int, name: str, like: Params, may_lack: str = ''
) -> Params:
  """One set of weights, `online` or the name of an EMA, in the shapes of `like`.

  The entry `may_lack` is left out of the result where the checkpoint has none.

  Raises: UserError if the checkpoint has no such weights, or those of another network,
    naming the first parameter that differs; whatever orbax raises if it is damaged.
  """
  folder, _ = _find(path)
  item = ONLINE if name == ONLINE else f'ema.{name}'
  if not (folder / str(step) / item).is_dir():
    emas = (p.name.removeprefix('ema.') for p in (folder / str(step)).glob('ema.*'))
    have = ', '.join([ONLINE, *sorted(emas)])
    raise UserError(f'{path}: no weights {name!r}; there are {have}')
  handlers = {item: ocp.StandardCheckpointHandler()}
  with (
    _quiet(),
    ocp.CheckpointManager(
      folder, options=_READ_ONLY, item_handlers=handlers
    ) as manager,
  ):
    found = manager.item_metadata(step)[item]
  if may_lack and may_lack not in found.tree:
    like = {key: value for key, value in like.items() if key != may_lack}
  _same_network(path, found.tree, like)
  return _read(folder, step, **{item: ocp.args.StandardRestore(_abstract(like))})[item]


_READ_ONLY = ocp.CheckpointManagerOptions(
  read_only=True, create=False, save_interval_steps=0
)


def _same_network(path: str | Path, found: Any, like: Params) -> None:
  there = {
    jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(found)
  }
  here = {
    jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(like)
  }
  for key in [*here, *there]:
    a, b = there.get(key), here.get(key)
    if a is None or b is None or tuple(a.shape) != tuple(b.shape):
      shapes = ['absent' if v is None else str(tuple(v.shape)) for v in (a, b)]
      raise UserError(
        f'{path} holds another network: parameter {key} is {shapes[0]} there and '
        f'{shapes[1]} here; give config.network and config.data of that run'
      )


def _find(path: str | Path) -> tuple[Path, list[int]]:
  path = Path(path).resolve()
  if path.name.isdigit() and path.parent.name == 'checkpoints' and path.is_dir():
    return path.parent, [int(path.name)]
  folder = path / 'checkpoints'
  if not folder.is_dir():
    raise UserError(f'{path}: no checkpoints there; is it the --workdir of a run?')
  steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir()]
  return folder, sorted(steps, reverse=True)


def _read(folder: Path, step: int, **items: Any) -> Any:
  with _quiet(), ocp.CheckpointManager(folder, options=_READ_ONLY) as manager:
    return manager.restore(step, args=ocp.args.Composite(**items))


def _everywhere(well: bool) -> bool:
  """Whether it went well in every process."""
  return bool(np.all(multihost_utils.process_allgather(np.array(well))))


def _items(state: TrainState) -> dict[str, Any]:
  items = {ONLINE: state.params, 'opt_state': state.opt_state, 'step': [state.step]}
  if state.target is not None:
    items['target'] = state.target
  return items | {f'ema.{name}': tree for name, tree in state.ema.items()}


def _abstract(tree: Any) -> Any:
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree
  )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps orbax from printing a page for each array that it cannot read or write."""
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  except BaseException:
    gc.collect()  # what failed complains again when it is let go: now, unheard
    raise
  finally:
    logger.setLevel(level)
    sys.unraisablehook = hook
