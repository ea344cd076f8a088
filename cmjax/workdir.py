"""The folder of a run: which run it holds, its config, and who writes to it now."""

from collections.abc import Iterable, Iterator
import contextlib
import fcntl
import json
import os
from pathlib import Path
import socket
import threading
import time

from cmjax import checkpoint
from cmjax import config as configs
from cmjax.core import UserError


def folder(text: str) -> Path:
  """The path of a --workdir, once it can be a folder.

  Raises: UserError if none is given, it is not local, or a file stands in its way.
  """
  if not text:
    raise UserError('give --workdir=DIR, the folder of the run')
  path = checkpoint.local(text)
  for part in (path, *path.parents):
    if part.exists() and not part.is_dir():
      raise UserError(f'--workdir: {part} is a file, not a folder')
  return path


# The run it holds --------------------------------------------------------------------


def own_config(workdir: Path, trust: Iterable[str] = ()) -> configs.ConfigDict | None:
  """The config of the run in a work directory, None where there is no run.

  Read from `config.json`, or from the newest checkpoint if that file is missing.

  Raises: UserError if it cannot be read, or the folder holds weights alone.
  """
  path = workdir / 'config.json'
  if path.exists():
    return configs.read_json(path, trust)
  if not checkpoint.any_in(workdir):
    return None
  if not checkpoint.is_run(workdir):
    raise UserError(
      f'{workdir} holds weights and no run; to train from them give '
      f'--config.init_from={workdir} and another --workdir'
    )
  text = checkpoint.read_meta(workdir)['config']
  return configs.from_json(text, str(workdir), trust)


def config_for(
  name: str,
  workdir: Path | None,
  overrides: Iterable[tuple[str, str]] = (),
  trust: Iterable[str] = (),
) -> configs.ConfigDict:
  """The config that a command asks for, with its overrides, checked.

  Args:
    name: as for `config.load`; if empty, the config is that of the run in `workdir`.
    workdir: a work directory, which need not exist.
    overrides: dotted keys and the texts of their values.
    trust: packages whose functions the config of the run may name.

  Raises: UserError if there is no config, or it does not take the overrides.
  """
  config = configs.load(name, trust) if name else None
  if config is None and workdir is not None:
    config = own_config(workdir, trust)
    config = config and configs.completed(config)
  if config is None:
    raise UserError('give --config=NAME, such as ect:digits, or the --workdir of a run')
  for key, text in overrides:
    configs.override(config, key, text)
  return configs.checked(config)


def check_claim(workdir: Path, config: configs.ConfigDict) -> None:
  """Refuses a work directory that holds a run with another config, or weights alone.

  Raises: UserError naming what differs.
  """
  old = own_config(workdir)
  if old is None:
    return
  changed = [  # a key that runs did not have then is left out
    f'{key}: {change}'
    for key, change in configs.differences(old, config).items()
    if not key.startswith(_MAY_CHANGE) and key.split('.')[1] in old
  ]
  if changed:
    raise UserError(
      f'{workdir} holds a run with another config ({"; ".join(changed[:3])}); '
      'give that config, or another --workdir'
    )


# What may change while a run goes on: how it is looked at, and where its data lies.
_MAY_CHANGE = (
  'config.every.',
  'config.keep_checkpoints',
  'config.mesh.',
  'config.max_skipped_steps',
  'config.samplers.',
  'config.sample_weights',
  'config.metrics.',
  'config.studies.',
  'config.evaluation.',
  'config.data.data_dir',
  'config.data.path',
)


def write_config(workdir: Path, config: configs.ConfigDict) -> None:
  """Writes `config.json`. Raises: UserError if it cannot be written."""
  try:
    new = workdir / 'config.json.new'
    new.unlink(missing_ok=True)  # it may be a link
    new.write_text(configs.to_json(config), encoding='utf-8')
    new.replace(workdir / 'config.json')  # at once: a kill leaves the one or the other
  except OSError as error:
    raise UserError(f'--workdir: cannot write {workdir} ({error.strerror})') from error


def caught_up(workdir: Path) -> int | None:
  """The step whose pictures and evaluations are all made, if a run has ended."""
  try:
    return int((workdir / '.ended').read_text(encoding='ascii'))
  except (OSError, ValueError):
    return None


def mark_caught_up(workdir: Path, step: int) -> None:
  """Notes what `caught_up` reads: a checkpoint cannot be changed once it is saved."""
  new = workdir / '.ended.new'
  new.unlink(missing_ok=True)
  new.write_text(str(step), encoding='ascii')
  new.replace(workdir / '.ended')


# Who writes to it --------------------------------------------------------------------

BEAT_S = 5.0  # how often the owner of a lock touches it
PATIENCE_S = 3 * BEAT_S  # without a beat for as long, an owner elsewhere is gone


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
  """Makes the folder, and keeps every other process from training in it meanwhile.

  The lock is that of the operating system on the file `.lock`, so a process that dies
  holds it no longer. Where a file system keeps such locks within each host, the beat of
  an owner on another host shows that it is alive.

  Raises: UserError naming host and process of the owner, if there is one.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # A link may lead to a file of the user's, which is not to be touched.
    how = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    file = os.fdopen(os.open(workdir / '.lock', how, 0o666), 'a+b')
  except OSError as error:
    raise UserError(f'--workdir: cannot write {workdir} ({error.strerror})') from error
  with file:
    locked = _locked(file)
    if locked is False:
      _refuse(workdir, _owner(file, wait=True))
    owner = _owner(file)
    # Whoever holds no lock of ours to see may still be alive, and then it beats.
    unseen = locked is None or (owner and owner['host'] != socket.gethostname())
    if owner and unseen and _beats(file):
      _refuse(workdir, owner)
    _write_owner(file, {'host': socket.gethostname(), 'process': os.getpid()})
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(file.fileno(), ended), daemon=True)
    heart.start()
    try:
      yield
    finally:
      ended.set()
      heart.join()
      _write_owner(file, None)  # the file stays: to remove it could free another's lock


def _locked(file) -> bool | None:
  """Whether the lock is ours now; None where the file system has none."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:
    return None
  return True


def _owner(file, wait: bool = False) -> dict[str, object] | None:
  """Who wrote itself into a lock, if anyone; its owner may be about to."""
  for _ in range(20 if wait else 1):
    file.seek(0)
    try:
      owner = json.loads(file.read(4096))
      return {'host': str(owner['host'])[:80], 'process': int(owner['process'])}
    except (ValueError, TypeError, KeyError, RecursionError):
      time.sleep(0.05 if wait else 0)
  return None


def _write_owner(file, owner: dict[str, object] | None) -> None:
  file.truncate(0)  # opened to append: what is written next is all there is
  file.write(json.dumps(owner).encode() if owner else b'')
  file.flush()


def _refuse(workdir: Path, owner: dict[str, object] | None) -> None:
  who = 'another process'
  if owner:
    who = f'process {owner["process"]} on host {owner["host"]}'
  raise UserError(
    f'{workdir}: {who} is training there; wait for its end, or give another --workdir'
  )


def _beats(file) -> bool:
  """Whether an owner elsewhere touches the lock while it is watched."""
  before, until = os.fstat(file.fileno()).st_mtime_ns, time.monotonic() + PATIENCE_S
  while time.monotonic() < until:
    time.sleep(BEAT_S / 10)
    if os.fstat(file.fileno()).st_mtime_ns != before:
      return True
  return False


def _beat(descriptor: int, ended: threading.Event) -> None:
  while not ended.wait(BEAT_S):
    with contextlib.suppress(OSError):
      os.utime(descriptor)
