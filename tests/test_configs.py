"""Every config that ships parses, is refused nothing, and takes a shrunken step."""

import functools
import importlib

import jax
import numpy as np
import pytest

from cmjax import core, train
from cmjax.data import tfds
from cmjax.data.source import Source
from cmjax.runtime import batches, build, checkpoint, pretrained, sharding
from cmjax.runtime.config import read
from cmjax.runtime.config_record import REQUIRED, checked, require
from cmjax.runtime.run import prepare
from cmjax.train_step import make_train_step
from tests.conftest import ROOT

FILES = sorted(
  p for p in (ROOT / 'configs').glob('*.py') if p.stem not in ('parts', '__init__')
)
DATA = ('toy2d', 'digits', 'cifar10')
CONFIGS = [f'{path.stem}.py:{name}' for path in FILES for name in DATA]
CONFIGS += ['ect.py:cifar10_1h', 'stable_ct.py:cifar10_phased']
CONFIGS += ['ect.py:imagenet64', 'ect.py:imagenet64_xl']
SMALLER = {
  'cmjax.networks.mlp:mlp': dict(width=16, num_blocks=1, embedding=8),
  'cmjax.networks.songunet:songunet': dict(
    channels=8, channel_mult=(1,), num_blocks=1, attention_resolutions=(8,)
  ),
  'cmjax.networks.edm2:edm2': dict(
    channels=8, channel_mult=(1,), num_blocks=1, attention_resolutions=()
  ),
}


def load(name):
  return read(ROOT / 'configs' / name)


def shrunken(name):
  """The config with a small network and batch, and no trained weights to start from."""
  config = load(name)
  config.batch_size = 8
  config.network.update(SMALLER[config.network.fn])
  if config.teacher:
    config.teacher = 'a teacher'
  config.init_from = ''
  return config


@pytest.fixture
def stand_ins(monkeypatch):
  """For CIFAR-10, which a fresh machine does not have, and for trained teachers."""
  pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3)).astype(np.uint8)
  source = Source('noise', pixels, None, 0, 0.0, 255.0, 127.5, 1 / 127.5, False)

  @functools.wraps(tfds.tfds)  # with its signature, which configs are checked against
  def stand_in(**keywords):
    return source

  def teacher_of(config):
    def load(path, *, trust, mesh, say):
      network, f = build.build_model(config)
      data = build.build(config.data, 'config.data')
      inputs = pretrained.example_inputs(data.shape, data.classes, network.num_times)
      zeros = jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype), inputs)
      params = network.init(jax.random.key(1), *zeros)
      return pretrained.Pretrained(f, params, config, 0, data.shape, data.classes)

    monkeypatch.setattr(pretrained, 'load', load)

  monkeypatch.setattr(tfds, 'tfds', stand_in)
  return teacher_of


def prepared(name, stand_ins):
  config = shrunken(name)
  stand_ins(config)
  return prepare(config, sharding.data_mesh(jax.devices()[:1]))


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_config_says_how_to_reproduce_it(path):
  docstring = path.read_text(encoding='utf-8').split('"""')[1]
  for record in ('Command:', 'Hardware:', 'Source:', 'Expected:', 'Measured:'):
    assert record in docstring
  assert f'--config={path.stem}:' in docstring
  needed = load(f'{path.name}:digits')
  for flag in ('init_from', 'teacher'):
    given = f'--config.{flag}=' in docstring
    followed = needed.teacher and flag == 'init_from'  # one flag gives both
    assert given == (needed[flag] == REQUIRED and not followed)


@pytest.mark.parametrize('name', CONFIGS)
def test_config_is_whole(name):
  config = load(name)
  missing = [key for key in ('init_from', 'teacher') if config[key] == REQUIRED]
  if missing:
    with pytest.raises(core.UserError, match=r'config\.\w+: must be given'):
      require(checked(config))
    config.teacher, config.init_from = 'there', 'there'
  require(checked(config))


def test_a_teacher_is_also_where_its_student_starts():
  config = load('cd.py:digits')
  config.teacher = 'runs/edm'
  assert config.init_from == 'runs/edm'


def test_data_without_a_config_is_refused_by_name():
  with pytest.raises(core.UserError, match=r"ict\.py:imagenet: no data 'imagenet'"):
    load('ict.py:imagenet')


@pytest.mark.parametrize('name', CONFIGS)
def test_config_can_be_trained(name, stand_ins):
  run = prepared(name, stand_ins)
  assert run.config.sample_weights != checkpoint.ONLINE
  assert any(name.endswith('.learning_rate') for name in run.schedules)
  for schedule_name, schedule in run.schedules.items():
    values = np.array([schedule(step) for step in (0, 1, run.total_steps // 2)])
    assert np.all((values >= 0) & np.isfinite(values)), schedule_name


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_config_takes_two_steps(path, stand_ins):
  run = prepared(f'{path.name}:digits', stand_ins)
  before = train.first_state(run)
  step = jax.jit(
    make_train_step(run.loss, run.tx, run.ema_decays, run.target_decay, seed=0)
  )
  # Two steps: a learning rate that warms up from zero moves nothing in the first.
  state, first = step(before, run.frozen, batches.batch(run, 0))
  state, second = step(state, run.frozen, batches.batch(run, 1))
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


def test_every_objective_has_a_config():
  named = {load(f'{path.name}:digits').objective.fn for path in FILES}
  written = set()
  for path in (ROOT / 'cmjax' / 'objectives').glob('[a-z]*.py'):
    module = importlib.import_module(f'cmjax.objectives.{path.stem}')
    for name, value in vars(module).items():
      builds = getattr(value, '__annotations__', {}).get('return') is core.Loss
      if builds and not name.startswith('_'):
        written.add(f'cmjax.objectives.{path.stem}:{name}')
  assert named == written
