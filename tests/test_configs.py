"""Every config that ships parses, dry-runs and takes one shrunken step."""

import functools

import jax
import numpy as np
import pytest

from cmjax import checkpoint, core, data, sharding, train
from cmjax import config as configs
from cmjax import run as runs
from tests.conftest import ROOT

CONFIGS = sorted(
  p for p in (ROOT / 'configs').glob('*.py') if p.stem not in ('parts', '__init__')
)
SMALLER = {
  'cmjax.networks.mlp:mlp': dict(width=16, blocks=1, embedding=8),
  'cmjax.networks.songunet:songunet': dict(
    channels=8, channel_mult=(1,), blocks=1, attention=(8,)
  ),
}


def shrunken(path):
  """The config with a small network and batch, and no need of a trained teacher."""
  config = configs.load(path)
  config.batch_size = 8
  config.network.update(SMALLER[config.network.fn])
  if config.init_from == configs.REQUIRED:
    config.init_from = ''
  return config


@pytest.fixture
def images(monkeypatch):
  """Stands in for CIFAR-10, which a fresh machine does not have."""
  pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3)).astype(np.uint8)
  source = data.Source('noise', pixels, None, 0, 0.0, 255.0, 127.5, 1 / 127.5, False)

  @functools.wraps(data.tfds)  # with its signature, which configs are checked against
  def tfds(**keywords):
    return source

  monkeypatch.setattr(data, 'tfds', tfds)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config_is_whole_and_says_how_to_reproduce_it(path):
  config = configs.load(path)
  docstring = path.read_text(encoding='utf-8').split('"""')[1]
  for record in ('Command:', 'Hardware:', 'Source:', 'Expected:', 'Measured:'):
    assert record in docstring
  assert f'--config=configs/{path.name}' in docstring
  if config.init_from == configs.REQUIRED:
    with pytest.raises(core.UserError, match=r'config\.init_from: must be given'):
      configs.require(config)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config_takes_one_step(path, images):
  run = runs.prepare(shrunken(path), sharding.data_mesh(jax.devices()[:1]))
  before = train.first_state(run)
  step = jax.jit(
    train.make_train_step(run.loss, run.tx, run.ema_rates, run.target_rate, seed=0)
  )
  # Two steps: a learning rate that warms up from zero moves nothing in the first.
  state, first = step(before, core.Frozen(), train.batch(run, 0))
  state, second = step(state, core.Frozen(), train.batch(run, 1))
  for metrics in (first, second):
    assert np.isfinite(metrics['loss'])
    assert metrics['grad_norm'] > 0
    assert metrics['skipped'] == 0
  assert int(state.step) == 2
  moved = [
    not np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(state.params))
  ]
  assert any(moved)
  ema = train.weights(state, run.config.sample_weights)
  assert jax.tree.structure(ema) == jax.tree.structure(state.params)
  assert run.config.sample_weights != checkpoint.ONLINE


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_every_schedule_of_a_config_is_finite_from_end_to_end(path, images):
  run = runs.prepare(shrunken(path), sharding.data_mesh(jax.devices()[:1]))
  assert 'config.optimizer.learning_rate' in run.schedules
  for name, schedule in run.schedules.items():
    values = np.array([schedule(step) for step in (0, 1, run.total_steps // 2)])
    assert np.all((values >= 0) & np.isfinite(values)), name
