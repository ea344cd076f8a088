"""Every config that ships parses, is refused nothing, and takes a shrunken step."""

import functools
import importlib
import os

import jax
import numpy as np
import pytest

from cmjax import core, train
from cmjax.configs import papers
from cmjax.data import files, tfds
from cmjax.data.source import Source
from cmjax.networks import lpips
from cmjax.port import vision
from cmjax.runtime import build, checkpoint, pretrained, sharding
from cmjax.runtime import run as runtime_run
from cmjax.runtime.batches import batch
from cmjax.runtime.blank import blanked
from cmjax.runtime.config import read
from cmjax.runtime.config_record import REQUIRED, checked, data_of, flat, require
from cmjax.runtime.run import prepare
from cmjax.train_step import make_train_step
from tests.conftest import ROOT

SHARED = ('parts', 'papers', '__init__')
FILES = sorted(p for p in (ROOT / 'configs').glob('*.py') if p.stem not in SHARED)
CONFIGS = [f'{path.stem}.py:{name}' for path in FILES for name in data_of(path.stem)]
RECIPES = [name.replace(':', '.py:') for name in papers.RECIPES]
# Every objective takes steps on digits, and every kind of U-Net in one recipe; all
# recipes do with CMJAX_THOROUGH=1.
STEPPING = [
  *('cd.py:imagenet64_lpips', 'ict.py:cifar10', 'edm.py:imagenet64_s'),
]
THOROUGH = bool(os.environ.get('CMJAX_THOROUGH'))
if THOROUGH:
  STEPPING = RECIPES
SMALLER = {
  'cmjax.networks.mlp:mlp': dict(width=16, num_blocks=1, embedding=8),
  'cmjax.networks.songunet:songunet': dict(
    channels=8, channel_mult=(1,), num_blocks=1, attention_resolutions=(8,)
  ),
  'cmjax.networks.adm:adm': dict(
    channels=8,
    channel_mult=(1,),
    num_blocks=1,
    attention_resolutions=(8,),
    head_channels=8,
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
  config.total_images = config.total_images // config.batch_size * 8  # as many steps
  config.batch_size = 8
  config.network.update(SMALLER[config.network.fn])
  if 'remat' in config.network and name not in STEPPING:
    config.network.remat = False  # quicker to trace
  if config.teacher:
    config.teacher = 'a teacher'
  config.init_from = ''
  if config.perceptual:
    config.perceptual.vgg = config.perceptual.heads = 'weights'
    config.objective.distance.resize = 16
  if config.data.get('path') == REQUIRED:
    config.data.path = 'images'
  return config


@functools.cache  # 15 M numbers, in eight configs
def _random_lpips():
  return core.Perceptual(jax.jit(lpips.init)(jax.random.key(2)))


@pytest.fixture
def stand_ins(monkeypatch):
  """For data that a fresh machine does not have, and for trained networks."""
  pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3)).astype(np.uint8)
  rest = 0.0, 255.0, 127.5, 1 / 127.5, False

  def noise(original):
    @functools.wraps(original)  # with its signature, which configs are checked against
    def stand_in(*, conditional=False, **keywords):
      labels = np.arange(64) % 10 if conditional else None
      return Source('noise', pixels, labels, 10 if conditional else 0, *rest)

    return stand_in

  @functools.wraps(vision.load_lpips)
  def random_lpips(**keywords):
    return _random_lpips()

  def teacher_of(config):
    def load(path, *, trust, mesh, say):
      network, f = build.build_model(config)
      data = build.build(config.data, 'config.data')
      inputs = pretrained.example_inputs(data.shape, data.classes, network.num_times)
      shapes = jax.eval_shape(network.init, jax.random.key(1), *inputs)
      params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
      return pretrained.Pretrained(f, params, config, 0, data.shape, data.classes)

    monkeypatch.setattr(pretrained, 'load', load)

  for module, name in ((tfds, 'tfds'), (files, 'from_path')):
    monkeypatch.setattr(module, name, noise(getattr(module, name)))
  monkeypatch.setattr(vision, 'load_lpips', random_lpips)
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
  config.data.update({'path': 'there'} if 'path' in config.data else {})
  if config.perceptual:
    config.perceptual.update(vgg='there', heads='there')
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


@pytest.mark.parametrize(
  'name',
  [
    *('ict.py:imagenet', 'ect.py:cifar10_2h', 'edm.py:imagenet64_xxl'),
    *('edm.py:digits_ncsnpp', 'pd.py:ffhq64', 'stable_ct.py:imagenet64_xl'),
  ],
)
def test_data_that_a_config_does_not_list_is_refused_by_name(name):
  file, _, data = name.partition(':')
  with pytest.raises(core.UserError, match=rf"{file}:{data}: no data '{data}'; known"):
    load(name)


@pytest.mark.parametrize('name', RECIPES)
def test_recipes_of_large_images_are_measured_one_batch_at_a_time(name):
  """Moments of pixels, or all data in memory, would not fit."""
  config, (size, _) = load(name), papers.images_of(name.partition(':')[2])
  assert (size > 32) == ('frechet' not in config.metrics)


def test_a_recipe_is_prepared_without_its_files():
  """`--blank`, of --mode=compile and dry_run: shapes instead of a teacher."""
  config = load('cd.py:imagenet64_lpips')
  config.network.update(SMALLER[config.network.fn])
  config.objective.distance.resize = 16
  config.batch_size, config.total_images = 8, 80
  blank = blanked(checked(config), '16,3,10')
  run = prepare(blank, sharding.data_mesh(jax.devices()[:1]), blank=True)
  shapes = jax.eval_shape(lpips.init, jax.random.key(0))
  assert jax.tree.map(lambda a: a.shape, run.frozen.perceptual) == jax.tree.map(
    lambda a: a.shape, shapes
  )
  assert jax.tree.structure(run.frozen.teacher) == jax.tree.structure(
    run.abstract_params()
  )
  assert run.source.shape == (16, 16, 3)
  with pytest.raises(core.UserError, match=r'config\.teacher: must be given'):
    prepare(blank, sharding.data_mesh(jax.devices()[:1]))


_TRACED = set()  # what the traced configs of each file name
_DECIDE = ('network', 'precond', 'objective', 'target_decay', 'reference', 'samplers')


def named(name, config):
  """The functions and other texts that decide which program is traced, by file."""
  values = flat(checked(config)).items()
  return {
    (name.partition(':')[0], key, value)
    for key, value in values
    if key.split('.')[1] in _DECIDE and isinstance(value, str)
  }


@pytest.mark.parametrize('name', CONFIGS)
def test_config_can_be_trained(name, stand_ins, monkeypatch):
  parts_of_it = named(name, shrunken(name))
  if parts_of_it <= _TRACED and not THOROUGH:  # then it is built and checked alone
    monkeypatch.setattr(runtime_run, '_try_abstractly', lambda run: None)
  _TRACED.update(parts_of_it)
  run = prepared(name, stand_ins)
  assert run.config.sample_weights != checkpoint.ONLINE
  assert any(name.endswith('.learning_rate') for name in run.schedules)
  for schedule_name, schedule in run.schedules.items():
    values = np.array([schedule(step) for step in (0, 1, run.total_steps // 2)])
    assert np.all((values >= 0) & np.isfinite(values)), schedule_name


TAKING = [f'{path.name}:digits' for path in FILES] + STEPPING


@pytest.mark.parametrize('name', TAKING)
def test_config_takes_two_steps(name, stand_ins, monkeypatch):
  monkeypatch.setattr(runtime_run, '_try_abstractly', lambda run: None)  # steps trace
  run = prepared(name, stand_ins)
  before = train.first_state(run)
  step = jax.jit(
    make_train_step(run.loss, run.tx, run.ema_decays, run.target_decay, seed=0)
  )
  # Two steps: a learning rate that warms up from zero moves nothing in the first.
  state, first = step(before, run.frozen, batch(run, 0))
  state, second = step(state, run.frozen, batch(run, 1))
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
