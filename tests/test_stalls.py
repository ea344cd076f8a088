"""Processes that hang: each is named, with what it waits for, and ends for a restart."""

import os
import re
import signal
import subprocess
import time

import pytest

from cmjax.runtime.watchdog import STALLED
from tests.test_pod import launched, output

# A user's data and objective, which hang in process $PROCESS at step $STEP.
MINE = """
import os
import time
import jax
import numpy as np
from cmjax.configs import edm as base
from cmjax.data import digits
from cmjax.objectives import denoise

WHAT, PROCESS, STEP = os.environ['HANG'].split()

def hang(what, step):
  if what == WHAT and step == int(STEP) and jax.process_index() == int(PROCESS):
    time.sleep(1000)  # the line that hangs

class Examples(np.ndarray):
  step = 0
  def __getitem__(self, index):
    if isinstance(index, np.ndarray):
      Examples.step += 1
      hang('data', Examples.step)
    return np.asarray(self)[index]

def data():
  source = digits.digits()
  return source._replace(examples=source.examples.view(Examples))

def objective(f, *, times):
  inner = denoise.edm(f, times=times)
  def loss(nets, batch, step, keys):
    jax.debug.callback(hang, 'compute', step)
    return inner(nets, batch, step, keys)
  return loss

def get_config():
  c = base.get_config('digits')
  c.data = dict(fn='mine:data')
  if WHAT == 'compute':
    c.objective = dict(fn='mine:objective', times=c.objective.times)
  c.network.width, c.network.num_blocks, c.network.embedding = 64, 1, 8
  c.batch_size, c.total_images = 32, 32 * 100_000
  c.every.picture_steps = 0
  c.trackers = {}
  return c
"""


@pytest.fixture
def hanging(tmp_path, monkeypatch):
  """Starts a run that hangs, and gives its output and exit code."""

  def start(processes, what, process=0, step=20, *, stop_s=2.2):
    (tmp_path / 'mine.py').write_text(MINE)
    monkeypatch.setenv('HANG', f'{what} {process} {step}')
    return launched(
      processes, 1, f'--config={tmp_path}/mine.py', f'--workdir={tmp_path}/run',
      '--config.watchdog.report_s=2', f'--config.watchdog.stop_s={stop_s}', small=(),
    )  # fmt: skip

  return start


def line_of_user(text):
  return re.search(r'File ".*/mine\.py", line \d+ in hang', text)


@pytest.mark.parametrize(
  ('what', 'words'),
  [('data', 'waits for its data'), ('compute', 'waits for its devices')],
)
def test_a_lone_process_names_what_hangs_and_ends(hanging, what, words):
  run = hanging(1, what)
  text = output(run)
  assert run.returncode == STALLED, text
  (report,) = re.findall(r'process 0: step \d+ has taken \d s, and .*', text)
  assert f'this process {words}' in report
  assert line_of_user(text)
  assert f'ends with exit code {STALLED}; the same command continues' in text


def test_a_process_that_waits_for_data_is_named_by_all(hanging, tmp_path):
  run = hanging(2, 'data', process=1)
  text = output(run)
  assert run.returncode == STALLED, text
  named = r'process {}: step .*: process 1 \(.*, pid \d+\) waits for its data at step \d+;'
  for process in (0, 1):
    assert re.search(named.format(process), text), text
  assert line_of_user(text)


def test_a_computation_that_hangs_in_one_process_is_named(hanging):
  run = hanging(2, 'compute', process=1)
  text = output(run)
  assert run.returncode == STALLED, text
  reports = re.findall(r'process \d: step \d+ has taken .*', text)
  assert len(reports) == 2
  for report in reports:
    assert re.search('devices or .* collective', report)
    assert 'data' not in report
  assert line_of_user(text)


def test_a_process_that_is_stopped_is_named_and_the_others_end(hanging, tmp_path):
  run = hanging(2, 'nothing')
  lines = []
  for line in run.stdout:
    lines.append(line)
    if re.match(r'step \d00/', line):
      break
  found = subprocess.run(
    ['pgrep', '-P', str(run.pid)], capture_output=True, text=True, check=True
  )
  pid = int(found.stdout.split()[1])
  os.kill(pid, signal.SIGSTOP)
  start = time.monotonic()
  for line in run.stdout:
    lines.append(line)
    if 'has taken' in line:
      break
  named_s = time.monotonic() - start
  text = ''.join(lines) + output(run)
  assert run.returncode == STALLED, text
  assert re.search(rf'process 0: .* process 1 \(.*, pid {pid}\) does not respond', text)
  assert 'train.py", line' in text  # the stack of process 0
  assert named_s < 2 + 5, text  # the limit, and a busy machine
  assert 'local_pod: process 1 is stopped by a signal' in text
