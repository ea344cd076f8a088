"""Configs against signatures, the top level against its schema, and JSON and back."""

import sys

import pytest

from cmjax import config as configs
from cmjax.core import UserError
from tests.conftest import ROOT

# Functions that a config of these tests names -------------------------------------


def leaf(*, value: float, steps: int = 3, name: str = 'plain', on: bool = False):
  """Returns what it was called with."""
  if value < 0:
    raise ValueError('value must not be negative')
  return dict(value=value, steps=steps, name=name, on=on)


def branch(f, *, child, batch_size: int, sizes=(1, 2)):
  """Takes another part, and two things that the run gives."""
  return dict(f=f, child=child, batch_size=batch_size, sizes=sizes)


def distil(f, teacher, *, weight: float = 1.0):
  """Needs a teacher."""
  return f, teacher, weight


LEAF, BRANCH, DISTIL = (f'{__name__}:{fn}' for fn in ('leaf', 'branch', 'distil'))
GIVEN = dict(f='model', batch_size=8, total_images=80)


def build(given=GIVEN, **spec):
  return configs.build(configs.ConfigDict(spec), 'config.part', **given)


def refusal(call, *args, **kwargs):
  """The one line that a mistake is told by."""
  with pytest.raises(UserError) as error:
    call(*args, **kwargs)
  assert '\n' not in str(error.value)
  return str(error.value)


# build -----------------------------------------------------------------------------


def test_a_part_is_its_function_called_with_its_keywords():
  assert build(fn=LEAF, value=1.5, on=True) == dict(
    value=1.5, steps=3, name='plain', on=True
  )


def test_parts_inside_parts_are_built_first_and_what_the_run_gives_reaches_all():
  child = dict(fn=BRANCH, child=dict(fn=LEAF, value=2.0), sizes=(3, (4, 5)))
  built = build(fn=BRANCH, child=child)
  assert (built['f'], built['batch_size'], built['sizes']) == ('model', 8, (1, 2))
  inner = built['child']
  assert (inner['f'], inner['batch_size'], inner['sizes']) == ('model', 8, (3, (4, 5)))
  assert inner['child']['value'] == 2.0


def test_an_int_will_do_for_a_float():
  assert build(fn=LEAF, value=2)['value'] == 2


BAD_PARTS = {
  'misspelt': (
    dict(fn=LEAF, valeu=1.0),
    f'config.part.valeu: {LEAF} has no such key, did you mean value?',
  ),
  'unlike any': (
    dict(fn=LEAF, zzz=1.0),
    f'config.part.zzz: {LEAF} has no such key; known: value, steps, name, on',
  ),
  'misspelt below': (
    dict(fn=BRANCH, child=dict(fn=LEAF, value=1.0, step=1)),
    f'config.part.child.step: {LEAF} has no such key, did you mean steps?',
  ),
  'missing': (dict(fn=LEAF), f'config.part.value: missing; {LEAF} needs it'),
  'missing below': (
    dict(fn=BRANCH, child=dict(fn=LEAF)),
    f'config.part.child.value: missing; {LEAF} needs it',
  ),
  'text for a number': (
    dict(fn=LEAF, value='1'),
    "config.part.value: must be float, got '1'",
  ),
  'float for an int': (
    dict(fn=LEAF, value=1.0, steps=3.0),
    'config.part.steps: must be int, got 3.0',
  ),
  'bool for an int': (
    dict(fn=LEAF, value=1.0, steps=True),
    'config.part.steps: must be int, got True',
  ),
  'number for text': (
    dict(fn=LEAF, value=1.0, name=3),
    'config.part.name: must be str, got 3',
  ),
  'number for a bool': (
    dict(fn=LEAF, value=1.0, on=1),
    'config.part.on: must be bool, got 1',
  ),
  'refused by the function': (
    dict(fn=LEAF, value=-1.0),
    'config.part: value must not be negative',
  ),
  'set by the run': (
    dict(fn=BRANCH, child=0, batch_size=4),
    'config.part.batch_size: is set by the run, leave it out',
  ),
  'without its teacher': (
    dict(fn=DISTIL),
    f'config.part: {DISTIL} needs a teacher; give --config.teacher=PATH',
  ),
}


@pytest.mark.parametrize('mistake', BAD_PARTS)
def test_a_mistake_in_a_part_names_the_key_and_the_function(mistake):
  spec, told = BAD_PARTS[mistake]
  assert refusal(build, **spec) == told


def test_a_hint_does_not_offer_what_only_the_run_may_set():
  assert refusal(build, fn=BRANCH, child=0, zzz=0).endswith('known: child, sizes')


def test_a_teacher_that_is_given_reaches_the_function():
  assert build(GIVEN | dict(teacher='D'), fn=DISTIL, weight=0.5) == ('model', 'D', 0.5)


@pytest.mark.parametrize(
  'path', ['no_such_module:f', 'cmjax.times:no_such_function', 'cmjax.times', ':f', '']
)
def test_an_import_path_that_leads_nowhere_is_named(path):
  assert refusal(build, fn=path).startswith(f'config.part.fn: cannot import {path!r} (')


def test_build_each_builds_by_name_and_names_the_part_at_fault():
  parts = configs.ConfigDict(dict(a=dict(fn=LEAF, value=1.0), b=dict(fn=LEAF, value=2)))
  built = configs.build_each(parts, 'config.parts')
  assert {name: made['value'] for name, made in built.items()} == dict(a=1.0, b=2)
  parts.b.value = -2
  told = refusal(configs.build_each, parts, 'config.parts')
  assert told == 'config.parts.b: value must not be negative'


# The top level ---------------------------------------------------------------------


@pytest.fixture
def config():
  return configs.load(ROOT / 'configs' / 'edm.py:digits')


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
  return configs.ConfigDict(plain)


def test_a_whole_config_is_returned_as_it_is(config):
  assert configs.checked(config) is config
  float_as_int = changed(config, 'grad_clip_norm', 1)
  assert configs.checked(float_as_int).grad_clip_norm == 1


BAD_VALUES = {
  'batchsize': (8, 'config.batchsize: unknown key, did you mean batch_size?'),
  'every.log_step': (1, 'config.every.log_step: unknown key, did you mean log_steps?'),
  'seed': (..., 'config.seed: missing; configs/parts.py:base() holds every key'),
  'evaluation.pictured': (..., 'config.evaluation.pictured: missing; '),
  'batch_size': (8.0, 'config.batch_size: must be int, got 8.0'),
  'total_images': (True, 'config.total_images: must be int, got True'),
  'init_from': (None, 'config.init_from: must be str, got None'),
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
  assert refusal(configs.checked, changed(config, key, value)).startswith(told)


def test_load_refuses_a_file_that_is_not_there():
  told = refusal(configs.load, 'configs/no_such_config.py')
  assert told.startswith('config: no file configs/no_such_config.py')


def test_a_config_may_import_its_neighbours_and_is_checked(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'path', sys.path.copy())
  (tmp_path / 'a_neighbour.py').write_text('KEY = "batchsize"\n')
  (tmp_path / 'own.py').write_text(
    'import a_neighbour\n'
    'from ml_collections import ConfigDict\n'
    'def get_config():\n'
    '  return ConfigDict({a_neighbour.KEY: 8})\n'
  )
  told = refusal(configs.load, tmp_path / 'own.py')
  assert told == 'config.batchsize: unknown key, did you mean batch_size?'


def test_what_must_be_given_is_named_wherever_it_is(config):
  configs.require(config)
  for key in ('init_from', 'network.dtype'):
    told = refusal(configs.require, changed(config, key, configs.REQUIRED))
    assert told == f'config.{key}: must be given, as in --config.{key}=VALUE'


def test_differences_are_told_by_key(config):
  assert configs.differences(config, config.copy_and_resolve_references()) == {}
  other = changed(config, 'batch_size', 7)
  other = changed(other, 'network.width', ...)
  other.ema.fast = dict(fn=LEAF, value=0.9)
  assert configs.differences(config, other) == {
    'config.batch_size': f'{config.batch_size} -> 7',
    'config.ema.fast.fn': f'absent -> {LEAF}',
    'config.ema.fast.value': 'absent -> 0.9',
    'config.network.width': f'{config.network.width} -> absent',
  }
  other = changed(config, 'network.sizes', [1, 2])
  assert configs.differences(other, changed(config, 'network.sizes', (1, 2))) == {}


@pytest.mark.parametrize('name', ['edm.py:digits', 'ect.py:cifar10', 'ct.py:toy2d'])
def test_json_and_back_is_the_same_config(name):
  config = configs.load(ROOT / 'configs' / name)
  again = configs.from_json(configs.to_json(config))
  assert again == config
  assert configs.differences(config, again) == {}
  assert configs.checked(again) is again


def test_tuples_survive_json():
  config = configs.ConfigDict(dict(a=(1, (2.5, 'x')), b=dict(empty=()), c=None))
  again = configs.from_json(configs.to_json(config))
  assert again.a == (1, (2.5, 'x'))
  assert again.b.empty == ()
  assert again.c is None


def test_schedules_are_found_wherever_they_are():
  config = configs.load(ROOT / 'configs' / 'ct.py:toy2d')
  found = configs.schedules(config, batch_size=512, total_images=512 * 100)
  assert set(found) == {
    'config.ema.slow',
    'config.objective.pairs.bins',
    'config.optimizer.learning_rate',
    'config.target_rate',
  }
  rate, spec = found['config.optimizer.learning_rate'], config.optimizer.learning_rate
  assert spec.fn == 'cmjax.schedules:cosine'
  # Half a cosine stands at half its height half-way, to the rounding of float32.
  assert float(rate(50)) == pytest.approx(spec.peak / 2, rel=1e-6)
