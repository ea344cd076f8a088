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

from cmjax import config as configs
from cmjax import workdir as workdirs
from cmjax.core import UserError
from tests.test_build import refusal


@pytest.fixture
def config():
  return configs.load('edm:digits')


def hold(folder, held, release):
  """Keeps the lock in a process of its own until it may go, or is killed."""
  with workdirs.lock(folder):
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


def locked(folder):
  with workdirs.lock(folder):
    return json.loads((folder / '.lock').read_text())


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
  monkeypatch.setattr(workdirs, 'BEAT_S', 0.1)
  monkeypatch.setattr(workdirs, 'PATIENCE_S', 0.5)
  (tmp_path / '.lock').write_text('{"host": "another-host", "process": 7}')
  return tmp_path


def test_an_owner_on_another_host_that_is_gone_is_not_in_the_way(elsewhere):
  assert locked(elsewhere)['process'] == os.getpid()


def test_an_owner_on_another_host_that_is_alive_is(elsewhere):
  ended = threading.Event()
  with open(elsewhere / '.lock', 'rb') as file:
    heart = threading.Thread(target=workdirs._beat, args=(file.fileno(), ended))
    heart.start()
    told = refusal(locked, elsewhere)
    ended.set()
    heart.join()
  assert 'process 7 on host another-host is training there' in told


def test_where_a_file_system_has_no_locks_the_beat_alone_decides(
  elsewhere, monkeypatch
):
  def none(*_):
    raise OSError(errno.ENOTSUP, 'not supported')

  monkeypatch.setattr(fcntl, 'flock', none)
  mine = {'host': socket.gethostname(), 'process': 7}
  (elsewhere / '.lock').write_text(json.dumps(mine))
  assert locked(elsewhere)['process'] == os.getpid()
  with workdirs.lock(elsewhere):
    assert 'is training there' in refusal(locked, elsewhere)


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
  assert workdirs.folder('runs/x').name == 'x'
  assert refusal(workdirs.folder, '').startswith('give --workdir=DIR')
  for place in ('gs://bucket/run', 's3://bucket/run', 'file:///tmp/x'):
    assert place in refusal(workdirs.folder, place)


def test_a_claim_is_by_config(config, tmp_path):
  workdirs.check_claim(tmp_path, config)
  workdirs.write_config(tmp_path, config)
  workdirs.check_claim(tmp_path, config)
  config.evaluation.samples = 77  # how a run is looked at may change
  workdirs.check_claim(tmp_path, config)
  config.seed = 3
  told = refusal(workdirs.check_claim, tmp_path, config)
  assert 'holds a run with another config (config.seed: 0 -> 3)' in told


def test_a_command_without_a_config_goes_on_with_that_of_the_run(config, tmp_path):
  config.network.width = 24
  workdirs.write_config(tmp_path, config)
  found = workdirs.config_for('', tmp_path, [('evaluation.samples', '50')])
  assert (found.network.width, found.evaluation.samples) == (24, 50)
  with pytest.raises(UserError, match='give --config=NAME'):
    workdirs.config_for('', tmp_path / 'none')


@pytest.mark.parametrize('text', ['[]', '3', 'null', '{}', '', '[' * 100_000])
def test_a_damaged_config_of_a_run_is_one_line(text, tmp_path):
  (tmp_path / 'config.json').write_text(text)
  told = refusal(workdirs.config_for, '', tmp_path)
  assert str(tmp_path / 'config.json') in told
