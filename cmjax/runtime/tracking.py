"""The trackers of a run: checked, started, and left out if they fail."""

from collections.abc import Iterator, Mapping
import contextlib
from importlib import metadata, util
from pathlib import Path
import re
import shutil
import traceback
from typing import Any, cast

import numpy as np

from cmjax.core import UserError, first_line
from cmjax.runtime import errors, logs, paths
from cmjax.runtime.build import bound, build, path_of
from cmjax.runtime.config_record import Config, ConfigDict
from cmjax.runtime.functions import Foreign
from cmjax.runtime.trackers import LIBRARIES, Library, Tracker


def check(parts: ConfigDict) -> None:
  """Checks the functions, keys and packages of the trackers, without starting them.

  A stored config may be a stranger's: it does not decide where a run is sent.

  Raises: UserError naming the key, or the package that is missing.
  """
  nothing: dict[str, Any] = dict(workdir=Path(), config={}, start=0)
  for name in parts:
    part, where = cast(ConfigDict, parts[name]), f'config.trackers.{name}'
    call = bound(part, where, Tracker, **nothing)
    library = LIBRARIES.get(call.func)
    if library is None:
      continue
    _check_installed(library, where)
    path, key = path_of(part), library.destination
    foreign = isinstance(path, Foreign) and library.package not in path.trusted
    if foreign and call.keywords.get(key):
      raise UserError(
        f'{where}.{key}: the stored config names where to send the run; if that is '
        f'right, give --trust={library.package}'
      )


def _check_installed(library: Library, where: str) -> None:
  package, oldest = library.package, '.'.join(map(str, library.oldest))
  advice = f"pip install '{library.distribution}>={oldest}'"
  if util.find_spec(package) is None:
    raise UserError(f'{where}: needs the package {package}; {advice}')
  try:
    installed = metadata.version(library.distribution)
  except metadata.PackageNotFoundError:  # found in another way than by pip
    return
  if tuple(map(int, re.findall(r'\d+', installed)[:2])) < library.oldest:
    raise UserError(f'{where}: needs {package} {oldest}, not {installed}; {advice}')


IDS = 'trackers'  # folder of the ids of runs of W&B and MLflow


class Trackers:
  """The trackers of a run, which receive what it logs while they are running.

  In a run that starts, each must start. When a run resumes, or later, one that fails is
  reported and left out: `metrics.jsonl` and `pictures/` have everything.

  The trackers of a run in a bucket write into a local folder. Of its files, the events
  of TensorBoard and the ids of runs are copied to the bucket, by `copy` and at the end.
  """

  def __init__(self, config: Config, workdir: Path, start: int):
    self._parts = config.trackers
    self._workdir, self._staging = workdir, paths.staging(workdir)
    self._copied: dict[str, dict[Path, tuple[int, int]]] = {}
    self._given: dict[str, Any] = dict(
      workdir=self._staging, config=config.to_dict(), start=start
    )
    self._running: dict[str, Tracker] = {}

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Starts the trackers, and closes them at the end.

    Raises: UserError if one does not start in a run that starts.
    """
    try:
      if self._parts and self._staging != self._workdir:
        self._stage()
      for name in self._parts:
        self._start(name)
      yield
    finally:
      self._close()
      self.copy()

  def _stage(self) -> None:
    """Makes the local folder, with the ids of runs that the bucket has."""
    # Events of an earlier start are in the bucket, or of steps that are repeated.
    shutil.rmtree(self._staging / 'tensorboard', ignore_errors=True)
    shutil.rmtree(self._staging / IDS, ignore_errors=True)
    self._staging.mkdir(parents=True, exist_ok=True)
    with paths.fetched(self._workdir, [f'{IDS}/*.json']) as found:
      if (found / IDS).is_dir():
        shutil.copytree(found / IDS, self._staging / IDS)
    logs.say(
      f'trackers write into {self._staging}; its tensorboard/ is copied to '
      f'{self._workdir} with each checkpoint, other files are not'
    )

  def copy(self) -> None:
    """Copies events and ids of runs to a bucket; a failure is reported."""
    if self._staging == self._workdir or not self._parts:
      return
    try:
      for tracker in self._running.values():
        getattr(tracker, 'flush', lambda: None)()
      for name in ('tensorboard', IDS):
        done = self._copied.setdefault(name, {})
        paths.upload(self._staging / name, self._workdir / name, done)
    except Exception as error:  # of a library or a network
      errors.say(f'{self._workdir}: cannot copy what trackers write: {error}')

  def _start(self, name: str) -> None:
    where = f'config.trackers.{name}'
    part = cast(ConfigDict, self._parts[name])
    try:
      self._running[name] = build(part, where, Tracker, **self._given)
    except UserError as error:
      if self._given['start'] == 0:
        raise
      _report(str(error))

  def log(self, step: int, values: Mapping[str, float | np.ndarray]) -> None:
    """Hands values of a step to every tracker that has not failed."""
    for name, tracker in list(self._running.items()):
      try:
        tracker.log(step, values)
      except Exception as error:  # of a library, a network or the user's own code
        del self._running[name]
        _report_of(name, tracker, error)
        with contextlib.suppress(Exception):  # reported once
          tracker.close()

  def _close(self) -> None:
    while self._running:
      name, tracker = self._running.popitem()
      try:
        tracker.close()
      except Exception as error:
        _report_of(name, tracker, error)


def _report_of(name: str, tracker: Tracker, error: Exception) -> None:
  if not type(tracker).__module__.startswith('cmjax.'):
    traceback.print_exception(error.with_traceback(errors.frame_of_user(error)))
  _report(f'config.trackers.{name}: failed ({first_line(error)})')


def _report(text: str) -> None:
  errors.say(f'{text}; left out until the next start, and metrics.jsonl has all rows')
