"""Configs of version 0.2, under its names, are today's."""

import json
import shutil

import pytest

from cmjax import main
from cmjax.core import Loss, Network, UserError
from cmjax.runtime import config_json
from cmjax.runtime.build import build
from cmjax.runtime.config import load, overridden, read
from cmjax.runtime.config_json import from_json, to_json
from cmjax.runtime.config_record import checked, completed, differences
from cmjax.runtime.functions import Foreign
from cmjax.runtime.renamed import FUNCTIONS, function_now, renamed
from cmjax.runtime.workdir import check_claim, config_for, write_config
from tests.conftest import ROOT
from tests.test_build import refusal

# As version 0.2 wrote them to `config.json`, each with what differs from the first.
OLD = json.loads((ROOT / 'tests' / 'old_configs.json').read_text(encoding='utf-8'))
FIRST = OLD['ect:digits']
NEW_STUDIES = ('likelihood',)
# The keys of configs that were changed since: EDM's augmentation, and a FID as metric.
CHANGED = {
  'edm:cifar10': ('data.flip', 'network.augment', 'objective.augmentation'),
  'ect:imagenet64_xl': ('evaluation.num_samples', 'metrics'),
}


@pytest.fixture(autouse=True)
def fresh():
  """Each test sees the reports of its own."""
  config_json.report_renamed.cache_clear()


def old_text(name, **changes):
  return json.dumps(FIRST | OLD[name] | changes)


@pytest.mark.parametrize('name', OLD)
def test_a_config_of_before_is_the_config_of_today(name):
  old, new = completed(from_json(old_text(name))), load(name)
  with old.unlocked():
    old.studies.update({k: new.studies[k] for k in NEW_STUDIES if k in new.studies})
  changed = tuple(f'config.{key}' for key in CHANGED.get(name, ()))
  assert [key for key in differences(old, new) if not key.startswith(changed)] == []
  if not changed:
    assert to_json(checked(old)) == to_json(new)


def test_every_objective_is_among_them():
  names = {path.stem for path in (ROOT / 'configs').glob('[a-z]*.py')}
  names -= {'parts', 'papers'}
  assert {name.partition(':')[0] for name in OLD} == names


@pytest.mark.parametrize('name', ['ct:digits', 'edm:cifar10'])
def test_a_config_of_today_is_not_translated(name):
  config = load(name).to_dict()
  assert renamed(config) == (config, [])


def test_functions_of_today_exist_and_keep_their_names():
  for path in FUNCTIONS.values():
    assert function_now(path) == path


def test_each_translated_name_is_reported_in_one_line_once(capsys):
  text = old_text('shortcut:digits')
  from_json(text, 'RUN/config.json')
  lines = capsys.readouterr().out.splitlines()
  assert 'RUN/config.json: objective.flow_share is now flow_fraction' in lines
  assert 'RUN/config.json: target_rate is now target_decay' in lines
  assert 'RUN/config.json: evaluation.samples is now num_samples' in lines
  fn = 'cmjax.objectives.meanflow:shortcut is now cmjax.objectives.flow_map:shortcut'
  assert f'RUN/config.json: objective.fn: {fn}' in lines
  assert len(lines) == len(set(lines))
  assert all(line.startswith('RUN/config.json: ') for line in lines)
  from_json(text, 'RUN/config.json')
  assert capsys.readouterr().out == ''


# Code and flags of the user's -------------------------------------------------------


OWN = """
from cmjax.configs import edm, parts

def get_config():
  c = parts.distilled(edm.get_config('digits'))
  c.network = dict(fn='cmjax.networks.mlp:mlp', width=24, blocks=2, clocks=1)
  c.metrics = dict(frechet=dict(fn='cmjax.evaluate:pixel_frechet'))
  return c
"""


def test_a_config_file_with_names_of_before_works(tmp_path, capsys):
  path = tmp_path / 'mine.py'
  path.write_text(OWN)
  config = load(path, teacher='runs/edm')
  assert (config.network.num_blocks, config.network.num_times) == (2, 1)
  assert config.metrics.frechet.fn == 'cmjax.metrics.pixels:pixel_frechet'
  assert config.init_from == 'runs/edm'  # follows the teacher, as ever
  out = capsys.readouterr().out
  assert out.count('network.blocks is now num_blocks') == 1


def test_flags_with_names_of_before_work(capsys):
  flags = {
    'network.clocks': '2',
    'evaluation.samples': '50',
    'samplers.heun.steps': '9',
    'target_rate.fn': 'cmjax.schedules:constant',
    'objective.weighting.fn': 'cmjax.distances:uniform',
  }
  config = overridden(read('edm:digits'), list(flags.items())[:4])
  assert config.network.num_times == 2
  assert config.evaluation.num_samples == 50
  assert config.samplers.heun.num_steps == 9
  assert config.target_decay.fn == 'cmjax.schedules:constant'
  config = overridden(read('ect:digits'), list(flags.items())[4:])
  assert config.objective.weighting.fn == 'cmjax.weightings:uniform'
  lines = capsys.readouterr().out.splitlines()
  assert '--config.network.clocks is now --config.network.num_times' in lines
  assert '--config.target_rate is now --config.target_decay' in lines
  assert len(lines) == 5


def test_a_flag_with_a_name_of_before_is_reported_by_the_command(capsys):
  argv = ['--config=edm:digits', '--mode=dry_run', '--config.network.blocks=1']
  assert main.main(argv) == 0
  out = capsys.readouterr().out
  assert out.startswith('--config.network.blocks is now --config.network.num_blocks\n')


def test_an_old_and_a_new_name_at_once_are_refused():
  network = FIRST['network'] | dict(num_blocks=3)
  config = checked(completed(from_json(old_text('ect:digits', network=network))))
  with pytest.raises(UserError, match=r'network\.blocks: .*mlp has no such key'):
    build(config.network, 'config.network', Network)
  both = old_text('ect:digits', target_decay={})
  both = completed(from_json(both))
  assert 'config.target_rate: unknown key' in refusal(checked, both)


# Strangers and runs -----------------------------------------------------------------


@pytest.mark.parametrize(
  'path',
  [
    *('cmjax.evaluate:np', 'cmjax.evaluate:json', 'cmjax.objectives.discrete:_along'),
    *('cmjax.data:tfds', 'cmjax.sharding:mesh', 'cmjax.studies:tangents'),
    *('cmjax.evaluate.os:system', 'cmjax.data:digits:x', 'evaluate:eval', 'os:system'),
  ],
)
def test_a_translated_name_of_an_untrusted_config_stays_untrusted(path):
  config = from_json(old_text('ect:digits', objective=dict(fn=path)))
  assert isinstance(config.objective.fn, Foreign)
  assert config.objective.fn.trusted == ()
  told = refusal(build, config.objective, 'config.objective', Loss, f=None)
  assert told.startswith('config.objective.fn: ')


def test_a_run_of_before_continues(tmp_path, capsys):
  workdir = tmp_path / 'run'
  argv = ['--config=edm:digits', f'--workdir={workdir}', '--config.total_images=1024']
  argv += ['--config.network.width=16', '--config.every.picture_steps=0']
  assert main.main(argv) == 0
  config = json.loads((workdir / 'config.json').read_text())
  old = FIRST | OLD['edm:digits'] | dict(every=config['every'], total_images=1024)
  old['network'] = FIRST['network'] | dict(width=16)
  (workdir / 'config.json').write_text(json.dumps(old))
  capsys.readouterr()
  assert main.main([f'--workdir={workdir}']) == 0
  assert main.main(argv) == 0
  assert f'done: {workdir}' in capsys.readouterr().out
  assert main.main([*argv, '--config.network.clocks=2']) == 2
  assert 'config.network.num_times: 1 -> 2' in capsys.readouterr().err


def test_a_folder_is_claimed_by_a_config_of_before(tmp_path):
  (tmp_path / 'config.json').write_text(old_text('meanflow:digits'))
  config = load('meanflow:digits')
  check_claim(tmp_path, config)
  assert config_for('', tmp_path) == config
  told = refusal(check_claim, tmp_path, config.replace(seed=1))
  assert 'config.seed: 0 -> 1' in told
  shutil.rmtree(tmp_path)
  tmp_path.mkdir()
  write_config(tmp_path, config)
  check_claim(tmp_path, config)


def test_a_config_without_newer_keys_is_completed():
  old = json.loads(old_text('ect:digits'))
  del old['mesh'], old['evaluation']['pictured']
  config = checked(completed(from_json(json.dumps(old))))
  assert config.mesh.num_slices == 1
  assert config.evaluation.num_pictured == 100
