"""A step that takes much longer than all before it is reported, and nothing else."""

import contextlib
import re
import time

import pytest

from cmjax.runtime import watchdog


@pytest.fixture
def watch():
  """One that reports after 0.2 s or a little more, and has seen quick steps."""
  with contextlib.closing(watchdog.Watchdog(least_s=0.2)) as watch:
    for step in range(watchdog.WARM_UP + 1):
      watch.step(step)
    yield watch


def test_a_step_that_hangs_is_reported_once_and_its_end_too(watch, capsys):
  watch.step(50)
  time.sleep(0.8)
  assert re.fullmatch(
    r'cmjax: process 0: step 50 has taken \d s, and earlier steps at most 0.\d s; .*\n',
    capsys.readouterr().err,
  )
  watch.step(51)
  assert re.fullmatch(
    r'cmjax: process 0: resumed after \d s\n', capsys.readouterr().err
  )
  time.sleep(0.8)
  assert 'step 51 has taken' in capsys.readouterr().err


def test_a_pause_may_take_long(watch, capsys):
  watch.pause()
  time.sleep(0.4)
  watch.step(50)
  assert capsys.readouterr().err == ''


def test_nothing_is_reported_during_the_first_steps(capsys):
  with contextlib.closing(watchdog.Watchdog(least_s=0.1)) as watch:
    watch.step(1)
    time.sleep(0.3)
    watch.step(2)
  assert capsys.readouterr().err == ''


def test_steps_that_always_take_long_are_not_reported(capsys):
  with contextlib.closing(watchdog.Watchdog(least_s=0.1)) as watch:
    for step in range(watchdog.WARM_UP + 1):
      watch.step(step)
      time.sleep(0.05)
    time.sleep(0.25)  # less than ten times 0.05
  assert capsys.readouterr().err == ''
