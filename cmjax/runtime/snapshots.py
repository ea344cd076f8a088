"""Snapshots of power-function averages, and averages put together from them.

A snapshot is kept for good, in `snapshots/STEP` of a work directory: the EMAs of
`cmjax.schedules:power`, saved, hashed and committed as a checkpoint is.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import jax

from cmjax import ema
from cmjax.core import Params, TrainState, UserError, first_line
from cmjax.runtime import checkpoint, logs, paths, sharding, storage
from cmjax.runtime.build import check_value, path_of
from cmjax.runtime.config_record import Config
from cmjax.runtime.errors import user_errors

MAX_ERROR = 0.1  # of a profile put together from snapshots (cmjax choice)
_KEY = 'config.sample_relative_std'
WIDTHS = 'relative_std'  # in the meta of a snapshot: of its EMAs, by name


def widths(config: Config) -> dict[str, float]:
  """The relative standard deviations of the power-function EMAs of a config."""
  parts: dict[str, Any] = dict(config.ema)
  return {
    name: float(part.relative_std)
    for name, part in parts.items()
    if path_of(part) == 'cmjax.schedules:power'
  }


class Snapshots:
  """The snapshots of one run; does nothing unless the config asks for them."""

  def __init__(self, workdir: str | Path, config: Config):
    self._widths = widths(config)
    self._stored = None
    if config.every.snapshot_steps:
      self._stored = checkpoint.Checkpoints(workdir, None, storage.SNAPSHOTS)

  def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts saving, unless the step is stored intact; the state may be donated."""
    if self._stored is None:
      return
    items = {f'ema.{name}': state.ema[name] for name in self._widths}
    if not self._stored.holds(step, items, logs.say):
      self._stored.save_items(step, items, meta | {WIDTHS: self._widths})

  def wait(self) -> None:
    """Waits for pending saves."""
    if self._stored is not None:
      self._stored.wait()

  def close(self) -> None:
    """Waits for pending saves, and closes the folder."""
    if self._stored is not None:
      self._stored.close()


def widths_in(meta: Any, path: str | Path) -> dict[str, float]:
  """The relative standard deviations of a snapshot's EMAs; of a checkpoint, none.

  Raises: UserError if they are invalid.
  """
  stored = meta.get(WIDTHS, {}) if isinstance(meta, Mapping) else {}
  try:
    for width in dict(stored).values():
      ema.check_relative_std(width)
  except (TypeError, ValueError) as error:
    raise UserError(f'{path}: {WIDTHS!r} of the snapshot is invalid') from error
  return dict(stored)


class Chosen(NamedTuple):
  """Which weights to read, and how."""

  config: Any  # of the weights; it may be one without `sample_relative_std`
  name: str  # empty: those that the config samples from
  held: Mapping[str, float]  # `widths_in` of the meta
  like: Params  # abstract parameters
  optional: Collection[str] = ()


def read(
  path: str | Path, step: int, chosen: Chosen, say: Callable[[str], None]
) -> Params:
  """The chosen weights of a checkpoint or a snapshot, or those put together.

  If the weights that the config samples from are none of a snapshot, its narrowest EMA,
  which is closest to the trained weights.

  Raises: UserError if there are no such weights, or they are of another network.
  """
  config, name, held, like, optional = chosen
  relative_std: Any = getattr(config, 'sample_relative_std', 0.0)
  check_value(relative_std, float, _KEY)
  if relative_std > 0 and not name:
    return put_together(path, step, relative_std, like, optional, say=say)
  name = name or str(config.sample_weights)
  if held and not chosen.name and name not in held:
    narrowest = min(held, key=lambda name: held[name])
    say(f'{path}: a snapshot, which has no weights {name!r}; opened {narrowest!r}')
    name = narrowest
  return checkpoint.read_weights(path, step, name, like, optional)


def put_together(
  path: str | Path,
  step: int,
  relative_std: float,
  like: Params,
  optional: Collection[str] = (),
  *,
  say: Callable[[str], None],
) -> Params:
  """The EMA of a width, as if it had been tracked up to a step, in shapes of `like`.

  Args:
    path: a work directory, or one of its `checkpoints/STEP` or `snapshots/STEP`.
    step: the average ends at the newest snapshot up to this step.
    relative_std: its width, a standard deviation relative to the training time.
    like: the abstract parameters.
    optional: as for `checkpoint.read_weights`.
    say: receives a line if the newest snapshot is older than the step.

  Raises: UserError if there are no snapshots, one of them is damaged or of another
    network, or they do not reproduce this width.
  """
  where, path = f'{_KEY}={relative_std:g}', paths.path(path)
  workdir = path.parent.parent if storage.is_step(path) else path
  folder = workdir / storage.SNAPSHOTS
  steps = [s for s in storage.steps_in(folder) if s <= step]
  if not steps:
    raise UserError(
      f'{where}: {workdir} has no snapshots up to step {step}; set it to 0, or train '
      'with config.every.snapshot_steps and EMAs of cmjax.schedules:power'
    )
  if steps[0] < step:
    say(f'{where}: of the newest snapshot, step {steps[0]:,} (not {step:,})')
  found: list[tuple[int, str]] = []
  profiles: list[ema.Profile] = []
  for at in sorted(steps):
    with _damage_reported(folder / str(at)):
      meta = storage.read(folder, at, {}).meta
    for name, width in widths_in(meta, folder / str(at)).items():
      found.append((at, name))
      profiles.append(ema.Profile(width, at))
  with user_errors(_KEY):
    made = ema.reconstruct(profiles, ema.Profile(relative_std, steps[0]))
  if made.error > MAX_ERROR:
    stored = ', '.join(f'{width:g}' for width in sorted({p[0] for p in profiles}))
    raise UserError(
      f'{where}: {len(steps)} snapshots of widths {stored} reproduce its profile with '
      f'an error of {made.error:.0%} (at most {MAX_ERROR:.0%}); choose a width closer '
      'to those, or train with a smaller config.every.snapshot_steps'
    )

  def whole(a):
    place = sharding.replicated(a.sharding.mesh)
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)

  def trees() -> Iterator[Params]:
    wanted = jax.tree.map(whole, like)
    for at, name in found:
      path = folder / str(at)
      with _damage_reported(path):
        tree = checkpoint.read_weights(path, at, name, wanted, optional)
      yield tree

  params = ema.combine(made.weights.tolist(), trees())
  shardings = {name: tree for name, tree in like.items() if name in params}
  return sharding.place(params, jax.tree.map(lambda a: a.sharding, shardings))


@contextlib.contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # damaged files raise errors of many types
    raise UserError(
      f'{path}: damaged ({first_line(error)}); move it away, and the other snapshots '
      'are used'
    ) from error
