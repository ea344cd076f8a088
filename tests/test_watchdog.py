"""A step that takes much longer than all before it is reported, with what hangs."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from cmjax.runtime import errors, watchdog
from cmjax.runtime.processes import NUM_READS, Status, diagnosis, paused
from cmjax.runtime.records import Watchdog
from tests.conftest import ROOT


@pytest.fixture
def start(tmp_path):
  """Starts a watchdog; with `steps`, it has seen as many quick ones."""
  with contextlib.ExitStack() as stack:

    def start(report_s=0.2, stop_s=0.0, steps=0):
      watch = watchdog.Watchdog(Watchdog(report_s, stop_s), tmp_path)
      for step in range(steps):
        watch.step(step)
      return stack.enter_context(contextlib.closing(watch))

    yield start


@pytest.fixture
def watch(start):
  """One that reports after 0.2 s or a little more."""
  return start(steps=watchdog.WARM_UP + 1)


def test_a_step_that_hangs_is_reported_once_and_its_end_too(watch, capsys):
  watch.step(50)
  time.sleep(0.8)
  err = capsys.readouterr().err
  assert re.match(
    r'cmjax: process 0: step 50 has taken \d s, and earlier steps at most 0.\d s: this '
    r'process waits for its devices or for a collective; its threads:\n',
    err,
  )
  assert err.count('has taken') == 1
  assert f'File "{__file__}", line' in err
  watch.step(51)
  assert re.fullmatch(
    r'cmjax: process 0: resumed after \d s\n', capsys.readouterr().err
  )
  time.sleep(0.8)
  assert 'step 51 has taken' in capsys.readouterr().err


@pytest.mark.parametrize('what', ['data', 'logs'])
def test_what_a_step_waits_for_is_reported(what, watch, capsys):
  words = {'data': 'waits for its data', 'logs': 'waits for a tracker'}[what]
  with watch.doing(what, 50):
    time.sleep(0.5)
  assert words in capsys.readouterr().err


def test_data_that_hangs_before_the_first_step_is_reported(start, capsys):
  watch = start(report_s=0.1)
  with watch.doing('data', 1):  # the limit is ten times as long as in later steps
    time.sleep(1.5)
  assert re.search('step 1 has taken .* waits for its data', capsys.readouterr().err)
  time.sleep(1.5)  # compilation
  assert capsys.readouterr().err == ''


def test_a_pause_may_take_long(watch, capsys):
  watch.pause()
  time.sleep(0.4)
  watch.step(50)
  assert capsys.readouterr().err == ''


def test_nothing_is_reported_during_the_first_steps(start, capsys):
  watch = start(report_s=0.1)
  watch.step(1)
  time.sleep(0.3)
  watch.step(2)
  assert capsys.readouterr().err == ''


def test_steps_that_always_take_long_are_not_reported(start, capsys):
  watch = start(report_s=0.1)
  for step in range(watchdog.WARM_UP + 1):
    watch.step(step)
    time.sleep(0.05)
  time.sleep(0.25)  # less than ten times 0.05
  assert capsys.readouterr().err == ''


STOPPED = """
import sys
import time
from cmjax.runtime import watchdog
from cmjax.runtime.records import Watchdog
watchdog.AWAKE_S = 0.5
watch = watchdog.Watchdog(Watchdog(1.5, 1.5), None)
for step in range(watchdog.WARM_UP + 1):
  watch.step(step)
print('ready', flush=True)
time.sleep(float(sys.argv[1]))
print('done', flush=True)
"""


@pytest.mark.parametrize('stopped', [False, True])
def test_a_stop_by_a_signal_is_no_hang_of_the_process_itself(stopped):
  command = [sys.executable, '-c', STOPPED, '0.3' if stopped else '60']
  process = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == 'ready\n'
  if stopped:
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
  out, err = process.communicate(timeout=60)
  assert process.returncode == (0 if stopped else errors.RETRY), err
  assert ('ends with exit code 75' in err) == (not stopped)
  assert ('done' in out) == stopped


# Several processes -------------------------------------------------------------------


def seen(*statuses, silent=(), num=NUM_READS):
  """Readings of processes 1, 2, ...; `silent` ones write nothing new."""
  return [
    {
      i: s and s._replace(count=1 if i in silent else 1 + k)
      for i, s in enumerate(statuses, 1)
    }
    for k in range(num)
  ]


def at(step, doing='compute'):
  return Status('a', 7, step, doing)


DATA = at(9, 'data')


@pytest.mark.parametrize(
  ('mine', 'others', 'words'),
  [
    (at(17), seen(DATA), r'^process 1 \(a, pid 7\) waits for its data at step 9$'),
    (DATA, seen(at(17)), r'^process 0 \(a, pid 7\) waits for its data at step 9$'),
    (at(9), seen(at(9), DATA, silent=[1]), r'^process 1 \(.*\) does not respond'),
    (at(9), seen(None, at(9)), r'^process 1 has no file in \.processes'),
    (at(9), seen(at(9), at(8, 'pause')), r'^process 2 .* in a hook, .* at step 8$'),
    (at(28), seen(at(28), at(20)), r'^process 2 .* has only reached step 20'),
    (at(28), seen(at(28), at(28)), '^all processes wait for a device or a collective'),
    (at(28), seen(at(28), num=1), 'devices .*; the files in .processes .* be read'),
    (at(9), seen(*5 * [DATA]), '^process 1 .* process 3 .*; and 2 more processes$'),
  ],
)
def test_the_process_that_hangs_is_named(mine, others, words):
  assert re.search(words, diagnosis(0, mine, others))


def test_a_process_that_changes_what_it_does_does_not_hang():
  first, *rest = seen(at(20, 'data'))
  moved = [{1: reading[1]._replace(step=21)} for reading in rest]
  words = diagnosis(0, at(28), [first, *moved])
  assert 'has only reached step 21' in words


def test_a_process_that_evaluates_is_waited_for_unless_it_does_not_respond():
  assert paused(seen(at(9), at(8, 'pause')))
  assert not paused(seen(at(9), at(8, 'pause'), silent=[2]))
  assert not paused(seen(at(9)))
  assert not paused([])
