"""What was saved comes back bit for bit, or an older step does; nothing else ever."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cmjax import checkpoint, sharding
from cmjax.core import TrainState, UserError

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
  """The state found, and what was said on the way."""
  checkpoints, said = checkpoint.Checkpoints(workdir, 2), []
  try:
    return checkpoints.restore(state(0) if like is None else like, said.append), said
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
  found, said = restore(tmp_path, state(0, target=target))
  assert same(found, saved)
  assert not same(found, state(6, target=target))
  assert said == []


def test_a_state_comes_back_on_other_devices(two_steps):
  like = state(0, devices=jax.devices()[2:4])
  found, _ = restore(two_steps, like)
  assert same(found, state(2))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(like)):
    assert a.sharding == b.sharding


def test_a_state_may_be_donated_while_it_is_being_saved(tmp_path):
  saved = state(3)
  checkpoints = checkpoint.Checkpoints(tmp_path, 2)
  checkpoints.save(saved, META)
  spoil = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 + 7, s), donate_argnums=0)
  jax.block_until_ready(spoil(saved))
  checkpoints.close()
  assert jax.tree.leaves(saved)[0].is_deleted()
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
  found, said = restore(workdir)
  assert same(found, state(2))
  assert said == []
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
    found, said = restore(workdir)
    if said:
      fell_back += 1
      assert same(found, state(1)), path
      assert folders(workdir) == ['1', '2.damaged']
      assert 'checkpoint 2 is damaged' in said[0]
      assert str(workdir / 'checkpoints' / '2.damaged') in said[0]
      assert contents(workdir / 'checkpoints' / '2.damaged') == before  # all of it
    else:
      assert same(found, state(2)), path
      assert folders(workdir) == ['1', '2']
  assert 0 < fell_back < len(suspects)  # some files are copies of others


def test_a_checkpoint_with_a_part_missing_is_passed_over(workdir):
  shutil.rmtree(workdir / 'checkpoints' / '2' / 'ema.slow')
  found, said = restore(workdir)
  assert same(found, state(1))
  assert 'checkpoint 2 is damaged' in said[0]


def test_a_run_without_a_whole_checkpoint_is_refused(workdir):
  ruin(workdir, 1)
  ruin(workdir, 2)
  for _ in range(2):  # and refused again: it does not start from nothing
    with pytest.raises(
      UserError, match=r'no checkpoint .* can be read.*another --workdir'
    ):
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
def test_a_place_without_checkpoints_is_named(inside, tmp_path):
  place = tmp_path / 'nothing' / inside
  with pytest.raises(UserError, match='no checkpoints there') as error:
    checkpoint.newest(place, lambda step, meta: step, print)
  assert str(place) in str(error.value)


@pytest.mark.parametrize('name', ['online', 'fast', 'slow'])
def test_one_set_of_weights_can_be_read_alone(name, two_steps):
  found = checkpoint.read_weights(two_steps, 2, name, state(0).params)
  saved = state(2)
  assert same(found, saved.params if name == 'online' else saved.ema[name])


def test_weights_that_are_not_there_are_told_with_those_that_are(two_steps):
  with pytest.raises(UserError, match=r"no weights 'target'.*online, fast, slow"):
    checkpoint.read_weights(two_steps, 2, 'target', state(0).params)


OTHER_NETWORKS = {
  'another shape': (
    lambda p: p | {'odd': p['layer']['kernel']},
    r"parameter \['odd'\] is \(5,\) there and \(3, 5\) here",
  ),
  'one more here': (
    lambda p: p | {'more': p['odd']},
    r"parameter \['more'\] is absent there and \(5,\) here",
  ),
  'one more there': (
    lambda p: {'layer': p['layer']},
    r"parameter \['odd'\] is \(5,\) there and absent here",
  ),
}


@pytest.mark.parametrize('case', OTHER_NETWORKS)
def test_weights_of_another_network_name_the_first_that_differs(case, two_steps):
  change, told = OTHER_NETWORKS[case]
  like = change(state(0).params)
  with pytest.raises(UserError, match=f'holds another network: {told}'):
    checkpoint.read_weights(two_steps, 2, 'slow', like)


@pytest.mark.parametrize('damage', [cut, empty, delete], ids=lambda d: d.__name__)
def test_damaged_weights_are_passed_over_for_older_ones(damage, workdir):
  for path in files(workdir / 'checkpoints' / '2' / 'ema.slow'):
    damage(path)
  before, said = folders(workdir), []

  def read(step, meta):
    return checkpoint.read_weights(workdir, step, 'slow', state(0).params)

  assert same(checkpoint.newest(workdir, read, said.append), state(1).ema['slow'])
  assert len(said) == 1
  assert 'checkpoints/2 is damaged' in said[0]
  assert folders(workdir) == before  # who only reads renames nothing


def test_a_step_set_aside_can_be_saved_and_damaged_again(workdir):
  for aside in (['2.damaged'], ['2.damaged', '2.damaged_2']):
    ruin(workdir, 2)
    checkpoints, said = checkpoint.Checkpoints(workdir, 2), []
    found = checkpoints.restore(state(0), said.append)
    assert same(found, state(1))
    assert aside[-1] in said[0]
    checkpoints.save(state(2), META)
    checkpoints.close()
    assert folders(workdir) == ['1', '2', *aside]
    assert same(restore(workdir)[0], state(2))
