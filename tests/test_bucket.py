"""Runs in a bucket: the same bits as in a folder, one owner, and no silent loss."""

import importlib.util
import json
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cmjax import main
from cmjax.core import UserError, unused
from cmjax.runtime import (
  bucket_lock,
  checkpoint,
  errors,
  paths,
  results,
  row_file,
  storage,
)
from cmjax.runtime.lock import lock, trained_by
from cmjax.runtime.workdir import folder
from tests.bucket import Bucket
from tests.conftest import ROOT
from tests.test_build import refusal
from tests.test_checkpoint import META, restore, same, save, state
from tests.test_main import SMALL

missing = [
  name
  for name in ('gcsfs', 'gcp_storage_emulator')
  if importlib.util.find_spec(name) is None
]
needs_emulator = pytest.mark.skipif(
  bool(missing), reason=f'not installed: {" and ".join(missing)}'
)


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  """A bucket that this process and its children use."""
  server = Bucket(tmp_path_factory.mktemp('server'))
  server.start()
  with pytest.MonkeyPatch.context() as patch:
    for name, value in server.environment.items():
      patch.setenv(name, value)
    yield server
  server.stop()


@pytest.fixture
def run(server, request):
  """A new folder in the bucket."""
  name = ''.join(c if c.isalnum() else '_' for c in request.node.name)
  return paths.path(f'gs://bucket/tests/{name}')


@pytest.fixture
def quick(monkeypatch):
  """Locks that are renewed and given up quickly."""
  monkeypatch.setattr(bucket_lock, 'BEAT_S', 0.2)
  monkeypatch.setattr(bucket_lock, 'PATIENCE_S', 1.5)


# Paths -----------------------------------------------------------------------------


def test_a_path_without_an_address_is_local(tmp_path):
  for name in ('a:b', 'lr=1e-3:seed=0', '12:30', 'gs'):
    assert paths.path(tmp_path / name) == tmp_path / name
    assert not paths.remote(paths.path(name))
  assert paths.staging(tmp_path) == tmp_path
  with paths.fetched(tmp_path, ['*']) as local:
    assert local == tmp_path


@pytest.mark.parametrize('kind', [str, Path])
@pytest.mark.parametrize('address', ['s3://bucket/run', 'file:///run', 'az://b/run'])
def test_other_storage_is_refused(kind, address):
  for use in (folder, checkpoint.any_in, checkpoint.read_meta):
    line = refusal(use, kind(address))
    assert line.startswith(f'{kind(address)}: only local or mounted folders and gs://')


@pytest.mark.parametrize('address', ['gs://', 'gs://bucket', 'gs://bucket/a/../b'])
def test_an_address_names_a_folder_of_a_bucket(address):
  assert refusal(paths.path, address) == f'{address}: must be gs://BUCKET/FOLDER'


def test_a_missing_library_is_one_line(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  line = refusal(paths.path, 'gs://bucket/run')
  assert line == "gs://bucket/run: needs the package gcsfs; pip install 'cmjax[gcs]'"


@needs_emulator
def test_a_path_in_a_bucket_keeps_its_address_in_any_form(server):
  path = paths.path('gs://bucket/run')
  assert str(path) == 'gs://bucket/run'
  for form in (path, Path('gs://bucket/run'), 'gs://bucket/run/'):
    assert paths.path(form) == path
  assert paths.remote(path / 'x')
  assert paths.absolute(path) == path


@needs_emulator
def test_files_are_written_and_read_whole(run):
  content = bytes(range(256)) * 9 + b'\r\n--\n'
  paths.write_bytes(run / 'a', content)
  paths.write_text(run / 'deep' / 'b', 'é')
  assert (run / 'a').read_bytes() == content
  assert (run / 'deep' / 'b').read_bytes().decode() == 'é'
  assert paths.size(run / 'a') == len(content)
  assert paths.is_file(run / 'a')
  assert not paths.is_dir(run / 'a')
  assert paths.is_dir(run / 'deep')
  assert paths.folders_in(run) == ['deep']
  assert paths.folders_in(run / 'none') == []
  assert unused(run / 'deep').name == 'deep_2'
  paths.rename(run / 'deep', run / 'moved')
  assert paths.folders_in(run) == ['moved']
  with paths.fetched(run, ['*', 'moved/c*']) as local:
    assert sorted(p.name for p in local.rglob('*')) == ['a']
    assert local.name == run.name
  with paths.fetched_file(run / 'moved' / 'b') as file:
    assert file.parts[-3:] == (run.name, 'moved', 'b')
    assert file.read_text() == 'é'
  with paths.written_file(run / 'new') as file:
    file.write_text('x')
  assert (run / 'new').read_bytes() == b'x'


@needs_emulator
def test_arrays_and_pictures_are_those_of_a_file(run, tmp_path):
  image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
  for place in (run, tmp_path):
    results.write_arrays(place / 'n' / 'a.npz', {'x': image})
    results.write_png(place / 'p' / 'a.png', image, [image[::-1]])
  assert (run / 'p' / 'a.png').read_bytes() == (tmp_path / 'p' / 'a.png').read_bytes()
  with (run / 'n' / 'a.npz').open('rb') as file:
    np.testing.assert_array_equal(np.load(file)['x'], image)


@needs_emulator
def test_a_bucket_that_is_missing_or_refuses_is_one_line(server, run):
  line = refusal(folder, 'gs://nonesuch/run')
  assert line == "gs://nonesuch/run: there is no bucket 'nonesuch'; create it"
  line = refusal(folder, 'gs://bucket/secret/run')
  assert line.startswith(
    "gs://bucket/secret/run: no access to bucket 'bucket': Forbidden"
  )
  for place in ('gs://bucket/fixed/run', 'gs://nonesuch/run'):
    line = refusal(lock(paths.path(place)).__enter__)
    assert line.startswith(f'--workdir: cannot write {place} (')
  paths.write_bytes(run, b'')
  assert 'is a file, not a folder' in refusal(folder, str(run))
  assert 'no checkpoints' in refusal(checkpoint.read_meta, 'gs://bucket/nothing')


@needs_emulator
def test_only_changed_files_are_uploaded(run, tmp_path, server):
  (tmp_path / 'd').mkdir()
  (tmp_path / 'd' / 'a').write_text('one')
  done = {}
  paths.upload(tmp_path, run, done)
  before = server.requests()['POST']
  paths.upload(tmp_path, run, done)
  assert server.requests()['POST'] == before
  (tmp_path / 'd' / 'a').write_text('longer')
  paths.upload(tmp_path, run, done)
  assert (run / 'd' / 'a').read_bytes() == b'longer'


@needs_emulator
def test_rows_are_written_seldom_but_all_by_a_flush(run, server, monkeypatch):
  rows, before = row_file.RowFile(run / 'rows'), server.requests()['POST']
  for i in range(100):
    rows.add(str(i))
  assert server.requests()['POST'] == before  # WRITE_S have not passed
  rows.flush()
  assert (run / 'rows').read_bytes().split() == [str(i).encode() for i in range(100)]
  rows.flush()
  assert server.requests()['POST'] == before + 1
  monkeypatch.setattr(row_file, 'WRITE_S', 0.0)
  rows.add('a')
  rows.close()
  more = row_file.RowFile(run / 'rows')
  more.add('b')
  more.close()
  assert (run / 'rows').read_bytes().split()[-3:] == [b'99', b'a', b'b']


# The lock --------------------------------------------------------------------------


@needs_emulator
def test_a_second_owner_is_refused_by_host_and_process(run, quick, capsys):
  with lock(run):
    line = refusal(lock(run).__enter__)
    who = f'process {os.getpid()} on host {socket.gethostname()}'
    assert trained_by(run) == who
  assert line.startswith(f'{run}: {who} is training in it')
  assert f'locked by {who}; waits up to 2 s' in capsys.readouterr().out
  assert trained_by(run) is None
  assert not (run / '.lock').exists()
  with lock(run):  # at once
    pass
  assert 'waits' not in capsys.readouterr().out


@needs_emulator
def test_a_lock_that_is_not_renewed_is_taken_over_by_one(run, quick, capsys):
  paths.write_text(run / '.lock', '{"host": "gone", "process": 7}')
  start, outcomes = time.monotonic(), []

  def take():
    try:
      with lock(run):
        outcomes.append('taken')
        time.sleep(3.0)
    except UserError as error:
      outcomes.append(str(error))

  takers = [threading.Thread(target=take) for _ in range(3)]
  for taker in takers:
    taker.start()
  for taker in takers:
    taker.join()
  assert time.monotonic() - start > bucket_lock.PATIENCE_S
  assert outcomes.count('taken') == 1
  assert sum('is training in it' in outcome for outcome in outcomes) == 2
  assert 'locked by process 7 on host gone; waits' in capsys.readouterr().out


@needs_emulator
@pytest.mark.parametrize('text', ['', '[]', '3', '{"host": 1}', '\x00' * 9])
def test_a_lock_that_nobody_can_read_is_not_in_the_way(text, run):
  paths.write_text(run / '.lock', text)
  with lock(run):
    assert trained_by(run)


@needs_emulator
def test_an_owner_that_was_taken_over_ends_before_it_writes(run, monkeypatch, capsys):
  codes = []
  monkeypatch.setattr(os, '_exit', codes.append)
  with lock(run) as check:
    check()
    assert codes == []
    paths.write_text(run / '.lock', '{"host": "other", "process": 7}')
    check()
    assert codes == [bucket_lock.LOST]
  assert 'another process took the lock over' in capsys.readouterr().err
  assert trained_by(run) == 'process 7 on host other'  # its lock is left alone


@needs_emulator
def test_an_interactive_python_that_was_taken_over_goes_on(run, quick, monkeypatch):
  monkeypatch.setattr(sys, 'ps1', '>>> ', raising=False)

  def hold():
    with lock(run):
      paths.write_text(run / '.lock', '{"host": "other", "process": 7}')
      time.sleep(20)

  assert 'another process took the lock over' in refusal(hold)
  assert trained_by(run) == 'process 7 on host other'  # its lock is left alone


# Checkpoints -----------------------------------------------------------------------


@needs_emulator
def test_checkpoints_in_a_bucket_that_are_damaged_or_unfinished(run, monkeypatch):

  def few(step):  # of few items, each of which takes 60 requests
    return state(step, target=False)._replace(ema={})

  save(run, few(1), few(2), few(3))
  assert storage.steps_in(run / 'checkpoints') == [3, 2]
  assert same(checkpoint.read_weights(run, 3, 'online', few(0).params), few(3).params)
  assert checkpoint.is_run(run)
  (run / 'checkpoints' / '3' / 'commit_success.txt').unlink()  # killed while saving
  assert storage.steps_in(run / 'checkpoints') == [2]
  restored, lines = restore(run, few(0))
  assert same(restored, few(2))
  assert lines == []
  save(run, few(3))
  with monkeypatch.context() as patch:  # a failing bucket is not damage
    patch.setattr(storage, 'restore', lambda *_: 1 / 0)
    patch.setattr(paths, 'answers', lambda folder: False)
    with pytest.raises(UserError, match='the bucket does not answer'):
      restore(run, few(0))
  array = run / 'checkpoints' / '3' / 'opt_state' / 'manifest.ocdbt'
  array.write_bytes(array.read_bytes()[:20])
  restored, lines = restore(run, few(0))
  assert same(restored, few(2))
  assert f'renamed to {run}/checkpoints/3.damaged' in lines[0]
  assert sorted(paths.folders_in(run / 'checkpoints')) == ['2', '3.damaged']
  checkpoint.save_weights(run / 'alone', 3, few(3).params, META)
  assert not checkpoint.is_run(run / 'alone')


# Whole runs ------------------------------------------------------------------------

# With the samplers and the metrics that are compiled quickly.
MINE = """
from cmjax.configs import edm
def get_config():
  c = edm.get_config('digits')
  del c.samplers.heun, c.metrics.labels
  return c
"""
TRAIN = [
  '--config=mine.py',
  *(f for f in SMALL if 'total_images' not in f and '--config=' not in f),
  '--config.total_images=240',
  '--config.every.checkpoint_steps=10',
  '--config.every.picture_steps=15',
  '--config.evaluation.num_seeds=1',
]
KILLED = """
import os, signal, sys
from cmjax import main
from cmjax.runtime import logs
scalars = logs.RunLog.scalars
def until(self, step, values):
  scalars(self, step, values)
  if step == 22:
    os.kill(os.getpid(), signal.SIGKILL)
logs.RunLog.scalars = until
main.main(sys.argv[1:])
"""


def rows(path):
  lines = (path / 'metrics.jsonl').read_bytes().splitlines()
  speeds = ('images_per_s', 'data_wait')
  return [
    {k: v for k, v in json.loads(line).items() if k not in speeds} for line in lines
  ]


@pytest.fixture
def mine(tmp_path, monkeypatch):
  """Works in a folder with the config of `TRAIN`."""
  (tmp_path / 'mine.py').write_text(MINE)
  monkeypatch.chdir(tmp_path)


@needs_emulator
def test_a_killed_run_in_a_bucket_ends_in_the_bits_of_one_in_a_folder(
  run, quick, mine, tmp_path, monkeypatch, capsys
):
  tmp_path /= 'local'
  killed = subprocess.run(
    [sys.executable, '-c', KILLED, *TRAIN, f'--workdir={run}'],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  step = storage.steps_in(run / 'checkpoints')[0]
  assert step in (10, 20)  # the last may not have been complete
  # No row of a step that is not repeated is lost.
  assert [row['step'] for row in rows(run)][:step] == list(range(1, step + 1))
  checked, renew = [], bucket_lock._Held.check

  def check(held):
    checked.append(threading.current_thread() is threading.main_thread())
    renew(held)

  with monkeypatch.context() as patch:
    patch.setattr(bucket_lock._Held, 'check', check)
    assert main.main([f'--workdir={run}']) == 0
  assert checked.count(True) == 3 - step // 10  # before each checkpoint
  told = capsys.readouterr().out
  assert 'waits up to 2 s' in told
  assert f'resumes from step {step}' in told
  assert main.main([*TRAIN, f'--workdir={tmp_path}']) == 0
  for place in (run, tmp_path):
    for mode in ('sample', 'evaluate'):
      assert main.main([f'--workdir={place}', f'--mode={mode}']) == 0
  assert main.main(['--mode=report', str(run)]) == 0
  assert rows(run) == rows(tmp_path)
  assert (run / 'config.json').read_bytes() == (tmp_path / 'config.json').read_bytes()
  for name in ('one_step_00000015', 'one_step_00000030', 'data'):
    file = f'pictures/{name}.png'
    assert (run / file).read_bytes() == (tmp_path / file).read_bytes()
  with (
    (run / 'samples/step_00000030/one_step.npz').open('rb') as file,
    np.load(file) as ours,
    np.load(tmp_path / 'samples/step_00000030/one_step.npz') as theirs,
  ):
    for name in theirs:
      np.testing.assert_array_equal(ours[name], theirs[name])
  ours, theirs = (
    json.loads((place / 'evaluation_00000030.json').read_bytes())
    for place in (run, tmp_path)
  )
  assert ours == theirs
  weights = {}
  for place in (run, tmp_path):
    read = checkpoint.Checkpoints(place, 2)._manager.restore(30)
    weights[place] = jax.tree.map(np.asarray, dict(read))
    weights[place].pop('meta')
  for a, b in zip(*map(jax.tree.leaves, weights.values()), strict=True):
    np.testing.assert_array_equal(a, b)
  page = (run / 'report.html').read_bytes().decode()
  assert f'<h1>{run.name}</h1>' in page
  assert 'finished' in page
  events = [p.name for p in (run / 'tensorboard').iterdir()]
  assert len(events) == 2  # of both starts
  # Weights of a bucket begin a run in a folder, and become a file in the bucket.
  short = ['--config.total_images=16', '--config.every.picture_steps=0']
  student = [*TRAIN, *short, f'--config.init_from={run}']
  assert main.main([*student, f'--workdir={tmp_path / "student"}']) == 0
  file = run / 'weights.safetensors'
  assert main.main(['--mode=port', f'--from={run}', f'--to={file}']) == 0
  assert main.main(['--mode=port', f'--from={file}', f'--to={run / "ported"}']) == 0
  assert storage.steps_in(run / 'ported' / 'checkpoints') == [30]
  assert main.main(['--mode=port', f'--from={run}', f'--to={file}']) == 2  # is there


@pytest.fixture
def own_server(tmp_path, monkeypatch, quick):
  """A server that a test may stop, which is then given up within seconds."""
  server = Bucket(tmp_path)
  server.start()
  for name, value in server.environment.items():
    monkeypatch.setenv(name, value)
  paths.path('gs://bucket/run')  # which sets how gcsfs is imported
  import gcsfs.retry

  async def soon(seconds):
    del seconds

  monkeypatch.setattr(gcsfs.retry, 'asyncio', SimpleNamespace(sleep=soon))
  monkeypatch.setattr(storage, 'SILENCE_S', 1.0)
  monkeypatch.setattr(bucket_lock, 'RETRIES', {'max_retries': 1})
  monkeypatch.setattr(paths, 'PROBE_S', 0.5)
  yield server
  server.stop()


IN_BUCKET = '--workdir=gs://bucket/run'


@needs_emulator
@pytest.mark.parametrize(
  ('place', 'flags'),
  [
    ('start', [IN_BUCKET]),
    ('lock', [IN_BUCKET]),
    ('config.json', [IN_BUCKET]),
    ('start', ['--workdir=run', '--config.init_from=gs://bucket/other']),
  ],
)
def test_a_bucket_that_does_not_answer_at_the_start_is_asked_again_later(
  place, flags, mine, own_server, monkeypatch, capsys
):
  owner, name = {
    'start': (main, '_start'),
    'lock': (bucket_lock, '_store'),
    'config.json': (paths, 'write_text'),
  }[place]
  call = getattr(owner, name)
  monkeypatch.setattr(owner, name, lambda *a: (own_server.stop() or True) and call(*a))
  assert main.main([*TRAIN, *flags]) == errors.RETRY
  line = capsys.readouterr().err.splitlines()[-1]
  assert 'gs://bucket/run' in line or 'object storage: ' in line


@needs_emulator
@pytest.mark.parametrize('place', ['between checkpoints', 'while saving'])
def test_a_bucket_that_stops_answering_ends_the_run_in_one_line(
  place, mine, own_server, monkeypatch, capsys
):
  if place == 'while saving':
    items = storage.save_args
    monkeypatch.setattr(
      storage, 'save_args', lambda *a: (own_server.stop() or True) and items(*a)
    )
  else:
    scalars = main.importlib.import_module('cmjax.runtime.logs').RunLog.scalars

    def until(self, step, values):
      if step == 3:
        own_server.stop()
      scalars(self, step, values)

    monkeypatch.setattr('cmjax.runtime.logs.RunLog.scalars', until)
  start = time.monotonic()
  assert main.main([*TRAIN, IN_BUCKET]) == errors.RETRY
  assert time.monotonic() - start < 60
  lines = [line for line in capsys.readouterr().err.splitlines() if 'cmjax:' in line]
  assert 1 <= len(lines) <= 2, lines  # also that events of trackers are not copied
  assert 'gs://bucket/run' in lines[-1] or 'object storage' in lines[-1]
