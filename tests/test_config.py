"""Configs against their record and the signatures of their parts; JSON and back."""

import json
import sys

import pytest

from cmjax.configs import parts
from cmjax.core import UserError
from cmjax.runtime.config import load, overridden, read, shipped
from cmjax.runtime.config_json import from_json, to_json
from cmjax.runtime.config_record import (
  REQUIRED,
  Config,
  ConfigDict,
  checked,
  differences,
  keys_of,
  may_change,
  require,
)
from cmjax.runtime.overrides import override
from tests.conftest import ROOT
from tests.test_build import LEAF, refusal

# The top level ---------------------------------------------------------------------


@pytest.fixture
def config():
  return read(ROOT / 'configs' / 'edm.py:digits')


def changed(config, key, value):
  """The config with one key, dotted, set whatever its type."""
  plain = config.to_dict()
  *path, last = key.split('.')
  part = plain
  for step in path:
    part = part[step]
  if value is ...:
    del part[last]
  else:
    part[last] = value
  return ConfigDict(plain)


def test_a_whole_config_is_its_record(config):
  record = checked(config)
  assert checked(record) is record
  assert record.to_dict() == config.to_dict()
  assert (record.batch_size, record.network.width) == (128, 384)
  assert record.evaluation.num_samples == 1797
  float_as_int = changed(config, 'grad_clip_norm', 1)
  assert checked(float_as_int).grad_clip_norm == 1


def test_base_has_the_default_of_every_key_and_of_no_other():
  base = parts.base()
  assert set(base) == set(keys_of(Config))
  for name, key in keys_of(Config).items():
    if key.kind is not ConfigDict and isinstance(base[name], ConfigDict):
      assert set(base[name]) == set(keys_of(key.kind))


def test_a_record_does_not_change_but_has_a_changed_copy(config):
  record = checked(config)
  with pytest.raises(AttributeError):
    record.seed = 3
  other = record.replace(seed=3, ema=dict(fast=dict(fn=LEAF, value=0.5)))
  assert (record.seed, other.seed, other.ema.fast.value) == (0, 3, 0.5)
  assert 'config.seed: must not be negative' in refusal(record.replace, seed=-1)


def test_what_may_change_while_a_run_continues():
  for key in ('every.log_steps', 'samplers.x.fn', 'data.path', 'keep_checkpoints'):
    assert may_change(f'config.{key}'), key
  for key in ('seed', 'data.fn', 'data.paths', 'network.width', 'ema.slow.value'):
    assert not may_change(f'config.{key}'), key


BAD_VALUES = {
  'evaluation.num_samples': (
    1,
    'config.evaluation.num_samples: must be between 2 and ',
  ),
  'total_images': (10**100, 'config.total_images: must not exceed 2**53'),
  'every.checkpoint_steps': (2**40, 'config.every.checkpoint_steps: must be between'),
  'evaluation.seed': (2**32, 'config.evaluation.seed: must be between 0 and 4,294,967'),
  'batchsize': (8, 'config.batchsize: unknown key, did you mean batch_size?'),
  'every.log_step': (1, 'config.every.log_step: unknown key, did you mean log_steps?'),
  'seed': (..., 'config.seed: missing; configs/parts.py:base() holds every key'),
  'evaluation.num_pictured': (..., 'config.evaluation.num_pictured: missing; '),
  'batch_size': (8.0, 'config.batch_size: must be int, got 8.0'),
  'max_skipped_steps': (True, 'config.max_skipped_steps: must be int, got True'),
  'init_from': (None, 'config.init_from: must be str, got None'),
  'accumulate': (float('nan'), 'config.accumulate: must be int, got nan'),
  'grad_clip_norm': ('1', "config.grad_clip_norm: must be float, got '1'"),
  'network': ({}, "config.network: needs fn='package.module:function'"),
  'data': ('digits', "config.data: must be a dict, got 'digits'"),
  'samplers': (3, 'config.samplers: must be a dict, got 3'),
  'keep_checkpoints': (0, 'config.keep_checkpoints: must be positive, got 0'),
  'every.log_steps': (-1, 'config.every.log_steps: must be positive, got -1'),
}


@pytest.mark.parametrize('key', BAD_VALUES)
def test_a_mistake_at_the_top_level_names_the_key(key, config):
  value, told = BAD_VALUES[key]
  assert refusal(checked, changed(config, key, value)).startswith(told)


def test_load_refuses_a_file_that_is_not_there():
  told = refusal(load, 'configs/no_such_config.py')
  assert told.startswith("--config: no file 'configs/no_such_config.py'")


def test_a_config_may_import_its_neighbours_and_is_checked(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'meta_path', sys.meta_path.copy())
  (tmp_path / 'a_neighbour.py').write_text('KEY = "batchsize"\n')
  (tmp_path / 'own.py').write_text(
    'import a_neighbour\n'
    'from ml_collections import ConfigDict\n'
    'def get_config():\n'
    '  return ConfigDict({a_neighbour.KEY: 8})\n'
  )
  told = refusal(load, tmp_path / 'own.py')
  assert told == 'config.batchsize: unknown key, did you mean batch_size?'


def test_required_keys_are_named_at_any_depth(config):
  require(checked(config))
  for key in ('init_from', 'network.dtype'):
    told = refusal(require, checked(changed(config, key, REQUIRED)))
    assert told == f'config.{key}: must be given, as in --config.{key}=VALUE'


def test_differences_are_reported_by_key(config):
  assert differences(config, config.copy_and_resolve_references()) == {}
  other = changed(config, 'batch_size', 7)
  other = changed(other, 'network.width', ...)
  other.ema.fast = dict(fn=LEAF, value=0.9)
  assert differences(config, other) == {
    'config.batch_size': f'{config.batch_size} -> 7',
    'config.ema.fast.fn': f'absent -> {LEAF}',
    'config.ema.fast.value': 'absent -> 0.9',
    'config.network.width': f'{config.network.width} -> absent',
  }
  other = changed(config, 'network.sizes', [1, 2])
  assert differences(other, changed(config, 'network.sizes', (1, 2))) == {}


def test_a_config_may_import_shipped_configs_without_leaving_modules_behind(tmp_path):
  (tmp_path / 'own.py').write_text(
    'from cmjax.configs import edm, parts\n'
    'def get_config(width):\n'
    '  c = edm.get_config("digits")\n'
    '  c.network.width = int(width)\n'
    '  return c\n'
  )
  assert load(f'{tmp_path / "own.py"}:24').network.width == 24
  assert not {'own', 'edm', 'parts', 'config_own'} & set(sys.modules)


def test_a_mistake_in_a_config_file_keeps_its_traceback(tmp_path):
  (tmp_path / 'own.py').write_text('def get_config():\n  raise ValueError("mine")\n')
  with pytest.raises(ValueError, match='mine') as error:
    load(tmp_path / 'own.py')
  assert not isinstance(error.value, UserError)
  (tmp_path / 'none.py').write_text('x = 3\n')
  assert 'has no function get_config' in refusal(load, tmp_path / 'none.py')


def test_configs_that_ship_load_by_name_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert load('ect:digits') == load(ROOT / 'configs' / 'ect.py:digits')
  assert refusal(load, 'etc:digits').startswith(
    "--config: no config 'etc', did you mean ect?"
  )
  known = shipped()
  files = {p.stem for p in (ROOT / 'configs').glob('[a-z]*.py')}
  assert set(known) == files - {'parts', 'papers'}
  assert known['ict'] == 'Improved consistency training: from data alone.'


def test_the_config_of_a_run_is_loaded_as_data(tmp_path, config):
  path = tmp_path / 'config.json'
  path.write_text(to_json(config))
  assert load(path) == checked(config)
  del (older := json.loads(path.read_text()))['mesh']
  path.write_text(json.dumps(older))
  assert load(path) == checked(config)  # with the default of a newer key


@pytest.mark.parametrize(
  'text',
  ['[]', '3', 'null', '{}', '', '{', '"x"', '[' * 100_000, '{"a":' * 100_000, '\0'],
)
def test_json_that_is_no_config_is_one_line(text):
  told = refusal(from_json, text, 'RUN/config.json')
  assert told.startswith('RUN/config.json: holds no config (')
  assert len(told) < 300


OVERRIDES = {
  'seed=7': 7,
  'grad_clip_norm=1': 1.0,
  'init_from=runs/x': 'runs/x',
  'network.width=24': 24,
  'network.dropout=0.5': 0.5,
  'network.log_weight=true': True,
  'network.dtype=bfloat16': 'bfloat16',
  'mesh.fsdp=True': True,
  'optimizer.learning_rate.peak=3e-4': 3e-4,
  'optimizer.eps_root=1e-3': 1e-3,  # a keyword of the function that the config has not
  'samplers.heun.num_steps=5': 5,
  'objective.label_dropout=0.25': 0.25,
  'target_decay.fn=cmjax.schedules:constant': 'cmjax.schedules:constant',
  'samplers.mine.fn=cmjax.samplers:one_step': 'cmjax.samplers:one_step',
}


@pytest.mark.parametrize('flag', OVERRIDES)
def test_a_value_is_set_from_text(flag, config):
  key, _, text = flag.partition('=')
  override(config, key, text)
  value = config
  for name in key.split('.'):
    value = value[name]
  assert value == OVERRIDES[flag]
  assert type(value) is type(OVERRIDES[flag])
  checked(config)


def test_a_part_of_a_parameter_is_set_from_text(config):
  inner = 'samplers.mine.sampler.fn'
  told = '--config.samplers.mine.sampler: unknown key'
  assert refusal(override, config, inner, 'cmjax.samplers:one_step').startswith(told)
  override(config, 'samplers.mine.fn', 'cmjax.guidance:classifier_free')
  override(config, inner, 'cmjax.samplers:one_step')
  assert config.samplers.mine.sampler.fn == 'cmjax.samplers:one_step'
  told = refusal(override, config, 'samplers.mine.sampled.fn', 'x:y')
  assert told.startswith('--config.samplers.mine.sampled: unknown key, did you mean')


def test_a_tuple_is_set_from_text_with_brackets_or_without():
  config = read('ect:digits')
  for text in ('(80.0, 0.5)', '[80.0, 0.5]', '80.0,0.5'):
    override(config, 'samplers.two_steps.sigmas', text)
    assert config.samplers.two_steps.sigmas == (80.0, 0.5)
  override(config, 'samplers.two_steps.sigmas', '80.0')
  assert config.samplers.two_steps.sigmas == (80.0,)


BAD_OVERRIDES = {
  'optimizer.lr=5': (
    '--config.optimizer.lr: optax:adam has no such key, did you mean learning_rate?'
  ),
  'total_image=5': '--config.total_image: unknown key, did you mean total_images?',
  'netwrok.width=5': '--config.netwrok: unknown key, did you mean network?',
  'network.widht=5': (
    '--config.network.widht: cmjax.networks.mlp:mlp has no such key, did you mean '
    'width?'
  ),
  'every.log_step=5': '--config.every.log_step: unknown key, did you mean log_steps?',
  'seed=many': "--config.seed=many: must be int, got 'many'",
  'batch_size=1e3': "--config.batch_size=1e3: must be int, got '1e3'",
  'network.log_weight=2': "--config.network.log_weight=2: must be bool, got '2'",
  'network=5': '--config.network: has keys of its own; set one of ',
  'seed.x=5': '--config.seed.x: config.seed is a value and has no keys',
  'seed=': "--config.seed=: must be int, got ''",
  f'seed={"9" * 100_000}': '--config.seed=9999',
  '=5': '--config.: unknown key',
  '..=5': '--config.: unknown key',
}


@pytest.mark.parametrize('flag', BAD_OVERRIDES)
def test_a_mistake_in_a_flag_names_the_key_and_its_neighbour(flag, config):
  before = to_json(config)
  key, _, text = flag.partition('=')
  told = refusal(override, config, key, text)
  assert told.startswith(BAD_OVERRIDES[flag])
  assert len(told) < 700
  assert to_json(config) == before


def test_a_student_follows_a_teacher_that_is_given():
  config = load('cd:digits', teacher='runs/edm')
  assert (config.teacher, config.init_from) == ('runs/edm', 'runs/edm')
  both = load('cd:digits', teacher='runs/edm', init_from='runs/other')
  assert both.init_from == 'runs/other'


def test_values_by_key_are_those_of_flags():
  by_key = load(
    'ect:digits',
    batch_size=64,
    network=dict(width=96, dropout=0.1),
    **{'every.log_steps': 7},
    samplers=dict(three=dict(fn='cmjax.samplers:multistep', sigmas=(80.0, 2.0, 0.5))),
    objective=dict(distance=dict(fn='cmjax.distances:squared_l2')),
  )
  flags = {
    'objective.distance.fn': 'cmjax.distances:squared_l2',
    'samplers.three.fn': 'cmjax.samplers:multistep',
    'batch_size': '64',
    'network.width': '96',
    'network.dropout': '0.1',
    'every.log_steps': '7',
    'samplers.three.sigmas': '80.0,2.0,0.5',
  }
  by_flag = overridden(read('ect:digits'), flags.items())
  changed = differences(by_flag, by_key)
  # A part that is given as a dict is replaced; a flag keeps the keys of the old one.
  assert set(changed) <= {'config.objective.distance.c'}
  assert set(by_key.samplers) == {'three', *load('ect:digits').samplers}


@pytest.mark.parametrize(
  ('values', 'text'),
  [
    (dict(batchsize=64), 'config.batchsize: unknown key, did you mean batch_size?'),
    (dict(network=dict(widht=8)), 'config.network.widht: .* did you mean width?'),
    (dict(batch_size='many'), 'config.batch_size: must be int'),
    (dict(batch_size=dict(a=1)), 'config.batch_size.a: .*batch_size is a value'),
    (dict(network=3), 'config.network'),
    (dict(nets=dict(fn='cmjax.networks.mlp:mlp')), 'config.nets: unknown key'),
  ],
)
def test_a_wrong_value_by_key_is_one_line(values, text):
  with pytest.raises(UserError, match=text) as caught:
    load('ect:digits', **values)
  assert '\n' not in str(caught.value)
  assert '--' not in str(caught.value)


@pytest.mark.parametrize('name', ['edm.py:digits', 'ect.py:cifar10', 'ct.py:toy2d'])
def test_json_and_back_is_the_same_config(name):
  config = load(ROOT / 'configs' / name)
  again = from_json(to_json(config))
  assert checked(again) == config
  assert differences(config, again) == {}
  assert to_json(checked(again)) == to_json(again) == to_json(config)


def test_tuples_survive_json():
  config = ConfigDict(dict(a=(1, (2.5, 'x')), b=dict(empty=()), c=None))
  again = from_json(to_json(config))
  assert again.a == (1, (2.5, 'x'))
  assert again.b.empty == ()
  assert again.c is None
