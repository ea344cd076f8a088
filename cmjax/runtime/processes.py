"""What each process of a run is doing, in files of its folder that all of them read."""

from collections.abc import Iterator, Mapping
import contextlib
import json
import os
from pathlib import Path
import secrets
import socket
import threading
from typing import NamedTuple

import jax

from cmjax.runtime import paths, sharding

FOLDER = '.processes'
NUM_READS = 3  # two periods: a process that writes once per period has done so
DOING = {
  'data': 'waits for its data',
  'compute': 'waits for its devices or for a collective',
  'logs': 'writes logs, or waits for a tracker',
  'pause': 'compiles, or is in a hook, an evaluation or a save',
}


class Status(NamedTuple):
  """What a process is doing."""

  host: str
  pid: int
  step: int
  doing: str  # a key of DOING
  count: int = 0  # of writes: it shows that the process runs, whatever its clock


Reading = Mapping[int, Status | None]  # by process; None: no file that can be read


class Processes:
  """Writes a file for this process once per period, and reads those of the others.

  A thread does both, as a file system may hang. Each write is a new file, since mounted
  buckets may return old contents of a name for a minute. Names begin with one of the
  start, so that files of earlier starts are ignored. Creating an instance is a
  collective.
  """

  def __init__(self, workdir: Path, period_s: float):
    self._folder, self._period_s = workdir / FOLDER, period_s
    self._index = jax.process_index()
    self._others = [i for i in range(jax.process_count()) if i != self._index]
    self._start = sharding.from_process_0(lambda: secrets.token_hex(8))
    self.mine = Status(socket.gethostname(), os.getpid(), 0, 'pause')
    self._reading = False
    self._readings: list[Reading] = []
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def update(self, step: int, doing: str) -> None:
    """Changes what the next write contains."""
    self.mine = self.mine._replace(step=step, doing=doing)

  def read(self, wanted: bool) -> None:
    """Starts or ends reading."""
    self._reading = wanted

  def readings(self) -> list[Reading]:
    """The last `NUM_READS` readings, oldest first; fewer at the beginning."""
    return list(self._readings)

  def close(self) -> None:
    """Ends the thread, which removes the file; does not wait for a file system."""
    self._closed.set()
    self._thread.join(self._period_s)

  def _run(self) -> None:
    old, count = None, 0
    with _ignoring_storage():
      self._folder.mkdir(parents=True, exist_ok=True)
    if self._index == 0:
      self._remove_earlier_starts()
    while True:
      count += 1
      new = self._folder / f'{self._start}-{self._index}-{count}'
      with _ignoring_storage():
        row = self.mine._replace(count=count)._asdict()
        new.write_text(json.dumps(row), encoding='utf-8')
        if old:
          old.unlink()
        old = new
      kept = self._readings[1 - NUM_READS :]
      self._readings = [*kept, self._read()] if self._reading else []
      if self._closed.wait(self._period_s):
        break
    with _ignoring_storage():
      if old:
        old.unlink()

  def _remove_earlier_starts(self) -> None:
    with _ignoring_storage():
      for path in list(self._folder.iterdir()):
        if not path.name.startswith(self._start):
          path.unlink()

  def _read(self) -> Reading:
    found: dict[int, Status | None] = dict.fromkeys(self._others)
    for _ in range(3):  # the newest file may be half written, or just be replaced
      with _ignoring_storage():
        newest = self._newest()
        for i in [i for i, status in found.items() if status is None and i in newest]:
          path = self._folder / f'{self._start}-{i}-{newest[i]}'
          with contextlib.suppress(ValueError, TypeError), _ignoring_storage():
            found[i] = Status(**json.loads(path.read_text(encoding='utf-8')))
      if None not in found.values():
        break
      self._closed.wait(0.05)
    return found

  def _newest(self) -> dict[int, int]:
    """The count of the newest file of each process of this start."""
    newest: dict[int, int] = {}
    for path in self._folder.iterdir():
      start, _, rest = path.name.partition('-')
      if start == self._start:
        index, count = map(int, rest.split('-'))
        newest[index] = max(count, newest.get(index, 0))
    return newest


@contextlib.contextmanager
def _ignoring_storage() -> Iterator[None]:
  """Ignores errors of storage, which may not answer for a time."""
  try:
    yield
  except Exception as error:
    if not paths.reason(error):
      raise


def paused(readings: list[Reading]) -> bool:
  """Whether another process that responds does something that may take long."""
  if not readings:
    return False
  silent = _silent(readings)
  last = readings[-1].items()
  return any(s is not None and s.doing == 'pause' and i not in silent for i, s in last)


def diagnosis(index: int, mine: Status, readings: list[Reading]) -> str:
  """Which processes hang, and what they wait for.

  Args:
    index: of this process.
    mine: what this process is doing.
    readings: of the other processes, in order; empty if there are no others.
  """
  if not readings:
    return f'this process {DOING[mine.doing]}'
  if len(readings) < NUM_READS:
    return (
      f'this process {DOING[mine.doing]}; the files in {FOLDER} of the other processes '
      'cannot be read in time'
    )
  before, after = readings[0], readings[-1]
  if silent := _silent(readings):
    return _listed([_silence(i, after[i]) for i in silent])
  everyone = {i: status for i, status in after.items() if status is not None}
  everyone[index] = mine
  # Only `compute` waits for other processes, so that any other is a cause.
  causes = [
    f'{_name(i, s)} {DOING[s.doing]} at step {s.step}'
    for i, s in sorted(everyone.items())
    if s.doing != 'compute' and (i == index or _unchanged(before[i], s))
  ]
  if causes:
    return _listed(causes)
  first, last = (f(s.step for s in everyone.values()) for f in (min, max))
  if first == last:
    return f'all processes wait for a device or a collective at step {first}'
  behind = [
    f'{_name(i, s)} has only reached step {first}, where it {DOING[s.doing]}'
    for i, s in sorted(everyone.items())
    if s.step == first
  ]
  return _listed(behind)


def _silent(readings: list[Reading]) -> list[int]:
  before, after = readings[0], readings[-1]
  if len(readings) < NUM_READS:
    return []
  return [
    i
    for i, status in after.items()
    if status is None or ((old := before[i]) and old.count == status.count)
  ]


def _silence(index: int, status: Status | None) -> str:
  if status is None:
    return (
      f'process {index} has no file in {FOLDER}: it has ended, or does not share the '
      'work directory'
    )
  return (
    f'{_name(index, status)} does not respond: it is stopped or dead, or cannot write; '
    f'last seen at step {status.step}, where it {DOING[status.doing]}'
  )


def _unchanged(before: Status | None, after: Status) -> bool:
  return before is not None and before._replace(count=after.count) == after


def _name(index: int, status: Status) -> str:
  return f'process {index} ({status.host}, pid {status.pid})'


def _listed(causes: list[str]) -> str:
  more = f'; and {len(causes) - 3} more processes' if len(causes) > 3 else ''
  return '; '.join(causes[:3]) + more
