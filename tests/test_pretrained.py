"""A run that was trained opens as a model that gives exactly its own outputs."""

import shutil

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from cmjax.core import UserError
from cmjax.runtime import checkpoint, pretrained
from cmjax.runtime.build import build_each
from cmjax.runtime.config import read
from cmjax.runtime.config_record import differences
from cmjax.runtime.run import prepare
from cmjax.runtime.state import first_state
from cmjax.samplers import Sampler
from tests.conftest import ROOT

SAVED_STEPS = (4, 9)


def small_config(width=16, **network):
  config = read(ROOT / 'configs' / 'edm.py:digits')
  config.network.update(width=width, num_blocks=1, embedding=8, **network)
  return config


def shifted(params, seed):
  """Weights unlike any others, and unlike the zeros that a network starts with."""
  rng = np.random.default_rng(seed)

  def moved(a):
    noise = rng.normal(size=a.shape).astype(a.dtype)
    return jax.device_put(np.asarray(a) + 0.2 * noise, a.sharding)

  return jax.tree.map(moved, params)


@pytest.fixture(scope='module')
def saved(tmp_path_factory, one_device):
  """A run, its folder, and the states saved in it, by step."""
  run = prepare(small_config(), one_device)
  first = first_state(run)
  states = {
    step: first._replace(
      step=jnp.int32(step),
      params=shifted(first.params, step),
      ema={'slow': shifted(first.params, 100 + step)},
    )
    for step in SAVED_STEPS
  }
  workdir = tmp_path_factory.mktemp('run')
  checkpoints = checkpoint.Checkpoints(workdir, keep=2)
  for state in states.values():
    checkpoints.save(state, run.meta())
  checkpoints.close()
  return run, workdir, states


def noisy_images():
  return np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)


def outputs(f, params):
  """What a model makes of three noisy images at three noise levels."""
  x = noisy_images()
  t = np.array([0.01, 1.0, 80.0], np.float32)
  return np.asarray(jax.jit(f)(params, x, t, np.eye(10, dtype=np.float32)[[0, 4, 9]]))


def test_a_run_opens_with_the_weights_it_samples_from(saved, one_device):
  run, workdir, states = saved
  found = pretrained.load(workdir, mesh=one_device)
  expected = outputs(run.f, states[9].ema['slow'])
  np.testing.assert_array_equal(outputs(found.f, found.params), expected)
  assert not np.array_equal(expected, outputs(run.f, states[9].params))
  assert found.step == 9
  assert differences(found.config, run.config) == {}


def test_online_weights_can_be_asked_for(saved, one_device):
  run, workdir, states = saved
  found = pretrained.load(workdir, weights='online', mesh=one_device)
  expected = outputs(run.f, states[9].params)
  np.testing.assert_array_equal(outputs(found.f, found.params), expected)


def test_an_older_checkpoint_can_be_named_and_a_run_can_be_moved(
  saved, one_device, tmp_path
):
  run, workdir, states = saved
  moved = shutil.copytree(workdir, tmp_path / 'elsewhere')
  found = pretrained.load(moved / 'checkpoints' / '4', mesh=one_device)
  expected = outputs(run.f, states[4].ema['slow'])
  np.testing.assert_array_equal(outputs(found.f, found.params), expected)
  assert found.step == 4


def test_weights_lie_on_every_device_unless_a_mesh_is_given(saved, one_device):
  _, workdir, _ = saved
  for mesh, devices in ((None, jax.devices()), (one_device, jax.devices()[:1])):
    found = pretrained.load(workdir, mesh=mesh)
    for leaf in jax.tree.leaves(found.params):
      assert leaf.sharding.device_set == set(devices)
      assert leaf.is_fully_replicated


def test_another_config_builds_another_model_of_the_same_weights(saved, one_device):
  _, workdir, states = saved
  config = small_config()
  config.precond.fn = 'cmjax.precond:consistency'
  config.precond.sigma_min = 0.01
  found = pretrained.load(workdir, config=config, mesh=one_device)
  # At its sigma_min a model is the identity; the run's own lies at 0.
  np.testing.assert_array_equal(outputs(found.f, found.params)[0], noisy_images()[0])
  own = pretrained.load(workdir, mesh=one_device)
  assert not np.array_equal(outputs(own.f, own.params)[0], noisy_images()[0])
  for a, b in zip(
    jax.tree.leaves(found.params), jax.tree.leaves(states[9].ema['slow'])
  ):
    np.testing.assert_array_equal(a, b)


def test_a_config_of_another_network_is_refused(saved, one_device):
  _, workdir, _ = saved
  difference = r'another network: parameter .* is \(32,\) in .* and \(64,\) in'
  with pytest.raises(UserError, match=difference):
    pretrained.load(workdir, config=small_config(width=32), mesh=one_device)


def test_weights_that_are_not_there_are_refused(saved, one_device):
  _, workdir, _ = saved
  with pytest.raises(UserError, match=r"no weights 'fast'; .* online, slow"):
    pretrained.load(workdir, weights='fast', mesh=one_device)


@pytest.mark.parametrize('name', ['nowhere', 'run/checkpoints/7'])
def test_a_folder_without_a_checkpoint_is_named(name, tmp_path):
  place = tmp_path / name
  with pytest.raises(UserError, match='no checkpoints') as error:
    pretrained.load(place)
  assert str(place) in str(error.value)


def test_a_damaged_checkpoint_is_reported_and_an_older_one_opened(
  saved, one_device, tmp_path
):
  run, workdir, states = saved
  copy = shutil.copytree(workdir, tmp_path / 'copy')
  (copy / 'checkpoints' / '9' / 'meta' / 'metadata').write_text('{"config": "')
  lines = []
  found = pretrained.load(copy, mesh=one_device, say=lines.append)
  assert found.step == 4
  assert [line for line in lines if 'checkpoints/9 is damaged' in line] == lines != []
  expected = outputs(run.f, states[4].ema['slow'])
  np.testing.assert_array_equal(outputs(found.f, found.params), expected)


def test_load_weights_gives_those_sampled_from_and_their_config(saved):
  run, workdir, states = saved
  params, config = pretrained.load_weights(workdir, run.abstract_params())
  assert differences(config, run.config) == {}
  assert jax.tree.structure(params) == jax.tree.structure(states[9].params)
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(states[9].ema['slow'])):
    np.testing.assert_array_equal(a, b)


def test_a_learned_weighting_that_is_new_starts_at_zero(saved, one_device):
  _, workdir, states = saved
  like = prepare(small_config(log_weight=True), one_device).abstract_params()
  params, _ = pretrained.load_weights(workdir, like)
  assert jax.tree.structure(params) == jax.tree.structure(like)
  new = params.pop('log_weight')
  assert (new.shape, new.dtype) == (like['log_weight'].shape, jnp.float32)
  assert new.sharding == like['log_weight'].sharding
  assert not np.any(new)
  assert jax.tree.structure(params) == jax.tree.structure(states[9].params)
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(states[9].ema['slow'])):
    np.testing.assert_array_equal(a, b)


def test_a_learned_weighting_excuses_no_other_difference(saved, one_device):
  _, workdir, _ = saved
  config = small_config(width=32, log_weight=True)
  like = prepare(config, one_device).abstract_params()
  with pytest.raises(UserError, match='another network: parameter'):
    pretrained.load_weights(workdir, like)
  # To sample, all weights are needed; only training may add to them.
  with pytest.raises(UserError, match=r'another network: .*log_weight'):
    pretrained.load(workdir, config=small_config(log_weight=True), mesh=one_device)


def test_a_learned_weighting_is_not_dropped_silently(one_device, tmp_path):
  run = prepare(small_config(log_weight=True), one_device)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  state = first_state(run)
  learned = state.params | {'log_weight': jnp.ones(32)}
  checkpoints.save(state._replace(params=learned), run.meta())
  checkpoints.close()
  plain, said = prepare(small_config(), one_device).abstract_params(), []
  params, _ = pretrained.load_weights(tmp_path, plain, said.append)
  assert said == [f'{tmp_path}: weights that are not used: log_weight']
  assert jax.tree.structure(params) == jax.tree.structure(plain)
  found = pretrained.load(tmp_path, weights='online', mesh=one_device)
  np.testing.assert_array_equal(found.params['log_weight'], np.ones(32))


def test_abstract_parameters_are_those_that_a_network_makes(saved):
  run, _, states = saved
  abstract, made = (
    jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), tree)
    for tree in (run.abstract_params(), states[9].params)
  )
  assert abstract == made


@pytest.mark.parametrize('name', ['edm', 'consistency', 'trigflow', 'two_time'])
def test_the_samplers_of_weights_without_a_config_can_be_built(name):
  samplers = ConfigDict(pretrained._sampling(f'cmjax.precond:{name}')['samplers'])
  assert build_each(samplers, 'config.samplers', Sampler)
