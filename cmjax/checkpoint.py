"""Save and restore of TrainState and config: the only door for orbax.

A checkpoint holds params, target, optimiser state and each EMA as separate items, so
that one set of weights can be read alone, and `meta`: the resolved config, the step,
the shape of an example, and hashes of every array and of itself. A step is committed
whole or not at all, and what is read is compared with its hashes.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import gc
import itertools
import json
import logging
import operator
from pathlib import Path
import re
import sys
from typing import Any, NamedTuple, TypeVar
import warnings

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
import xxhash

from cmjax import sharding
from cmjax.core import Params, TrainState, UserError, first_line, unused

T = TypeVar('T')

ONLINE = 'online'  # the name of the weights that are trained, beside those of EMAs
TARGET = 'target'  # the name of the target network's


class Checkpoints:
  """The checkpoints of one run, under `workdir/checkpoints`."""

  def __init__(self, workdir: str | Path, keep: int):
    self._silence = contextlib.ExitStack()
    # Failures in the background are reported below.
    self._silence.enter_context(_quiet())
    self._folder = local(workdir).resolve() / 'checkpoints'
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
    args = _to_save(_items(state), meta | {'step': step})
    with self._writing():
      self._manager.save(step, args=args)

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
        f'{self._folder}: a checkpoint could not be saved ({reason}); fix that and '
        f'give the same command, which {rest}'
      ) from error

  def restore(
    self, like: TrainState, say: Callable[[str], None]
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest whole checkpoint in the shapes and shardings of `like`, and its meta.

    None if there is no checkpoint. Damaged ones that are newer are reported, and
    renamed to `STEP.damaged` so that their steps can be saved again and their owner can
    still look at them.

    Raises: UserError if there are checkpoints and none is whole; then all stay as they
      are.
    """
    damaged = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        found, meta, _ = _restored(self._manager, step, _items(like))
      except Exception as error:  # a cut file surfaces as many kinds of error
        damaged[step] = first_line(error)
      else:
        for newer, reason in damaged.items():
          say(f'checkpoint {newer} is damaged ({reason}), now {self._set_aside(newer)}')
        return _state(found, like), meta
      _collect()
    if damaged:
      step, reason = next(iter(damaged.items()))
      raise UserError(
        f'no checkpoint in {self._folder} can be read (of step {step}: {reason}); '
        'start again in another --workdir'
      )
    return None

  def _set_aside(self, step: int) -> Path:
    aside = unused(self._folder / f'{step}.damaged')
    if jax.process_index() == 0:
      (self._folder / str(step)).rename(aside)
    multihost_utils.sync_global_devices(f'{step} is set aside')
    self._manager.reload()  # it remembers the steps it has seen
    return aside

  def close(self) -> None:
    """Waits for what is being saved, and releases the folder."""
    with self._silence, self._writing():
      self._manager.close()


def save_weights(
  workdir: str | Path, step: int, params: Params, meta: dict[str, Any]
) -> None:
  """A checkpoint of weights alone, without an optimiser: to load, not to go on from."""
  args = _to_save({ONLINE: params}, meta | {'step': step})
  folder = local(workdir).resolve() / 'checkpoints'
  with ocp.CheckpointManager(folder) as manager:
    manager.save(step, args=args)


def any_in(workdir: str | Path) -> bool:
  """Whether a work directory holds a checkpoint, whole or not."""
  folders = (p for p in (local(workdir) / 'checkpoints').glob('*') if p.is_dir())
  return any(p.name.isdigit() for p in folders)


def is_run(path: str | Path) -> bool:
  """Whether checkpoints hold an optimiser state, to go on from, or weights alone.

  Raises: UserError if there is no folder of checkpoints.
  """
  folder, steps = _find(path)
  return any((folder / str(step) / 'opt_state').is_dir() for step in steps)


def newest(
  path: str | Path, read: Callable[[int, dict[str, Any]], T], say: Callable[[str], None]
) -> T:
  """What `read(step, meta)` makes of a run's newest whole checkpoint, or the one named.

  Args:
    path: a work directory, or one of its `checkpoints/STEP`.
    read: reads more of that checkpoint; if it fails, the next older one is tried.
    say: receives a line for each damaged checkpoint that is passed over.

  Raises: UserError if there is none, and whatever UserError `read` raises.
  """
  folder, steps = _find(path)
  for step in steps:
    with _quiet():
      try:
        _, meta, _ = _read(folder, step, {})
        return read(step, meta)
      except UserError:
        raise
      except Exception as error:  # a cut file surfaces as many kinds of error
        reason = first_line(error)
      _collect()
    say(f'checkpoint {folder / str(step)} is damaged ({reason}), looking further')
  raise UserError(f'{path}: no whole checkpoint; is it the --workdir of a run?')


def read_meta(path: str | Path) -> dict[str, Any]:
  """The meta of a run's newest checkpoint whose meta is whole, or of the one named.

  Raises: UserError if there is none.
  """
  return newest(path, lambda step, meta: meta, lambda line: None)


def read_weights(
  path: str | Path, step: int, name: str, like: Params, may_lack: str = ''
) -> Params:
  """One set of weights, in the shapes of `like`.

  `name` is `online`, `target` or that of an EMA. The entry `may_lack` is left out of
  the result where the checkpoint has none.

  Raises: UserError if the checkpoint has no such weights, or those of another network,
    naming the first parameter that differs; ValueError if they are not what was saved,
    or whatever orbax raises if they are damaged.
  """
  folder, _ = _find(path)
  item = name if name in (ONLINE, TARGET) else f'ema.{name}'
  _, _, arrays = _read(folder, step, {})
  if arrays is None:
    arrays = _unrecorded(folder, step, item)
  if item not in arrays:
    names = [n for n in (ONLINE, TARGET) if n in arrays]
    names += sorted(i.removeprefix('ema.') for i in arrays if i.startswith('ema.'))
    raise UserError(f'{path}: no weights {name!r}; there are {", ".join(names)}')
  if may_lack and not any(key.split('/')[0] == may_lack for key in arrays[item]):
    like = {key: value for key, value in like.items() if key != may_lack}
  _same_network(path, arrays[item], like)
  return _read(folder, step, {item: like})[0][item]


def local(path: str | Path) -> Path:
  """A path in a local or mounted file system.

  Raises: UserError for the address of a bucket, such as `gs://bucket/run`.
  """
  # A Path has one slash where its text had two.
  if re.match(r'[A-Za-z][A-Za-z0-9+.-]+:/', str(path)):
    raise UserError(
      f'{path}: only local or mounted folders can be opened; copy it to one, or mount '
      'the bucket'
    )
  return Path(path)


class Saved(NamedTuple):
  """What the meta of a checkpoint records of one array."""

  dtype: str
  shape: tuple[int, ...]
  block: tuple[int, ...] = ()  # shape of the parts that devices held
  hash: str = ''  # XXH3-64 of each part, combined by XOR, in hexadecimal


Arrays = dict[str, dict[str, Saved]]  # by item, and by path inside it


def _to_save(items: Mapping[str, Any], meta: dict[str, Any]) -> ocp.args.Composite:
  """Arguments that save `items`, and `meta` with a hash of each array and of itself."""
  meta = meta | {'arrays': {name: _record(tree) for name, tree in items.items()}}
  meta['hash'] = _hash_of_meta(meta)
  return ocp.args.Composite(
    meta=ocp.args.JsonSave(meta),
    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
  )


def _restored(
  manager: ocp.CheckpointManager, step: int, likes: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], Arrays | None]:
  """Items of a step in the shapes of `likes`, its meta, and what it records of arrays.

  Checkpoints of version 0.2 have no record, and are not compared.

  Raises: in every process if in one: ValueError if something is not what was saved, or
    whatever orbax raises.
  """
  args = {
    name: ocp.args.StandardRestore(_abstract(like)) for name, like in likes.items()
  }
  args['meta'] = ocp.args.JsonRestore()

  def read():
    found = manager.restore(step, args=ocp.args.Composite(**args))
    return found, *_opened_meta(found['meta'], step)

  found, meta, arrays = _agreed(read)
  if arrays is not None:
    for name in likes:
      now = _record(found[name], arrays[name])
      _agreed(functools.partial(_compare, name, arrays[name], now))
  return found, meta, arrays


def _opened_meta(meta: Any, step: int) -> tuple[dict[str, Any], Arrays | None]:
  """The meta as it was given to `save`, and the record of arrays if it has one.

  Raises: ValueError if it is not what was saved.
  """
  if not isinstance(meta, dict):
    raise ValueError('meta is not a dict')
  given = {key: value for key, value in meta.items() if key not in ('arrays', 'hash')}
  recorded = given.keys() != meta.keys()  # by either key: damage may hide one
  if recorded and meta.pop('hash', '') != _hash_of_meta(meta):
    raise ValueError('meta is not what was saved')
  if given.get('step') != step or not {'config', 'shape', 'classes'} <= given.keys():
    raise ValueError('meta is of something else')
  if not recorded:
    return given, None
  arrays = {
    item: {key: _saved(*values) for key, values in those.items()}
    for item, those in meta['arrays'].items()
  }
  return given, arrays


def _saved(dtype: str, shape: list[int], block: list[int], digest: str) -> Saved:
  return Saved(dtype, tuple(shape), tuple(block), digest)


def _hash_of_meta(meta: dict[str, Any]) -> str:
  return xxhash.xxh3_64_hexdigest(json.dumps(meta, sort_keys=True).encode())


def _record(tree: Any, earlier: Mapping[str, Saved] | None = None) -> dict[str, Saved]:
  """What is recorded of each array of a tree, by its path; the same in every process.

  Hashes are of the parts that devices hold, or of the blocks of an `earlier` record.
  """
  leaves, blocks, hashes = _by_path(tree), {}, {}
  for key, a in leaves.items():
    known = earlier and key in earlier
    blocks[key] = earlier[key].block if known else a.sharding.shard_shape(a.shape)
    parts = (_hash_of_part(*part) for part in _parts(a, blocks[key]))
    hashes[key] = functools.reduce(operator.xor, parts, 0)
  shared = [k for k, a in leaves.items() if _is_spread(a) and _lies_in(a, blocks[k])]
  if shared:  # no process has all parts of these
    own = np.array([hashes[key] for key in shared], np.uint64)
    # In halves, as JAX has 32 bits.
    of_all = multihost_utils.process_allgather(own.view(np.uint32))
    of_all = np.ascontiguousarray(of_all).view(np.uint64)
    hashes |= zip(shared, np.bitwise_xor.reduce(of_all).tolist())
  return {
    key: Saved(str(a.dtype), a.shape, blocks[key], f'{hashes[key]:016x}')
    for key, a in leaves.items()
  }


def _parts(
  a: jax.Array, block: tuple[int, ...]
) -> Iterator[tuple[list[int], np.ndarray]]:
  """Where each block of an array starts, and its values.

  All blocks, or where no process holds the whole array and devices hold these very
  blocks, those that this process is the first to hold.
  """
  if _lies_in(a, block) and not a.is_fully_replicated:
    for shard in a.addressable_shards:
      if shard.replica_id == 0:
        yield [axis.start or 0 for axis in shard.index], np.asarray(shard.data)
    return
  if _is_spread(a):
    whole = multihost_utils.process_allgather(a, tiled=True)
  else:
    whole = np.asarray(a)
  starts = (range(0, n, max(k, 1)) for n, k in zip(a.shape, block, strict=True))
  for start in itertools.product(*starts):
    yield list(start), whole[tuple(slice(i, i + k) for i, k in zip(start, block))]


def _is_spread(a: jax.Array) -> bool:
  """Whether no process holds the whole array."""
  return not (a.is_fully_addressable or a.is_fully_replicated)


def _lies_in(a: jax.Array, block: tuple[int, ...]) -> bool:
  """Whether devices hold blocks of that shape."""
  return a.sharding.shard_shape(a.shape) == block


def _hash_of_part(start: list[int], part: np.ndarray) -> int:
  hasher = xxhash.xxh3_64(str(start).encode())
  hasher.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
  return hasher.intdigest()


def _compare(item: str, saved: dict[str, Saved], found: dict[str, Saved]) -> None:
  for key in [*saved, *found]:
    if saved.get(key) != found.get(key):
      raise ValueError(f'{item}/{key} is not what was saved')


def _by_path(tree: Any) -> dict[str, Any]:
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


_READ_ONLY = ocp.CheckpointManagerOptions(
  read_only=True, create=False, save_interval_steps=0
)


def _unrecorded(folder: Path, step: int, item: str) -> Arrays:
  """The items of a step that records no arrays; of `item` alone with its arrays."""
  items = {p.name: {} for p in (folder / str(step)).iterdir() if p.is_dir()}
  if item in items:
    handlers = {item: ocp.StandardCheckpointHandler()}
    with (
      _quiet(),
      ocp.CheckpointManager(
        folder, options=_READ_ONLY, item_handlers=handlers
      ) as manager,
    ):
      found = _by_path(manager.item_metadata(step)[item].tree)
    items[item] = {k: Saved(str(a.dtype), tuple(a.shape)) for k, a in found.items()}
  return items


def _same_network(path: str | Path, saved: dict[str, Saved], like: Params) -> None:
  ours = {k: Saved(str(a.dtype), a.shape) for k, a in _by_path(like).items()}
  for key in [*ours, *saved]:
    a, b = saved.get(key), ours.get(key)
    if a is None or b is None or a[:2] != b[:2]:
      differ = 'dtype' if a and b and a.shape == b.shape else 'shape'
      theirs, here = (str(getattr(v, differ)) if v else 'missing' for v in (a, b))
      raise UserError(
        f'{path} holds another network: parameter {key} is {theirs} there and '
        f'{here} here; give config.network and config.data of that run'
      )


def _find(path: str | Path) -> tuple[Path, list[int]]:
  path = local(path).resolve()
  if path.name.isdigit() and path.parent.name == 'checkpoints' and path.is_dir():
    return path.parent, [int(path.name)]
  folder = path / 'checkpoints'
  if not folder.is_dir():
    raise UserError(f'{path}: no checkpoints there; is it the --workdir of a run?')
  steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir()]
  return folder, sorted(steps, reverse=True)


def _read(
  folder: Path, step: int, likes: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], Arrays | None]:
  with _quiet(), ocp.CheckpointManager(folder, options=_READ_ONLY) as manager:
    return _restored(manager, step, likes)


def _agreed(read: Callable[[], T]) -> T:
  """What `read` returns, if it raises in no process.

  Raises: what it raised here, or OSError if it raised in another process alone.
  """
  found, failure = None, OSError('another process could not read it')
  try:
    found, well = read(), True
  except Exception as error:  # a cut file surfaces as many kinds of error
    failure, well = error, False
  if not sharding.all_true(well):
    raise failure
  return found


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


def _abstract(tree: Any) -> Any:
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree
  )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps orbax from printing a page for each array that it cannot read or write."""
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  levels = {name: logging.getLogger(name).level for name in ('absl', 'asyncio')}
  for name in levels:
    logging.getLogger(name).setLevel(logging.CRITICAL)
  try:
    yield
  except BaseException:
    _collect()
    raise
  finally:
    for name, level in levels.items():
      logging.getLogger(name).setLevel(level)
    sys.unraisablehook = hook


def _collect() -> None:
  """Frees what failed, which prints once more then: to be called inside `_quiet`."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    gc.collect()
