"""What was saved comes back bit for bit, or an older step does; nothing else ever."""

import json
import os
from pathlib import Path
import random
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cmjax.core import TrainState, UserError
from cmjax.runtime import checkpoint, checksums, sharding
from tests.conftest import ROOT

META = {'config': '{"seed": 0}', 'shape': [8, 8, 1], 'classes': 10}
# What a sum or a cast on the way would not bring back unchanged.
ODD = np.array([-0.0, np.nan, np.inf, 1e-40, 1 / 3], np.float32)


def state(step, *, target=True, devices=None):
  """A state whose every leaf depends on the step."""
  rng = np.random.default_rng(step)

  def params():
    kernel = rng.normal(size=(3, 5)).astype(np.float32)
    return {'layer': {'kernel': kernel, 'bias': ODD + np.float32(step)}, 'odd': ODD}

  online = params()
  opt_state = optax.adam(optax.constant_schedule(1e-3)).init(online)
  made = TrainState(
    step=jnp.int32(step),
    params=online,
    target=params() if target else None,
    ema={'fast': params(), 'slow': params()},
    opt_state=jax.tree.map(lambda a: a + np.asarray(step, a.dtype), opt_state),
  )
  place = sharding.replicated(sharding.data_mesh(devices))
  return jax.tree.map(lambda a: jax.device_put(a, place), made)


def same(a, b):
  """Structure, types and every bit, the sign of zero and the kind of NaN included."""
  if jax.tree.structure(a) != jax.tree.structure(b):
    return False
  return all(
    x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
  )


def save(workdir, *states, keep=2):
  checkpoints = checkpoint.Checkpoints(workdir, keep)
  for each in states:
    checkpoints.save(each, META)
  checkpoints.close()


def restore(workdir, like=None):
  """The restored state, and the lines that were printed."""
  checkpoints, lines = checkpoint.Checkpoints(workdir, 2), []
  try:
    restored = checkpoints.restore(state(0) if like is None else like, lines.append)
    return (restored and restored[0]), lines
  finally:
    checkpoints.close()


def folders(workdir):
  return sorted(p.name for p in (workdir / 'checkpoints').iterdir())


def files(folder):
  return sorted(p for p in folder.rglob('*') if p.is_file())


def contents(folder):
  return {p.relative_to(folder): p.read_bytes() for p in files(folder)}


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
  path.write_bytes(b'')


def delete(path):
  path.unlink()


def flip(path, bit):
  data = bytearray(path.read_bytes())
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)


def noise():
  """Parameters that do not compress, so that one bit on a disk is one bit of a value.

  A sixteenth of them is 4 kB, which is enough not to be stored with the index.
  """
  draw = np.random.default_rng(0)
  return {'kernel': draw.integers(2**32, size=(256, 64), dtype=np.uint32)}


def largest(folder):
  return max(files(folder), key=lambda p: p.stat().st_size)


def edit_meta(workdir, step, change):
  """Writes what `change` makes of the meta of a step."""
  path = workdir / 'checkpoints' / str(step) / 'meta' / 'metadata'
  path.write_text(json.dumps(change(json.loads(path.read_text()))))


def without_hashes(meta):
  """The meta as version 0.2 saved it."""
  return {key: meta[key] for key in (*META, 'step')}


def ruin(workdir, step):
  """Cuts every file of the weights of a step."""
  for path in files(workdir / 'checkpoints' / str(step) / 'online'):
    cut(path)


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  """A work directory with checkpoints of steps 1 and 2, not to be changed."""
  workdir = tmp_path_factory.mktemp('two_steps')
  save(workdir, state(1), state(2))
  return workdir


@pytest.fixture
def workdir(two_steps, tmp_path):
  """A copy of it, to do with as one likes."""
  return shutil.copytree(two_steps, tmp_path / 'run')


# Save and restore ------------------------------------------------------------------


@pytest.mark.parametrize('target', [True, False])
def test_a_state_comes_back_bit_for_bit(target, tmp_path):
  saved = state(5, target=target)
  save(tmp_path, saved)
  restored, lines = restore(tmp_path, state(0, target=target))
  assert same(restored, saved)
  assert not same(restored, state(6, target=target))
  assert lines == []


def test_a_state_comes_back_on_other_devices(two_steps):
  like = state(0, devices=jax.devices()[2:4])
  restored, _ = restore(two_steps, like)
  assert same(restored, state(2))
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(like)):
    assert a.sharding == b.sharding


def test_a_state_may_be_donated_while_it_is_being_saved(tmp_path):
  saved = state(3)
  checkpoints = checkpoint.Checkpoints(tmp_path, 2)
  checkpoints.save(saved, META)
  # Arrays that are still being read are copied instead of donated.
  spoil = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 + 7, s), donate_argnums=0)
  jax.block_until_ready(spoil(saved))
  checkpoints.close()
  assert same(restore(tmp_path)[0], state(3))


def test_only_the_newest_are_kept(tmp_path):
  save(tmp_path, *map(state, (1, 2, 10, 11)), keep=3)
  assert folders(tmp_path) == ['10', '11', '2']
  assert same(restore(tmp_path)[0], state(11))


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
  assert restore(tmp_path) == (None, [])


def test_what_a_killed_save_left_is_ignored_and_its_step_can_be_saved(workdir):
  left = workdir / 'checkpoints' / '3.orbax-checkpoint-tmp'
  shutil.copytree(workdir / 'checkpoints' / '2', left)
  delete(left / '_CHECKPOINT_METADATA')
  assert checkpoint.newest(workdir, lambda step, meta: step, print) == 2
  restored, lines = restore(workdir)
  assert same(restored, state(2))
  assert lines == []
  save(workdir, state(3))
  assert folders(workdir) == ['2', '3']
  assert same(restore(workdir)[0], state(3))


# Damage ----------------------------------------------------------------------------


@pytest.mark.parametrize('damage', [cut, empty, delete], ids=lambda d: d.__name__)
def test_a_damaged_file_is_harmless_or_noticed(damage, two_steps, tmp_path):
  newest = two_steps / 'checkpoints' / '2'
  # Every item has the same files as `online`, and hashes for names are alike: so that
  # these, by folder and kind, stand for all.
  those = files(newest / 'online') + [p for p in newest.iterdir() if p.is_file()]
  suspects = {(p.parent, len(p.name) == 32 or p.name): p for p in those}.values()
  fell_back = 0
  for i, path in enumerate(suspects):
    workdir = shutil.copytree(two_steps, tmp_path / str(i))
    damage(workdir / path.relative_to(two_steps))
    before = contents(workdir / 'checkpoints' / '2')
    restored, lines = restore(workdir)
    if lines:
      fell_back += 1
      assert same(restored, state(1)), path
      assert folders(workdir) == ['1', '2.damaged']
      assert 'checkpoint 2 is damaged' in lines[0]
      assert str(workdir / 'checkpoints' / '2.damaged') in lines[0]
      assert contents(workdir / 'checkpoints' / '2.damaged') == before  # all of it
    else:
      assert same(restored, state(2)), path
      assert folders(workdir) == ['1', '2']
  assert 0 < fell_back < len(suspects)  # some files are copies of others


def test_no_flipped_bit_is_restored(tmp_path):
  place = sharding.replicated(sharding.data_mesh(jax.devices()[:1]))

  def of_noise(step):
    values = {'kernel': noise()['kernel'] + np.uint32(step)}
    made = TrainState(np.int32(step), values, None, {'fast': values}, {'mu': values})
    return jax.tree.map(lambda a: jax.device_put(a, place), made)

  save(tmp_path / 'run', of_noise(1), of_noise(2))
  step = tmp_path / 'run' / 'checkpoints' / '2'
  draw, fell_back = random.Random(0), 0
  arrays = [largest(item) for item in step.iterdir() if item.is_dir()]
  for i, path in enumerate(arrays + draw.choices(files(step), k=16)):
    workdir = shutil.copytree(tmp_path / 'run', tmp_path / str(i))
    path = workdir / path.relative_to(tmp_path / 'run')
    flip(path, draw.randrange(8 * path.stat().st_size))
    lines = []

    def read(step, meta, workdir=workdir):
      return meta, checkpoint.read_weights(workdir, step, 'fast', of_noise(0).params)

    meta, weights = checkpoint.newest(workdir, read, lines.append)
    assert meta == META | {'step': 2 - len(lines)}, path
    assert same(weights, of_noise(2 - len(lines)).ema['fast']), path
    restored, lines = restore(workdir, of_noise(0))
    assert same(restored, of_noise(2 - len(lines))), path
    fell_back += len(lines)
  assert fell_back >= 4  # params, EMA, optimiser state and meta, and some of the rest


@pytest.mark.parametrize('devices', [1, 4, 8])
def test_arrays_are_compared_on_any_devices(devices, tmp_path):
  def placed(step, mesh):
    tree = TrainState(np.int32(step), noise(), None, {}, {'mu': noise()})
    return sharding.place(tree, sharding.of_state(mesh, tree))

  split = sharding.mesh(fsdp=True)
  save(tmp_path, placed(1, split), placed(2, split))
  like = placed(0, sharding.mesh(fsdp=True, devices=jax.devices()[:devices]))
  restored, lines = restore(tmp_path, like)
  assert (int(restored.step), lines) == (2, [])
  assert restored.params['kernel'].sharding == like.params['kernel'].sharding
  flip(largest(tmp_path / 'checkpoints' / '2' / 'opt_state'), 8 * 9000)
  restored, lines = restore(tmp_path, like)
  assert int(restored.step) == 1
  assert 'opt_state/mu/kernel differs from its hash' in lines[0]
  np.testing.assert_array_equal(restored.opt_state['mu']['kernel'], noise()['kernel'])


BAD_META = {
  'a list': lambda meta: [],
  'a number': lambda meta: 3,
  'null': lambda meta: None,
  'nothing in it': lambda meta: {},
  'another config': lambda meta: meta | {'config': '{"seed": 1}'},
  'another shape': lambda meta: meta | {'shape': [8, 8, 3]},
  'one hash less': lambda meta: meta | {'arrays': {}},
  'no hashes': lambda meta: {k: v for k, v in meta.items() if k != 'arrays'},
  'no hash of itself': lambda meta: {k: v for k, v in meta.items() if k != 'hash'},
  'of another step': lambda meta: without_hashes(meta) | {'step': 7},
  'without a config': lambda meta: {'step': 2, 'shape': [8, 8, 1], 'classes': 10},
}


@pytest.mark.parametrize('fault', [*BAD_META, 'deep', 'not text'])
def test_a_step_with_a_bad_meta_is_damaged(fault, workdir):
  path = workdir / 'checkpoints' / '2' / 'meta' / 'metadata'
  if fault == 'deep':
    path.write_text('[' * 100_000 + ']' * 100_000)
  elif fault == 'not text':
    path.write_bytes(bytes(range(128, 256)))
  else:
    edit_meta(workdir, 2, BAD_META[fault])
  lines = []
  assert checkpoint.newest(workdir, lambda step, meta: step, lines.append) == 1
  assert checkpoint.read_meta(workdir) == META | {'step': 1}
  restored, also_lines = restore(workdir)
  assert same(restored, state(1))
  for line in (*lines, *also_lines):
    assert 'damaged' in line
    assert '\n' not in line
  assert len(lines) == len(also_lines) == 1


def test_checkpoints_without_hashes_are_restored(workdir):
  for step in (1, 2):
    edit_meta(workdir, step, without_hashes)
  for name in ('slow', 'target'):
    weights = checkpoint.read_weights(workdir, 2, name, state(0).params)
    assert same(weights, state(2).ema['slow'] if name == 'slow' else state(2).target)
  with pytest.raises(UserError, match=r"'fats'.*online, target, fast, slow"):
    checkpoint.read_weights(workdir, 2, 'fats', state(0).params)
  with pytest.raises(UserError, match=r'parameter odd is .* and missing in the model'):
    checkpoint.read_weights(workdir, 2, 'slow', {'layer': state(0).params['layer']})
  assert same(restore(workdir)[0], state(2))


POD = """
import jax, numpy as np
from tests import test_checkpoint
from cmjax.runtime import sharding
sharding.start({address!r}, 2, {process})
test_checkpoint.in_each_process({workdir!r})
"""


def in_each_process(workdir):
  """Saves two steps, damages the second and reads, as one of two processes."""
  workdir, first = Path(workdir), jax.process_index() == 0
  split, whole = sharding.mesh(fsdp=True), sharding.data_mesh()
  halves = sharding.mesh(fsdp=True, num_slices=2)  # each process holds all

  def placed(step, mesh):
    own = {'kernel': noise()['kernel'] + np.uint32(step)}
    tree = TrainState(np.int32(step), own, None, {'slow': own}, {'mu': own})
    return sharding.place(tree, sharding.of_state(mesh, tree))

  def opened(mesh, step):
    like = placed(0, mesh)
    restored, lines = restore(workdir, like)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(placed(step, mesh))):
      for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
        np.testing.assert_array_equal(x.data, y.data)
    return lines

  def wait():
    jax.experimental.multihost_utils.sync_global_devices('wait')

  save(workdir, placed(1, split), placed(2, split), placed(3, split), keep=3)
  for mesh in (split, whole, halves):
    assert opened(mesh, 3) == []
  assert not placed(0, split).params['kernel'].is_fully_addressable
  wait()
  if first:  # what the other process wrote
    of_other = workdir / 'checkpoints' / '3' / 'ema.slow' / 'ocdbt.process_1'
    flip(largest(of_other), 8 * 9000)
  wait()

  def read(step, meta):
    return step, checkpoint.read_weights(workdir, step, 'slow', placed(0, split).params)

  lines = []
  assert checkpoint.newest(workdir, read, lines.append)[0] == 2
  assert 'ema.slow/kernel differs from its hash' in lines[0]
  (line,) = opened(split, 2)
  assert 'ema.slow/kernel differs from its hash' in line
  assert (folders(workdir), opened(whole, 2)) == (['1', '2', '3.damaged'], [])

  compare = checksums.compare  # then only one of them finds a fault

  def fail_once(item, saved, restored):
    checksums.compare = compare
    raise ValueError('a fault of one process')

  if not first:
    checksums.compare = fail_once
  (line,) = opened(split, 1)
  assert ('another process' if first else 'a fault of one process') in line
  wait()
  assert folders(workdir) == ['1', '2.damaged', '3.damaged']


def test_two_processes_agree_on_which_checkpoints_are_intact(tmp_path):
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    address = f'localhost:{probe.getsockname()[1]}'
  pod = [
    subprocess.Popen(
      [sys.executable, '-c',
       POD.format(address=address, process=i, workdir=str(tmp_path))],
      cwd=ROOT,
      env=os.environ | {'PYTHONPATH': str(ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    for process in pod:
      text, _ = process.communicate(timeout=120)  # seconds; only to end what hangs
      assert process.returncode == 0, text
  finally:
    for process in pod:
      process.kill()


def test_a_checkpoint_with_a_part_missing_is_passed_over(workdir):
  shutil.rmtree(workdir / 'checkpoints' / '2' / 'ema.slow')
  restored, lines = restore(workdir)
  assert same(restored, state(1))
  assert 'checkpoint 2 is damaged' in lines[0]


def test_a_run_without_a_whole_checkpoint_is_refused(workdir):
  ruin(workdir, 1)
  ruin(workdir, 2)
  for _ in range(2):  # and refused again: it does not start from nothing
    with pytest.raises(UserError, match=r'all checkpoints are damaged.*new --workdir'):
      restore(workdir)
  assert folders(workdir) == ['1', '2']  # neither renamed nor lost


# Reading without a state -----------------------------------------------------------


def test_newest_gives_step_and_meta_or_those_of_the_step_named(two_steps):
  def read(step, meta):
    return step, meta

  assert checkpoint.newest(two_steps, read, print) == (2, META | {'step': 2})
  first = two_steps / 'checkpoints' / '1'
  assert checkpoint.newest(first, read, print) == (1, META | {'step': 1})


@pytest.mark.parametrize('inside', ['', 'checkpoints/1', 'checkpoints'])
def test_a_folder_without_checkpoints_is_named(inside, tmp_path):
  place = tmp_path / 'nothing' / inside
  with pytest.raises(UserError, match='no checkpoints') as error:
    checkpoint.newest(place, lambda step, meta: step, print)
  assert str(place) in str(error.value)


@pytest.mark.parametrize('name', ['online', 'fast', 'slow'])
def test_one_set_of_weights_can_be_read_alone(name, two_steps):
  restored = checkpoint.read_weights(two_steps, 2, name, state(0).params)
  saved = state(2)
  assert same(restored, saved.params if name == 'online' else saved.ema[name])


def test_the_target_network_can_be_read_alone_if_there_is_one(two_steps, tmp_path):
  restored = checkpoint.read_weights(two_steps, 2, 'target', state(0).params)
  assert same(restored, state(2).target)
  save(tmp_path, state(1, target=False))
  with pytest.raises(UserError, match=r"no weights 'target'.*online, fast, slow"):
    checkpoint.read_weights(tmp_path, 1, 'target', state(0).params)


def test_an_unknown_name_of_weights_lists_those_of_the_checkpoint(two_steps):
  with pytest.raises(UserError, match=r"'fats'.*online, target, fast, slow"):
    checkpoint.read_weights(two_steps, 2, 'fats', state(0).params)


def test_a_state_comes_back_with_its_meta(two_steps):
  checkpoints = checkpoint.Checkpoints(two_steps, 2)
  _, meta = checkpoints.restore(state(0), print)
  checkpoints.close()
  assert meta == META | {'step': 2}
  assert checkpoint.read_meta(two_steps) == meta
  first = two_steps / 'checkpoints' / '1'
  assert checkpoint.read_meta(first) == META | {'step': 1}


def test_a_run_has_an_optimiser_state_and_weights_alone_have_none(two_steps, tmp_path):
  checkpoint.save_weights(tmp_path, 3, state(3).params, META)
  assert checkpoint.is_run(two_steps)
  assert not checkpoint.is_run(tmp_path)
  assert same(
    checkpoint.read_weights(tmp_path, 3, 'online', state(0).params), state(3).params
  )
  with pytest.raises(UserError, match='no checkpoints'):
    checkpoint.is_run(tmp_path / 'absent')


OTHER_NETWORKS = {
  'another shape': (
    lambda p: p | {'odd': p['layer']['kernel']},
    r'parameter odd is \(5,\) in .* and \(3, 5\) in',
  ),
  'one more in the model': (
    lambda p: p | {'more': p['odd']},
    r'parameter more is missing in .* and \(5,\) in',
  ),
  'one more in the checkpoint': (
    lambda p: {'layer': p['layer']},
    r'parameter odd is \(5,\) in .* and missing in',
  ),
  'another type': (
    lambda p: p | {'odd': p['odd'].astype(jnp.bfloat16)},
    r'parameter odd is float32 in .* and bfloat16 in',
  ),
}


@pytest.mark.parametrize('case', OTHER_NETWORKS)
def test_weights_of_another_network_name_the_first_that_differs(case, two_steps):
  change, difference = OTHER_NETWORKS[case]
  like = change(state(0).params)
  with pytest.raises(UserError, match=f'another network: {difference}'):
    checkpoint.read_weights(two_steps, 2, 'slow', like)


@pytest.mark.parametrize('damage', [cut, empty, delete], ids=lambda d: d.__name__)
def test_damaged_weights_are_passed_over_for_older_ones(damage, workdir):
  for path in files(workdir / 'checkpoints' / '2' / 'ema.slow'):
    damage(path)
  before, lines = folders(workdir), []

  def read(step, meta):
    return checkpoint.read_weights(workdir, step, 'slow', state(0).params)

  assert same(checkpoint.newest(workdir, read, lines.append), state(1).ema['slow'])
  assert len(lines) == 1
  assert 'checkpoints/2 is damaged' in lines[0]
  assert folders(workdir) == before  # who only reads renames nothing


def test_a_renamed_step_can_be_saved_and_damaged_again(workdir):
  for renamed in (['2.damaged'], ['2.damaged', '2.damaged_2']):
    ruin(workdir, 2)
    checkpoints, lines = checkpoint.Checkpoints(workdir, 2), []
    restored, _ = checkpoints.restore(state(0), lines.append)
    assert same(restored, state(1))
    assert renamed[-1] in lines[0]
    checkpoints.save(state(2), META)
    checkpoints.close()
    assert folders(workdir) == ['1', '2', *renamed]
    assert same(restore(workdir)[0], state(2))
