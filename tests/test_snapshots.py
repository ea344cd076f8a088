"""Snapshots in training, and averages put together from them."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cmjax import ema, train
from cmjax.configs import parts
from cmjax.core import UserError
from cmjax.runtime import checkpoint, pretrained, storage
from cmjax.runtime.config import read
from cmjax.runtime.reopen import beside, reopen
from cmjax.runtime.run import prepare
from cmjax.runtime.state import first_state
from tests.conftest import ROOT

NUM_STEPS, EVERY = 48, 8
SMALL = {
  'data.num_samples': 100,
  'network.width': 16,
  'network.num_blocks': 1,
  'network.embedding': 8,
  'batch_size': 16,
  'total_images': 16 * NUM_STEPS,
  'every.log_steps': 10,
  'every.picture_steps': 0,
  'every.checkpoint_steps': 16,
  'every.snapshot_steps': EVERY,
}
APART = (0.07, 0.15)  # widths that only another, equal run tracks


def small(*relative_stds, **changes):
  config = read(ROOT / 'configs' / 'edm.py:toy2d')
  config.optimizer = parts.adam(parts.constant(1e-2))
  with config.unlocked():
    config.ema.update(parts.power_emas(*relative_stds))
    for key, value in (SMALL | changes).items():
      *path, last = key.replace('__', '.').split('.')
      part = config
      for step in path:
        part = part[step]
      part[last] = value
  return config


@pytest.fixture(scope='module')
def trained(tmp_path_factory, one_device):
  """A run with snapshots, its folder, and its last state."""
  workdir = tmp_path_factory.mktemp('snapshots') / 'run'
  run = prepare(small(0.05, 0.1), one_device)
  return run, workdir, train.train(run, workdir, {})


@pytest.fixture(scope='module')
def apart(tmp_path_factory, one_device):
  """The last state of an equal run that tracks other widths, and takes no snapshots."""
  workdir = tmp_path_factory.mktemp('apart') / 'run'
  state = train.train(
    prepare(small(*APART, every__snapshot_steps=0), one_device), workdir, {}
  )
  assert not (workdir / 'snapshots').exists()
  return state


def opened(path, **overrides):
  """The weights that a path is opened with, and the lines that were printed."""
  lines = []
  pairs = [(key, str(value)) for key, value in overrides.items()]
  found = pretrained.load(path, overrides=pairs, say=lines.append)
  return found, lines


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def norm(tree):
  return np.sqrt(sum(np.sum(np.square(a)) for a in jax.tree.leaves(tree)))


def minus(a, b):
  return jax.tree.map(lambda a, b: np.asarray(a, float) - np.asarray(b), a, b)


def snapshots_in(workdir):
  return sorted(storage.steps_in(workdir / 'snapshots'))


def bytes_in(folder):
  return {
    p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()
  }


def test_snapshots_are_kept_at_their_steps_with_the_averages_of_that_step(trained):
  _, workdir, state = trained
  assert snapshots_in(workdir) == list(range(EVERY, NUM_STEPS + 1, EVERY))
  assert len(storage.steps_in(workdir / 'checkpoints')) == 2
  last = workdir / 'snapshots' / str(NUM_STEPS)
  for name in ('power_050', 'power_100'):
    found = pretrained.load(last, weights=name)
    assert_equal(found.params, state.ema[name])
    assert found.step == NUM_STEPS
    assert all(a.dtype == np.float32 for a in jax.tree.leaves(found.params))
  items = {p.name for p in last.iterdir() if p.is_dir()}
  assert {n for n in items if n.startswith('ema.')} == {
    'ema.power_050',
    'ema.power_100',
  }
  assert not items & {'online', 'opt_state', 'ema.slow'}


@pytest.mark.parametrize('width', APART)
def test_an_average_put_together_is_the_one_that_was_tracked(width, trained, apart):
  _, workdir, state = trained
  found, lines = opened(workdir, sample_relative_std=width)
  assert lines == []
  exact = apart.ema[f'power_{1000 * width:03.0f}']
  assert_equal(apart.params, state.params)  # averages do not affect the run
  # Relative to what averaging changes. The error of the profile is that of white noise,
  # and weights change more slowly.
  error = norm(minus(found.params, exact)) / norm(minus(state.params, exact))
  steps = range(EVERY, NUM_STEPS + 1, EVERY)
  profiles = [ema.Profile(s, k) for k in steps for s in (0.05, 0.1)]
  assert error < ema.reconstruct(profiles, ema.Profile(width, NUM_STEPS)).error < 0.06
  # Neither of the tracked widths is as close.
  for name in ('power_050', 'power_100'):
    assert norm(minus(state.ema[name], exact)) > 10 * norm(minus(found.params, exact))


def test_a_tracked_width_is_the_stored_average(trained):
  _, workdir, state = trained
  found, _ = opened(workdir, sample_relative_std=0.1)
  for a, b in zip(
    jax.tree.leaves(found.params), jax.tree.leaves(state.ema['power_100'])
  ):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)  # rounding to float32
  named = pretrained.load(
    workdir, weights='online', overrides=[('sample_relative_std', '0.1')]
  )
  assert_equal(named.params, state.params)  # a name goes first


def test_a_path_to_a_step_ends_the_average_there(trained):
  _, workdir, _ = trained
  at = workdir / 'snapshots' / '32'
  stored = pretrained.load(at, weights='power_050')
  for path in (at, workdir / 'checkpoints' / '32'):
    found, lines = opened(path, sample_relative_std=0.05)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(stored.params)):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert lines == []


def test_folders_that_are_no_steps_are_not_read(tmp_path):
  for name in ('8', '16', '\u00b2', '\u0663', '3.damaged', '-1'):
    (tmp_path / 'snapshots' / name).mkdir(parents=True)
  assert storage.steps_in(tmp_path / 'snapshots') == [16, 8]
  assert storage.is_step(tmp_path / 'snapshots' / '8')
  assert not storage.is_step(tmp_path / 'snapshots' / '\u0663')


def test_the_newest_snapshot_before_a_checkpoint_is_named(trained, tmp_path):
  _, workdir, _ = trained
  copy = shutil.copytree(workdir, tmp_path / 'copy')
  shutil.rmtree(copy / 'snapshots' / '48')
  _, lines = opened(copy, sample_relative_std=0.08)
  assert [line for line in lines if 'step 40 (not 48)' in line] == lines != []


def test_a_run_is_sampled_with_the_average_of_its_config(trained, one_device):
  _, workdir, _ = trained
  expected, _ = opened(workdir, sample_relative_std=0.08)
  found = reopen(workdir, overrides=[('sample_relative_std', '0.08')])
  assert_equal(found.params, expected.params)
  assert found.config.sample_relative_std == 0.08
  again = reopen(workdir / 'snapshots' / '16')
  assert beside(again) == workdir


def test_a_snapshot_is_where_a_run_starts_or_its_guide(trained, one_device, capsys):
  _, workdir, _ = trained
  at = workdir / 'snapshots' / '24'
  run = prepare(small(init_from=str(at), every__snapshot_steps=0), one_device)
  narrowest = pretrained.load(at, weights='power_050').params
  assert_equal(first_state(run).params, narrowest)
  assert "no weights 'slow'; opened 'power_050'" in capsys.readouterr().out
  found, lines = opened(at)
  assert_equal(found.params, narrowest)
  assert len(lines) == 1
  found, lines = opened(at, sample_weights='power_100')
  assert_equal(found.params, pretrained.load(at, weights='power_100').params)
  assert lines == []


def test_a_run_that_resumes_writes_what_is_missing_or_damaged_only(
  trained, one_device, tmp_path, capsys
):
  run, workdir, state = trained
  copy = shutil.copytree(workdir, tmp_path / 'copy')
  shutil.rmtree(copy / 'checkpoints' / '48')
  shutil.rmtree(copy / 'snapshots' / '40')  # between 32, where it resumes, and 48
  (copy / 'snapshots' / '40.orbax-checkpoint-tmp-1').mkdir()  # of a kill
  broken = copy / 'snapshots' / '48' / 'ema.power_050' / 'manifest.ocdbt'
  broken.write_bytes(broken.read_bytes()[:20])
  before = {s: bytes_in(copy / 'snapshots' / str(s)) for s in (8, 24, 32)}
  again = train.train(run, copy, {})
  assert_equal(again.ema, state.ema)
  assert snapshots_in(copy) == snapshots_in(workdir)
  for step, content in before.items():
    assert bytes_in(copy / 'snapshots' / str(step)) == content
  for step in (40, 48):
    for name in ('power_050', 'power_100'):
      a, b = (
        pretrained.load(w / 'snapshots' / str(step), weights=name).params
        for w in (copy, workdir)
      )
      assert_equal(a, b)
  folders = {p.name for p in (copy / 'snapshots').iterdir()}
  assert folders - {str(s) for s in snapshots_in(copy)} == {'48.damaged'}
  assert 'snapshots/48 is damaged' in capsys.readouterr().out


def test_kill_9_leaves_whole_snapshots_and_the_run_ends_with_the_same(
  trained, tmp_path, capsys
):
  run, workdir, _ = trained
  values = SMALL | {'every.log_steps': 8}
  script = (
    'from cmjax.configs import edm, parts\n'
    'def get_config():\n'
    '  c = edm.get_config("toy2d")\n'
    '  c.optimizer = parts.adam(parts.constant(1e-2))\n'
    '  c.ema.update(parts.power_emas(0.05, 0.1))\n'
    '  return c\n'
  )
  (tmp_path / 'own.py').write_text(script)
  command = [
    *(sys.executable, '-m', 'cmjax.main', f'--config={tmp_path}/own.py'),
    f'--workdir={tmp_path / "killed"}',
    *(f'--config.{key}={value}' for key, value in values.items()),
  ]
  flags = os.environ['XLA_FLAGS'].replace('count=8', 'count=1')
  environment = os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}
  process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
  reached = b'step %d/' % (8 * random.randint(1, 5))
  while not process.stdout.readline().startswith(reached):
    assert process.poll() is None
  time.sleep(random.uniform(0, 0.1))  # also in the middle of a save
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  train.train(run, tmp_path / 'killed', {})
  assert 'damaged' not in capsys.readouterr().out
  assert snapshots_in(tmp_path / 'killed') == snapshots_in(workdir)
  for step in snapshots_in(workdir):
    a, b = (
      pretrained.load(w / 'snapshots' / str(step), weights='power_100').params
      for w in (tmp_path / 'killed', workdir)
    )
    assert_equal(a, b)


def refusal(call, *arguments, **keywords):
  with pytest.raises(UserError) as error:
    call(*arguments, **keywords)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_widths_that_the_snapshots_do_not_span_are_refused(trained):
  _, workdir, _ = trained
  told = refusal(opened, workdir, sample_relative_std=0.01)
  assert re.match(
    r'config\.sample_relative_std=0\.01: 6 snapshots of widths 0\.05, 0\.1 .* \d\d%',
    told,
  )
  for bad in (0.3, -0.1, 'wide'):
    told = refusal(reopen, workdir, overrides=[('sample_relative_std', str(bad))])
    assert 'config.sample_relative_std' in told


def test_a_run_without_snapshots_has_none_to_put_together(trained, tmp_path):
  _, workdir, _ = trained
  copy = shutil.copytree(workdir, tmp_path / 'copy')
  shutil.rmtree(copy / 'snapshots')
  told = refusal(opened, copy, sample_relative_std=0.07)
  assert re.match(r'config\.sample_relative_std=0\.07: .* no snapshots up to', told)


def test_a_damaged_snapshot_is_named(trained, tmp_path):
  _, workdir, _ = trained
  copy = shutil.copytree(workdir, tmp_path / 'copy')
  broken = copy / 'snapshots' / '24' / 'ema.power_050' / 'manifest.ocdbt'
  broken.write_bytes(broken.read_bytes()[:20])
  told = refusal(opened, copy, sample_relative_std=0.07)
  assert 'snapshots/24: damaged' in told


def test_snapshots_of_a_config_without_power_function_averages_are_refused(one_device):
  told = refusal(prepare, small(), one_device)
  assert told.startswith('config.every.snapshot_steps: snapshots hold EMAs of ')


def test_a_snapshot_has_only_its_own_weights(trained):
  _, workdir, _ = trained
  at = workdir / 'snapshots' / '24'
  told = refusal(pretrained.load, at, weights='slow')
  assert "no weights 'slow'; choose from power_050, power_100" in told
  assert 'no checkpoints' in refusal(pretrained.load, workdir / 'snapshots' / '25')
  told = refusal(checkpoint.check_there, workdir / 'snapshots' / '25', 'config.teacher')
  assert told.startswith('config.teacher: ')
