"""Several processes on one machine: what a pod does, in small."""

import json
import os
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

from cmjax import main
from tests.conftest import ROOT

SMALL = [
  '--config=configs/edm.py:digits',
  '--config.network.width=64',
  '--config.network.num_blocks=1',
  '--config.network.embedding=8',
  '--config.batch_size=32',
  '--config.evaluation.num_pictured=32',
  '--config.every.log_steps=1',
]


def launched(processes, devices, *arguments, small=SMALL):
  """A pod that was started; `cmjax` is that of this Python."""
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', f'device_count={devices}')
  path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
  command = ['cmjax'] if processes == 1 else ['launch/local_pod.sh']
  command += [] if processes == 1 else [str(processes), str(devices)]
  return subprocess.Popen(
    [*command, *small, *arguments],
    cwd=ROOT,
    env=os.environ | {'PATH': path, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': flags},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )


def output(pod):
  # Much longer than these take; ends those that hang.
  text, _ = pod.communicate(timeout=300)
  return text


def rows(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').open()]


@pytest.mark.parametrize('fsdp', [False, True])
def test_two_processes_of_four_devices_are_one_of_eight(fsdp, tmp_path):
  arguments = [
    '--config.total_images=1600',
    '--config.every.picture_steps=50',
    f'--config.mesh.fsdp={fsdp}',
    f'--config.mesh.num_slices={1 + fsdp}',
  ]
  files = (
    tmp_path / '2' / '.processes'
  )  # with one of an earlier start, which was killed
  files.mkdir(parents=True)
  (files / 'earlier-1-5').write_text('{')
  pods = {n: launched(n, 8 // n, *arguments, f'--workdir={tmp_path / str(n)}')
          for n in (1, 2)}  # fmt: skip
  for n, pod in pods.items():
    text = output(pod)
    assert pod.returncode == 0, text
    # By the first process only.
    assert text.count(f'done: {tmp_path / str(n)}') == 1, text
  one, two = rows(tmp_path / '1'), rows(tmp_path / '2')
  assert [row['step'] for row in two] == list(range(1, 51))
  assert not list(files.iterdir())
  for a, b in zip(one, two, strict=True):
    assert b['loss'] == pytest.approx(a['loss'], rel=1e-6)  # order of float32 sums
  pictures = (tmp_path / str(n) / 'pictures' / 'heun_00000050.png' for n in (1, 2))
  a, b = (np.asarray(Image.open(path), int) for path in pictures)
  assert np.max(np.abs(a - b)) <= 1  # levels of grey


def test_two_processes_measure_what_one_does(tmp_path):
  run = f'--workdir={tmp_path}'
  small = ['--config.total_images=64', '--config.every.picture_steps=0']
  assert main.main([*SMALL, run, *small]) == 0
  evaluation = ['--mode=evaluate', '--config.evaluation.num_samples=40', run]
  evaluation += ['--config.evaluation.num_seeds=1', '--config.evaluation.batch_size=16']
  assert main.main(evaluation) == 0
  pod = launched(2, 1, *evaluation, small=())
  text = output(pod)
  assert pod.returncode == 0, text
  assert text.count('evaluation_00000002') == 1, text  # by the first process only
  first, second = sorted(tmp_path.glob('evaluation_*.json'))
  rows_of = (json.loads(path.read_text())['rows'] for path in (first, second))
  for a, b in zip(*rows_of, strict=True):
    assert b['label_agreement'] == a['label_agreement']
    assert b['pixel_frechet'] == pytest.approx(a['pixel_frechet'], rel=1e-6)
  assert not (tmp_path / 'evaluation.unfinished').exists()


@pytest.fixture
def pod(tmp_path):
  """A pod in the middle of a long run, its output so far, and its processes."""
  pod = launched(
    2, 2, '--config.total_images=320000', '--config.every.picture_steps=0',
    f'--workdir={tmp_path}',
  )  # fmt: skip
  seen = ''
  while not re.match(r'step [1-9]\d', line := pod.stdout.readline()):
    assert pod.poll() is None, seen
    seen += line
  children = subprocess.run(
    ['pgrep', '-P', str(pod.pid)], capture_output=True, text=True, check=True
  )
  yield pod, [int(pid) for pid in children.stdout.split()]
  if pod.poll() is None:
    os.killpg(pod.pid, signal.SIGKILL)


def test_a_sigterm_to_one_process_is_enough(pod, tmp_path):
  running, pids = pod
  os.kill(pids[-1], signal.SIGTERM)
  text = output(running)
  assert running.returncode == 0, text
  (step,) = re.findall(r'saved step (\d+)', text)
  assert (tmp_path / 'checkpoints' / step).is_dir()


def test_a_process_that_dies_ends_the_others_even_a_stopped_one(pod):
  running, pids = pod
  start = time.monotonic()
  os.kill(pids[0], signal.SIGSTOP)
  os.kill(pids[-1], signal.SIGKILL)
  text = output(running)
  assert running.returncode == 128 + signal.SIGKILL, text
  assert 'local_pod: process 1 ended with code 137; stopping the others' in text
  assert 'local_pod: process 0 is stopped by a signal and does not answer' in text
  assert time.monotonic() - start < 60
  assert not any(Path(f'/proc/{pid}').exists() for pid in pids)


def test_processes_without_a_coordinator_are_refused(tmp_path):
  lone = launched(1, 2, '--processes=2', f'--workdir={tmp_path}')
  text = output(lone)
  assert lone.returncode == 2
  assert text == 'cmjax: --processes and --process go with --coordinator=HOST:PORT\n'


AGREE = """
from pathlib import Path
import sys
from cmjax import core
from cmjax.runtime import sharding, workdir
port, process = int(sys.argv[1]), int(sys.argv[2])
sharding.start(f'localhost:{port}', 2, process)
sharding.check_same({'config': 'seed: 1'})
print(sharding.all_true(True), sharding.all_true(process == 0))
try:  # only process 0 sees weights
  workdir.own_config(Path(sys.argv[3], str(process)))
except core.UserError as error:
  print('holds weights but no run' in str(error))
try:
  sharding.check_same({'config': f'batch_size: 32\\nseed: {process}' + process * ' '})
except core.UserError as error:
  print(error)
"""


def test_processes_agree_or_all_raise_the_difference(tmp_path):
  (tmp_path / '0' / 'checkpoints' / '5').mkdir(parents=True)
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=2')
  started = [
    subprocess.Popen(
      [sys.executable, '-c', AGREE, str(port), str(process), str(tmp_path)],
      cwd=ROOT,
      env=os.environ | {'XLA_FLAGS': flags},
      stdout=subprocess.PIPE,
      text=True,
    )
    for process in range(2)
  ]
  difference = 'config: process 1 has seed: 1, process 0 has seed: 0; give the same'
  for process in started:
    # gloo has lines of its own.
    agreed, weights, refusal = output(process).splitlines()[-3:]
    assert process.returncode == 0
    assert agreed == 'True False'
    assert weights == 'True'
    assert refusal == f'{difference} to all processes'
