"""Processes that hang are named, with what they wait for, and end for a restart."""

import os
import re
import signal
import time

import pytest

from cmjax.runtime.errors import RETRY
from tests.test_pod import launched

# A user's data and objective. The file $HANG contains what hangs, and in which process.
MINE = """
import os
from pathlib import Path
import time
import jax
import numpy as np
from cmjax.configs import edm as base
from cmjax.data import digits
from cmjax.objectives import denoise

FILE = Path(os.environ['HANG'])

def hang(what):
  while FILE.exists() and FILE.read_text() == f'{what} {jax.process_index()}':
    time.sleep(0.02)  # the line that hangs

class Examples(np.ndarray):
  def __getitem__(self, index):
    if isinstance(index, np.ndarray):
      hang('data')
    return np.asarray(self)[index]

def data():
  source = digits.digits()
  return source._replace(examples=source.examples.view(Examples))

def objective(f, *, times):
  inner = denoise.edm(f, times=times)
  def loss(nets, batch, step, keys):
    jax.debug.callback(hang, 'compute')
    return inner(nets, batch, step, keys)
  return loss

def get_config():
  c = base.get_config('digits')
  c.data = dict(fn='mine:data')
  c.objective = dict(fn='mine:objective', times=c.objective.times)
  c.network.width, c.network.num_blocks, c.network.embedding = 16, 1, 8
  c.batch_size, c.total_images = 8, 8 * 10_000_000
  c.every.picture_steps, c.every.log_steps = 0, 50
  c.every.checkpoint_steps = 10_000_000
  c.trackers = {}
  return c
"""
REPORT_S, STOP_S = 1, 10  # a step may take a tenth of STOP_S, on a busy machine


class Pod:
  """Two processes, and what they print."""

  def __init__(self, folder, workdir):
    (folder / 'mine.py').write_text(MINE)
    self.text = ''
    self.running = launched(
      2, 1, f'--config={folder}/mine.py', f'--workdir={workdir}',
      f'--config.watchdog.report_s={REPORT_S}', f'--config.watchdog.stop_s={STOP_S}',
      small=(),
    )  # fmt: skip

  def until(self, *patterns):
    """Reads lines until each of the patterns has been found in those read by this."""
    read = ''
    while not all(re.search(pattern, read) for pattern in patterns):
      line = self.running.stdout.readline()
      assert line, f'{patterns} not in {read}, after {self.text}'
      read += line
      self.text += line
    return read


@pytest.fixture
def pod(tmp_path, monkeypatch):
  monkeypatch.setenv('HANG', str(tmp_path / 'hangs'))
  pod = Pod(tmp_path, os.environ.get('STALLS_WORKDIR', tmp_path / 'run'))
  yield pod
  if pod.running.poll() is None:
    os.killpg(pod.running.pid, signal.SIGKILL)


def line_of_user(text):
  return re.search(r'File ".*/mine\.py", line \d+ in hang', text)


def test_what_hangs_is_named_and_ends_for_a_restart(pod, tmp_path):
  hangs = tmp_path / 'hangs'
  pod.until(r'step \d+/')
  # jax calls a callback in process 0 only.
  hangs.write_text('compute 0')
  waits = r'process {}: step \d+ has taken .* earlier .*'
  read = pod.until(waits.format(0), waits.format(1))
  for report in re.findall(waits.format(r'\d'), read):
    assert re.search('devices? or .* collective', report)
    assert 'data' not in report
  hangs.unlink()
  read += pod.until('process 0: resumed', 'process 1: resumed', r'step \d+/')
  assert line_of_user(read)

  hangs.write_text('data 1')
  named = r'process {}: step .*: process 1 \(.*, pid (\d+)\) waits for its data at step'
  read = pod.until(named.format(0), named.format(1))
  hangs.unlink()
  read += pod.until('process 0: resumed', 'process 1: resumed', r'step \d+/')
  assert line_of_user(read)

  pid, stopped_s = int(re.search(named.format(0), read)[1]), time.monotonic()
  os.kill(pid, signal.SIGSTOP)
  read = pod.until(rf'process 0: .* process 1 \(.*, pid {pid}\) does not respond')
  assert time.monotonic() - stopped_s > REPORT_S
  read += pod.running.stdout.read()
  assert pod.running.wait() == RETRY, read
  assert 'train.py", line' in read  # the stack of process 0
  assert f'ends with exit code {RETRY}; the same command continues' in read
  assert 'local_pod: process 1 is stopped by a signal' in read
