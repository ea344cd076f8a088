"""The training step, the loop, and what survives when a run is killed."""

import json
import os
from pathlib import Path
import random
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cmjax import core, schedules, train
from cmjax.data.tfds import DATA_DIR_VARIABLE
from cmjax.runtime import batches, checkpoint, logs, pretrained, sharding
from cmjax.runtime.config import load, read
from cmjax.runtime.config_record import differences
from cmjax.runtime.run import prepare
from cmjax.runtime.state import abstract_state, first_state, init_state, random_state
from cmjax.runtime.window import Window
from cmjax.train_step import make_train_step
from tests.conftest import ROOT

SMALL = {
  'network.width': 16,
  'network.num_blocks': 1,
  'network.embedding': 8,
  'network.dropout': 0.1,
  'batch_size': 32,
  'total_images': 32 * 24,
  'every.log_steps': 6,
  'every.picture_steps': 0,
  'every.checkpoint_steps': 6,
}


def small(name='edm.py:digits', **changes):
  config = read(ROOT / 'configs' / name)
  with config.unlocked():
    for key, value in (SMALL | changes).items():
      *path, last = key.replace('__', '.').split('.')
      part = config
      for step in path:
        part = part[step]
      part[last] = value
  return config


def assert_equal_states(a, b):
  for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b)):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


# The step --------------------------------------------------------------------------


def linear_loss(nets, batch, step, keys):
  """Loss w . x0: its gradient is the mean of x0, whatever the weights."""
  loss = batch.x0 @ nets.online
  return core.LossOut(loss, {'sigma': jnp.arange(len(batch.x0), dtype=jnp.float32)})


def one_step_of(loss, x0, target_decay=None):
  tx = optax.sgd(0.5)
  decays = {'slow': schedules.constant(value=0.9)}
  state = init_state(
    jnp.array([1.0, -2.0]), tx.init(jnp.zeros(2)), ('slow',), bool(target_decay)
  )
  step = jax.jit(make_train_step(loss, tx, decays, target_decay, seed=0))
  return state, *step(state, core.Frozen(), core.Batch(x0, None))


def test_step_moves_parameters_and_averages_by_their_rates():
  x0 = jnp.array([[1.0, 0.0], [3.0, 2.0], [2.0, 4.0], [2.0, 2.0]])
  half = schedules.constant(value=0.5)
  before, after, metrics = one_step_of(linear_loss, x0, target_decay=half)
  moved = np.array([1.0, -2.0]) - 0.5 * np.array([2.0, 2.0])  # w - lr mean(x0)
  old = np.asarray(before.params)
  np.testing.assert_allclose(after.params, moved, rtol=1e-6)
  np.testing.assert_allclose(after.ema['slow'], 0.9 * old + 0.1 * moved, rtol=1e-6)
  np.testing.assert_allclose(after.target, 0.5 * old + 0.5 * moved, rtol=1e-6)
  assert int(after.step) == 1
  losses = np.asarray(x0) @ old
  np.testing.assert_allclose(metrics['loss'], losses.mean(), rtol=1e-6)
  np.testing.assert_allclose(metrics['grad_norm'], 8**0.5, rtol=1e-6)


def test_quartiles_are_by_rank_of_t():
  x0 = jnp.stack([jnp.arange(8.0), jnp.zeros(8)], axis=1)[::-1]

  def loss(nets, batch, step, keys):
    return core.LossOut(batch.x0 @ nets.online, {'sigma': batch.x0[:, 0]})

  metrics = one_step_of(loss, x0)[2]
  quartiles = [float(metrics[f'loss_q{i}']) for i in (1, 2, 3, 4)]
  assert quartiles == [0.5, 2.5, 4.5, 6.5]


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad):
  x0 = jnp.ones((4, 2)).at[1, 0].set(bad)
  before, after, metrics = one_step_of(linear_loss, x0)
  assert_equal_states(before._replace(step=after.step), after)
  assert int(after.step) == 1
  assert metrics['skipped'] == 1
  assert not np.isfinite(metrics['loss'])  # shown, not hidden


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too():
  def loss(nets, batch, step, keys):
    root = jnp.sqrt(jnp.sum(nets.online * 0.0))  # 0, with gradient 0 / 0
    return core.LossOut(jnp.full(4, root), {'sigma': jnp.arange(4.0)})

  before, after, metrics = one_step_of(loss, jnp.ones((4, 2)))
  assert metrics['loss'] == 0
  assert metrics['skipped'] == 1
  np.testing.assert_array_equal(before.params, after.params)


# The loop --------------------------------------------------------------------------


def test_a_loop_of_one_s_own_is_saved_and_resumes_bit_for_bit(tmp_path, one_device):
  run = prepare(small(total_images=32 * 12), one_device)
  for step, state, _ in train.steps(run):
    if step == 9:
      train.save(run, state, tmp_path)
  assert pretrained.load(tmp_path, mesh=one_device).step == 9
  resumed = train.train(run, tmp_path)
  assert_equal_states(resumed, state)
  other = prepare(small(seed=1), one_device)
  with pytest.raises(core.UserError, match=r'holds a run with another config.*seed'):
    train.save(other, state, tmp_path)


def test_a_run_that_is_never_finite_stops_and_says_so(tmp_path, one_device):
  config = small(max_skipped_steps=4, every__log_steps=2)
  run = prepare(config, one_device)

  def broken(nets, batch, step, keys):
    out = run.loss(nets, batch, step, keys)
    return out._replace(loss=out.loss * jnp.nan)

  with pytest.raises(FloatingPointError, match=r'6 steps .* config\.grad_clip_norm'):
    train.train(run._replace(loss=broken), tmp_path, {})


@pytest.mark.parametrize('name', ['edm.py:digits', 'ct.py:toy2d'])
def test_a_run_that_crashed_resumes_to_the_same_bits(name, tmp_path, one_device):
  run = prepare(small(name), one_device)
  straight = train.train(run, tmp_path / 'straight', {})

  def fall(run, params, step, log, check):
    if step == 9:
      raise RuntimeError

  falling = prepare(small(name, every__picture_steps=3), one_device)
  with pytest.raises(RuntimeError):
    train.train(falling, tmp_path / 'fallen', {'picture': fall})
  resumed = train.train(run, tmp_path / 'fallen', {})
  assert_equal_states(straight, resumed)


def test_the_iterator_trains_as_a_run_does_and_continues(tmp_path, one_device):
  run = prepare(small(), one_device)
  straight = train.train(run, tmp_path)
  numbers = []
  for step, state, metrics in train.steps(run):
    assert int(state.step) == step
    assert np.isfinite(metrics['loss'])
    numbers.append(step)
    if step == 5:
      break
  for step, last, _ in train.steps(run, state):
    numbers += [step] if int(last.step) == step else []
  assert numbers == list(range(1, run.total_steps + 1))
  assert_equal_states(straight, last)
  assert list(train.steps(run, last)) == []


def test_losses_do_not_depend_on_the_number_of_devices(one_device):
  losses = []
  for mesh in (one_device, sharding.data_mesh()):
    run = prepare(small(), mesh)
    state = first_state(run)
    step = jax.jit(
      make_train_step(run.loss, run.tx, run.ema_decays, None, run.config.seed),
      donate_argnums=0,
    )
    rows = []
    for k in range(20):
      state, metrics = step(state, core.Frozen(), batches.batch(run, k))
      rows.append(float(metrics['loss']))
    losses.append(rows)
  assert len(jax.devices()) == 8
  # Sums over the batch are taken in another order: float32, 20 steps.
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_finished_run_is_left_as_it_is(tmp_path, one_device):
  run = prepare(small(), one_device)
  first = train.train(run, tmp_path, {})
  lines = (tmp_path / 'metrics.jsonl').read_text()
  assert_equal_states(first, train.train(run, tmp_path, {}))
  assert (tmp_path / 'metrics.jsonl').read_text() == lines


def test_a_student_starts_from_the_weights_its_teacher_samples_from(
  tmp_path, one_device
):
  teacher = train.train(prepare(small(), one_device), tmp_path / 'teacher', {})
  config = small('ect.py:digits', init_from=str(tmp_path / 'teacher'))
  state = first_state(prepare(config, one_device))
  for tree in (state.params, state.ema['slow']):
    assert_equal_states(tree, teacher.ema['slow'])
  assert int(state.step) == 0


def test_another_network_is_refused_before_any_step(tmp_path, one_device):
  train.train(prepare(small(), one_device), tmp_path / 'teacher', {})
  config = small(
    'ect.py:digits', init_from=str(tmp_path / 'teacher'), network__width=32
  )
  differs = r'another network: parameter .*\(32,\).*\(64,\)'
  with pytest.raises(core.UserError, match=differs):
    train.train(prepare(config, one_device), tmp_path / 'student', {})
  assert not list((tmp_path / 'student').rglob('config.json'))


def test_a_folder_with_another_config_is_refused(tmp_path, one_device):
  train.train(prepare(small(), one_device), tmp_path, {})
  with pytest.raises(core.UserError, match=r'config\.seed: 0 -> 1'):
    train.train(prepare(small(seed=1), one_device), tmp_path, {})
  more_often = small(every__log_steps=3, evaluation__num_samples=7)  # trains the same
  train.train(prepare(more_often, one_device), tmp_path, {})


CIFAR10 = os.environ.get(DATA_DIR_VARIABLE, '')


@pytest.mark.skipif(
  not CIFAR10 or not (Path(CIFAR10) / 'cifar10').is_dir(),
  reason=f'no CIFAR-10 prepared by TFDS; set {DATA_DIR_VARIABLE}',
)
def test_ect_on_narrowed_cifar10_learns_a_fixed_batch(one_device):
  config = read(ROOT / 'configs' / 'ect.py:cifar10')
  config.update(dict(init_from='', batch_size=16))
  config.data.update(dict(data_dir=str(CIFAR10), split='train[:320]'))
  config.network.update(dict(channels=16, channel_mult=(1, 1), num_blocks=1))
  config.optimizer.learning_rate.value = 1e-3
  run = prepare(config, one_device)
  assert run.source.shape == (32, 32, 3)
  state = first_state(run)
  step = jax.jit(
    make_train_step(run.loss, run.tx, run.ema_decays, None, run.config.seed)
  )
  fixed = batches.batch(run, 0)

  @jax.jit
  def on_fixed_batch(params):
    draws = core.streams(jax.random.key(0), 0)
    return jnp.mean(run.loss(core.Nets(params, params), fixed, 0, draws).loss)

  before = on_fixed_batch(state.params)
  for k in range(20):
    state, metrics = step(state, core.Frozen(), batches.batch(run, k))
    assert np.isfinite(metrics['loss'])
    assert metrics['skipped'] == 0
  assert on_fixed_batch(state.params) < 0.98 * before


def test_a_damaged_checkpoint_is_passed_over_and_kept(tmp_path, one_device, capsys):
  run = prepare(small(), one_device)
  straight = train.train(run, tmp_path, {})
  newest = tmp_path / 'checkpoints' / '24' / 'online' / 'manifest.ocdbt'
  newest.write_bytes(newest.read_bytes()[:20])
  again = train.train(run, tmp_path, {})
  out = capsys.readouterr().out
  assert 'checkpoint 24 is damaged' in out
  assert 'resumes from step 18' in out
  assert (tmp_path / 'checkpoints' / '24.damaged').is_dir()
  assert_equal_states(straight, again)


def test_kill_9_at_a_random_moment_ends_in_the_same_bits(tmp_path, one_device):
  config = small(total_images=32 * 200, every__checkpoint_steps=10)
  command = [
    sys.executable, '-m', 'cmjax.main', f'--config={ROOT}/configs/edm.py:digits',
    f'--workdir={tmp_path / "killed"}',
    *(f'--config.{k}={v}' for k, v in SMALL.items()),
    f'--config.total_images={32 * 200}', '--config.every.checkpoint_steps=10',
  ]  # fmt: skip
  flags = os.environ['XLA_FLAGS'].replace('count=8', 'count=1')
  environment = os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}
  process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
  reached = b'step %d/' % (6 * random.randint(1, 20))  # of 200, a line each 6
  while not process.stdout.readline().startswith(reached):
    assert process.poll() is None
  time.sleep(random.uniform(0, 0.1))  # also in the middle of a save
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  resumed = subprocess.run(command, env=environment, capture_output=True, check=True)
  assert b'damaged' not in resumed.stdout

  run = prepare(config, one_device)
  straight = train.train(run, tmp_path / 'straight', {})
  checkpoints = checkpoint.Checkpoints(tmp_path / 'killed', keep=2)
  like = abstract_state(run)
  assert_equal_states(straight, checkpoints.restore(like, logs.say)[0])
  checkpoints.close()


# Sharding, accumulation and preemption -----------------------------------------------


@pytest.mark.parametrize('slices', [1, 2])
def test_split_state_gives_the_losses_of_data_parallel(slices):
  config = small(network__width=64)
  whole = prepare(config)
  split = prepare(config, sharding.mesh(fsdp=True, num_slices=slices))
  states = [random_state(run) for run in (whole, split)]
  kernel = states[1].params['block0_dense0']['kernel']
  assert kernel.addressable_shards[0].data.size == kernel.size * slices // 8
  steps = [train.compiled_step(run) for run in (whole, split)]
  for i in range(10):
    losses = []
    for j, run in enumerate((whole, split)):
      states[j], metrics = steps[j](states[j], run.frozen, batches.batch(run, i))
      losses.append(float(metrics['loss']))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # order of float32 sums
  places = jax.tree.map(lambda a: a.sharding, abstract_state(split))
  assert jax.tree.map(lambda a: a.sharding, states[1]) == places


def bytes_a_device(state):
  return sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state))


def test_split_state_takes_an_eighth_of_the_memory():
  run = prepare(small(network__width=256), sharding.mesh(fsdp=True))
  state = random_state(run)
  whole = sum(a.nbytes for a in jax.tree.leaves(state))
  assert bytes_a_device(state) <= (1 / 8 + 0.02) * whole


@pytest.mark.parametrize('unroll', [False, True])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(unroll):
  batch = core.Batch(jnp.arange(24.0).reshape(8, 3) / 10, None, jnp.arange(8))
  whole, parts = (
    make_train_step(linear_loss, optax.sgd(0.1), {}, None, 0, accumulate=n, unroll=way)
    for n, way in ((1, False), (4, unroll))
  )
  state = init_state(jnp.ones(3), optax.sgd(0.1).init(jnp.ones(3)), (), False)
  (a, seen), (b, seen_in_parts) = (
    step(state, core.Frozen(), batch) for step in (whole, parts)
  )
  np.testing.assert_allclose(b.params, a.params, rtol=1e-6)  # float32 sums
  assert seen_in_parts['loss'] == pytest.approx(float(seen['loss']), rel=1e-6)


def test_parts_have_independent_random_numbers():
  def noise_loss(nets, batch, step, keys):
    noise = jax.random.normal(keys['noise'], batch.x0.shape)
    return core.LossOut(noise[:, 0] * nets.online[0], {'sigma': noise[:, 0]})

  step = make_train_step(noise_loss, optax.sgd(0.1), {}, None, 0, accumulate=4)
  state = init_state(jnp.ones(1), optax.sgd(0.1).init(jnp.ones(1)), (), False)
  batch = core.Batch(jnp.zeros((4, 1)), None, jnp.arange(4))
  _, metrics = step(state, core.Frozen(), batch)
  quarters = [float(metrics[f'loss_q{i}']) for i in range(1, 5)]
  assert len(set(quarters)) == 4  # an example a part: with one key they would agree
  assert sorted(quarters) == quarters


def test_the_metrics_of_an_older_checkpoint_are_those_of_today():
  saved = {'steps': 2, 'sums': {'loss': 3.0, 'mean_t': 8.0}, 'skipped': [1]}
  window = Window(saved)
  one = jnp.ones(())
  window.add({'loss': one, 'mean_sigma': one, 'skipped': 0 * one})
  skipped, means = window.close(step=10, batch_size=4)
  assert skipped == [9]
  assert (means['loss'], means['mean_sigma']) == (4 / 3, 3.0)
  assert 'mean_t' not in means


def test_parts_that_do_not_divide_the_batch_are_refused():
  with pytest.raises(core.UserError, match=r'config\.accumulate: 3 .* 32'):
    prepare(small(accumulate=3))
  with pytest.raises(
    core.UserError, match=r'config\.batch_size: 32 .* 8 dev.* 8 parts'
  ):
    prepare(small(accumulate=8))


def rows_of(workdir):
  """What was logged, without what depends on the clock."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').open()]
  timed = ('images_per_s', 'data_wait')
  return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def test_a_preempted_run_resumes_to_the_same_bits(tmp_path, one_device, capsys):
  # Neither the notice nor the checkpoints come where a row of metrics ends.
  run = prepare(small(every__picture_steps=3, every__log_steps=5), one_device)

  def ask(run, params, step, log, check):
    if step == 9:
      os.kill(os.getpid(), signal.SIGTERM)

  before = signal.getsignal(signal.SIGTERM)
  stopped = train.train(run, tmp_path / 'asked', {'picture': ask})
  assert int(stopped.step) == 9
  assert 'saved step 9' in capsys.readouterr().out
  assert signal.getsignal(signal.SIGTERM) == before
  again = train.train(run, tmp_path / 'asked', {})
  assert_equal_states(train.train(run, tmp_path / 'straight', {}), again)
  assert rows_of(tmp_path / 'asked') == rows_of(tmp_path / 'straight')


@pytest.mark.parametrize('at', [6, 24])
def test_an_interrupted_hook_is_repeated_when_the_run_resumes(
  at, tmp_path, one_device, capsys
):
  run = prepare(small(every__picture_steps=6, every__evaluate_steps=6), one_device)
  started, ended = [], []

  def slow(name):
    def look(run, params, step, log, check):
      started.append((name, step))
      if started.count(('picture', at)) == 1 and (name, step) == ('picture', at):
        os.kill(os.getpid(), signal.SIGTERM)
      check()
      ended.append((name, step, float(params['output']['bias'][0])))

    return look

  hooks = {name: slow(name) for name in ('picture', 'evaluate')}
  assert int(train.train(run, tmp_path, hooks).step) == at
  out = capsys.readouterr().out
  assert f'saved step {at}' in out
  assert 'done: ' not in out
  state = train.train(run, tmp_path, hooks)
  assert 'done: ' in capsys.readouterr().out
  assert [(name, step) for name, step, _ in ended] == [
    (name, step) for step in (6, 12, 18, 24) for name in ('picture', 'evaluate')
  ]
  assert ended[-1][2] == float(state.ema['slow']['output']['bias'][0])
  assert len(started) == len(ended) + 1
  train.train(run, tmp_path, hooks)  # and not once more where the run is at its end
  assert len(started) == len(ended) + 1


def test_sigterm_during_an_evaluation_ends_it_within_seconds(tmp_path):
  command = [
    sys.executable, '-m', 'cmjax.main', '--config=edm:digits', f'--workdir={tmp_path}',
    *(f'--config.{k}={v}' for k, v in SMALL.items()),
  ]  # fmt: skip
  endless = [
    '--config.every.evaluate_steps=6', '--config.evaluation.num_samples=5000000',
    '--config.evaluation.batch_size=64',
  ]  # fmt: skip
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  process = subprocess.Popen(
    [*command, *endless], env=environment, stdout=subprocess.PIPE, text=True
  )
  while not re.search('samples left=', line := process.stdout.readline()):
    assert line
  process.send_signal(signal.SIGTERM)
  start = time.monotonic()
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 0
  # A batch of 64 and a save take well under a second, the evaluation hours; between
  # them lies a busy machine.
  assert time.monotonic() - start < 30
  assert 'saved step 6' in out
  again = subprocess.run(
    [*command, '--config.every.evaluate_steps=6', '--config.evaluation.num_samples=16'],
    env=environment, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert 'step 6 heun: evaluations=35 samples=16' in again.stdout
  assert 'step 24 heun: ' in again.stdout


def test_a_run_with_only_skipped_steps_fails(tmp_path, one_device, capsys):
  run = prepare(small(), one_device)

  def broken(nets, batch, step, keys):
    out = run.loss(nets, batch, step, keys)
    return out._replace(loss=out.loss * jnp.nan)

  with pytest.raises(FloatingPointError, match='all 24 steps were skipped'):
    train.train(run._replace(loss=broken), tmp_path, {})
  out = capsys.readouterr().out
  assert 'skipped_steps=24' in out
  assert 'done: ' not in out


def test_a_run_that_diverges_fails(tmp_path, one_device, capsys):
  run = prepare(small(), one_device)

  def grows(nets, batch, step, keys):
    out = run.loss(nets, batch, step, keys)
    return out._replace(loss=out.loss * 10.0**step)

  with pytest.raises(FloatingPointError, match='the run diverged'):
    train.train(run._replace(loss=grows), tmp_path, {})
  assert 'done: ' not in capsys.readouterr().out


def test_a_run_with_skipped_steps_in_its_first_and_last_row_succeeds(
  tmp_path, one_device, capsys
):
  run = prepare(small(), one_device)

  def loss(nets, batch, step, keys):
    out = run.loss(nets, batch, step, keys)
    bad = (step == 1) | (step == 22)
    return out._replace(loss=jnp.where(bad, jnp.nan, out.loss))

  train.train(run._replace(loss=loss), tmp_path, {})
  assert 'done: ' in capsys.readouterr().out


def test_steps_skipped_before_a_restart_are_not_counted_after_it(tmp_path, one_device):
  every = dict(every__log_steps=12, every__picture_steps=7)
  run = prepare(small(total_images=32 * 12, **every), one_device)

  def loss(nets, batch, step, keys):
    out = run.loss(nets, batch, step, keys)
    return out._replace(loss=jnp.where(step < 6, jnp.nan, out.loss))

  def fall(run, params, step, log, check):
    raise RuntimeError

  fails = run._replace(loss=loss)
  with pytest.raises(
    RuntimeError
  ):  # after the checkpoint of step 6, whose all are lost
    train.train(fails, tmp_path, {'picture': fall})
  state = train.train(fails, tmp_path, {})  # its own six steps are kept
  assert int(state.step) == 12


def test_a_training_step_that_waits_for_data_is_reported(
  tmp_path, one_device, monkeypatch, capsys
):
  settings = dict(watchdog__report_s=0.2, every__log_steps=24)
  run, read = prepare(small(**settings), one_device), train.batches

  def slow(run, first):
    for step, batch in enumerate(read(run, first), first + 1):
      time.sleep(1.0 if step == 21 else 0.0)
      yield batch

  monkeypatch.setattr(train, 'batches', slow)
  monkeypatch.setattr(train, 'SHOWN_WAIT', 0.0)
  train.train(run, tmp_path, {})
  printed = capsys.readouterr()
  assert re.search(
    r'process 0: step 21 has taken \d s, .*: this process waits for its data;',
    printed.err,
  )
  assert 'in slow' in printed.err
  (row,) = (json.loads(line) for line in (tmp_path / 'metrics.jsonl').open())
  assert 0.1 < row['data_wait'] < 1  # 23 steps of a few ms, and the second in one
  assert f'data_wait={row["data_wait"]:.4g}' in printed.out


def test_two_runs_in_one_folder_lose_nothing(tmp_path, one_device):
  command = [
    sys.executable, '-m', 'cmjax.main', '--config=edm:digits', f'--workdir={tmp_path}',
    *(f'--config.{k}={v}' for k, v in SMALL.items()),
    f'--config.total_images={32 * 300}',
  ]  # fmt: skip
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  both = [
    subprocess.Popen(
      [*command, f'--config.seed={seed}'], env=environment, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for seed in (0, 1)
  ]  # fmt: skip
  outputs = [process.communicate(timeout=300) for process in both]
  codes = [process.returncode for process in both]
  assert sorted(codes) == [0, 2], outputs
  winner, (_, error) = codes.index(0), outputs[codes.index(2)]
  owner = f'process {both[winner].pid} on host'
  assert owner in error or 'another config' in error
  assert error.count('\n') == 1
  assert [row['step'] for row in rows_of(tmp_path)] == list(range(6, 301, 6))
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['seed'] == winner
  again = subprocess.run(
    [*command, f'--config.seed={winner}'], env=environment, capture_output=True,
    text=True, check=True,
  )  # fmt: skip
  assert 'resumes from step 300' in again.stdout


def test_a_run_without_its_config_file_resumes(tmp_path, one_device):
  config = small(every__picture_steps=3)
  run = prepare(config, one_device)

  def fall(run, params, step, log, check):
    if step == 9:
      raise RuntimeError

  with pytest.raises(RuntimeError):
    train.train(run, tmp_path, {'picture': fall})
  (tmp_path / 'config.json').unlink()
  other = prepare(small(seed=1), one_device)
  with pytest.raises(core.UserError, match=r'config\.seed: 0 -> 1'):
    train.train(other, tmp_path, {})
  train.train(run, tmp_path, {})
  assert differences(load(tmp_path / 'config.json'), config) == {}


def test_skipped_steps_are_named_by_batch_and_seed(tmp_path, one_device):
  run = prepare(small(max_skipped_steps=1, seed=7), one_device)

  def loss(nets, batch, step, keys):
    out = run.loss(nets, batch, step, keys)
    bad = (step == 2) | (step == 4)
    return out._replace(loss=jnp.where(bad, jnp.nan, out.loss))

  error = r'config\.max_skipped_steps: 2 steps .* batch 4 of config.seed 7'
  with pytest.raises(FloatingPointError, match=error):
    train.train(run._replace(loss=loss), tmp_path, {})


def test_a_failed_save_is_one_line_and_the_run_can_be_repeated(tmp_path):
  command = [
    sys.executable, '-m', 'cmjax.main', f'--config={ROOT}/configs/edm.py:digits',
    f'--workdir={tmp_path}', *(f'--config.{k}={v}' for k, v in SMALL.items()),
  ]  # fmt: skip
  environment = os.environ | {'PYTHONPATH': str(ROOT)}

  # Kibibytes of a file: metrics and configs are smaller, weights are not.
  limited = ['bash', '-c', 'ulimit -f 15 && exec "$@"', 'limited', *command]

  def run(command):
    return subprocess.run(
      command, env=environment, capture_output=True, text=True, timeout=300
    )

  failed = run(limited)
  assert failed.returncode == 2, failed.stderr
  assert failed.stderr.count('\n') == 1, failed.stderr
  assert re.search('saving a checkpoint failed .* from step 0', failed.stderr)
  again = run(command)
  assert again.returncode == 0, again.stderr
  assert 'step 24/24' in again.stdout
