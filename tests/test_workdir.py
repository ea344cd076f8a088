"""A work directory: whose run it holds, and one process at a time that trains in it."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import threading

import pytest

from cmjax.core import UserError
from cmjax.runtime import lock as locks
from cmjax.runtime.config import load
from cmjax.runtime.lock import _beat, lock
from cmjax.runtime.workdir import check_claim, config_for, folder, write_config
from tests.test_build import refusal


@pytest.fixture
def config():
  return load('edm:digits')


def hold(path, held, release):
  """Keeps the lock in a process of its own until it may go, or is killed."""
  with lock(path):
    held.set()
    release.wait()


@pytest.fixture
def owner(tmp_path):
  """A process that has the lock of `tmp_path`."""
  spawn = multiprocessing.get_context('spawn')
  held, release = spawn.Event(), spawn.Event()
  process = spawn.Process(target=hold, args=(tmp_path, held, release))
  process.start()
  assert held.wait(60)
  yield process, release
  process.kill()


def locked(path):
  with lock(path):
    return json.loads((path / '.lock').read_text())


def test_a_second_process_is_refused_by_host_and_process(owner, tmp_path):
  told = refusal(locked, tmp_path)
  assert f'process {owner[0].pid} on host {socket.gethostname()} is training' in told
  owner[1].set()
  owner[0].join()
  assert locked(tmp_path)['process'] == os.getpid()


def test_a_lock_ends_with_its_owner_however_that_ends(owner, tmp_path):
  os.kill(owner[0].pid, signal.SIGKILL)
  owner[0].join()
  assert json.loads((tmp_path / '.lock').read_text())['process'] == owner[0].pid
  assert locked(tmp_path) == {'host': socket.gethostname(), 'process': os.getpid()}


def test_a_lock_may_be_taken_again_in_one_process(tmp_path):
  for _ in range(2):
    locked(tmp_path / 'new')
  assert (tmp_path / 'new' / '.lock').read_text() == ''


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """A lock that an owner on another host left; theirs is not seen by flock."""
  monkeypatch.setattr(locks, 'BEAT_S', 0.1)
  monkeypatch.setattr(locks, 'PATIENCE_S', 0.5)
  (tmp_path / '.lock').write_text('{"host": "another-host", "process": 7}')
  return tmp_path


def test_an_owner_on_another_host_that_is_gone_is_not_in_the_way(elsewhere):
  assert locked(elsewhere)['process'] == os.getpid()


def test_an_owner_on_another_host_that_is_alive_is(elsewhere):
  ended = threading.Event()
  with open(elsewhere / '.lock', 'rb') as file:
    heart = threading.Thread(target=_beat, args=(file.fileno(), ended))
    heart.start()
    told = refusal(locked, elsewhere)
    ended.set()
    heart.join()
  assert 'process 7 on host another-host is training in it' in told


def test_where_a_file_system_has_no_locks_the_beat_alone_decides(
  elsewhere, monkeypatch
):
  def none(*_):
    raise OSError(errno.ENOTSUP, 'not supported')

  monkeypatch.setattr(fcntl, 'flock', none)
  mine = {'host': socket.gethostname(), 'process': 7}
  (elsewhere / '.lock').write_text(json.dumps(mine))
  assert locked(elsewhere)['process'] == os.getpid()
  with lock(elsewhere):
    assert 'is training in it' in refusal(locked, elsewhere)


@pytest.mark.parametrize('text', ['', '[]', '3', '{"host": 1}', '\x00' * 9, '[' * 5000])
def test_a_lock_file_that_nobody_can_read_is_not_in_the_way(text, tmp_path):
  (tmp_path / '.lock').write_text(text)
  assert locked(tmp_path)['process'] == os.getpid()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
  (tmp_path / 'precious').write_text('kept')
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / '.lock').symlink_to(tmp_path / 'precious')
  assert '--workdir: cannot write' in refusal(locked, tmp_path / 'run')
  assert (tmp_path / 'precious').read_text() == 'kept'


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  assert '--workdir: cannot write' in refusal(locked, tmp_path / 'file' / 'run')


def test_the_folder_of_a_command():
  assert folder('runs/x').name == 'x'
  assert refusal(folder, '').startswith('give --workdir=DIR')
  for place in ('s3://bucket/run', 'file:///tmp/x'):
    assert place in refusal(folder, place)


def test_a_claim_is_by_config(config, tmp_path):
  check_claim(tmp_path, config)
  write_config(tmp_path, config)
  check_claim(tmp_path, config)
  more = load('edm:digits', evaluation=dict(num_samples=77))
  check_claim(tmp_path, more)  # how a run is evaluated may change
  told = refusal(check_claim, tmp_path, config.replace(seed=3))
  assert 'holds a run with another config (config.seed: 0 -> 3)' in told


def test_a_command_without_a_config_goes_on_with_that_of_the_run(config, tmp_path):
  network = config.network.to_dict() | dict(width=24)
  write_config(tmp_path, config.replace(network=network))
  found = config_for('', tmp_path, [('evaluation.num_samples', '50')])
  assert (found.network.width, found.evaluation.num_samples) == (24, 50)
  with pytest.raises(UserError, match='give --config=NAME'):
    config_for('', tmp_path / 'none')


@pytest.mark.parametrize('text', ['[]', '3', 'null', '{}', '', '[' * 100_000])
def test_a_damaged_config_of_a_run_is_one_line(text, tmp_path):
  (tmp_path / 'config.json').write_text(text)
  told = refusal(config_for, '', tmp_path)
  assert str(tmp_path / 'config.json') in told
