"""Processes that hang are named, with what they wait for, and end for a restart."""

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
  c.every.picture_steps, c.every.log_steps = 0, 15
  c.trackers = {}
  return c
"""


@pytest.fixture
def hanging(tmp_path, monkeypatch):
  """Starts a run that hangs, and gives its output and exit code."""

  def start(processes, what, process=0, step=13, *, stop_s=2.2):
    folder = tmp_path / what
    folder.mkdir()
    (folder / 'mine.py').write_text(MINE)
    monkeypatch.setenv('HANG', f'{what} {process} {step}')
    return launched(
      processes, 1, f'--config={folder}/mine.py', f'--workdir={folder}/run',
      '--config.watchdog.report_s=2', f'--config.watchdog.stop_s={stop_s}', small=(),
    )  # fmt: skip

  return start


def line_of_user(text):
  return re.search(r'File ".*/mine\.py", line \d+ in hang', text)


def test_a_lone_process_names_what_hangs_and_ends(hanging):
  waits = {'data': 'waits for its data', 'compute': 'waits for its devices'}
  for what, run in [(what, hanging(1, what)) for what in waits]:
    text = output(run)
    assert run.returncode == STALLED, text
    (report,) = re.findall(r'process 0: step \d+ has taken \d+ s, and .*', text)
    assert f'this process {waits[what]}' in report
    assert line_of_user(text)
    assert f'ends with exit code {STALLED}; the same command continues' in text


def test_a_process_that_waits_for_data_is_named_by_all(hanging):
  # The limit of process 0 is longer on a busy machine, with longer steps before.
  run = hanging(2, 'data', process=1, stop_s=10)
  text = output(run)
  assert run.returncode == STALLED, text
  named = (
    r'process {}: step .*: process 1 \(.*, pid \d+\) waits for its data at step \d+;'
  )
  for process in (0, 1):
    assert re.search(named.format(process), text), text
  assert line_of_user(text)


def test_a_computation_that_hangs_in_one_process_is_named(hanging):
  run = hanging(2, 'compute')  # jax calls a callback in process 0 only
  text = output(run)
  assert run.returncode == STALLED, text
  reports = re.findall(r'process \d: step \d+ has taken .* earlier .*', text)
  assert len(reports) == 2, text
  for report in reports:
    assert re.search('devices? or .* collective', report)
    assert 'data' not in report
  assert line_of_user(text)


def test_a_process_that_is_stopped_is_named_and_the_others_end(hanging):
  run = hanging(2, 'nothing')
  lines, pid, stopped_s, named_s = [], 0, 0.0, 0.0
  for line in run.stdout:
    lines.append(line)
    if re.match(r'step \d+/', line) and not pid:
      found = subprocess.run(
        ['pgrep', '-P', str(run.pid)], capture_output=True, text=True, check=True
      )
      pid, stopped_s = int(found.stdout.split()[1]), time.monotonic()
      os.kill(pid, signal.SIGSTOP)
    if 'has taken' in line:
      named_s = named_s or time.monotonic() - stopped_s
  text = ''.join(lines)
  assert run.wait() == STALLED, text
  assert re.search(rf'process 0: .* process 1 \(.*, pid {pid}\) does not respond', text)
  assert 'train.py", line' in text  # the stack of process 0
  longest_s = float(re.search(r'earlier steps at most (\S+) s', text)[1])
  assert 2 < named_s < max(2, 10 * longest_s) + 5, text  # the limit; a busy machine
  assert 'local_pod: process 1 is stopped by a signal' in text
