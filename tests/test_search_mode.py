"""`--mode=search`: it improves a metric, stores what it found, and others use it."""

import json
import re

import numpy as np
from PIL import Image
import pytest

from cmjax import main
from cmjax.core import Model, Network
from cmjax.metrics.metric import Metric

BEST = 1.7  # where `distance_of_sigma` is least


def distance_of_last_sigma() -> Metric:
  """(ln m - ln BEST)^2 for samples that are all m."""

  def features(params, x, labels):
    return {'x': x}

  def values(samples, data):
    found = np.mean(np.concatenate([batch['x'] for batch in samples]))
    return {
      'distance': float((np.log(found) - np.log(BEST)) ** 2),
      'size': float(found),
      'broken': float('nan'),
    }

  return Metric((), features, values, needs_data=False)


def last_sigma(network: Network, *, sigma_data: float = 0.5) -> Model:
  """A model that returns its noise level, which is so the last of a sampler."""
  del network, sigma_data
  return lambda params, x, sigma, cond, /, *, key=None: 0 * x + sigma[:, None]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run of points, sampled by the model and measured by the metric above."""
  folder = tmp_path_factory.mktemp('search')
  command = [
    '--config=edm:toy2d',
    f'--workdir={folder / "run"}',
    *('--config.total_images=32', '--config.batch_size=8', '--config.network.width=8'),
    *('--config.ema.power.fn=cmjax.schedules:power', '--config.every.snapshot_steps=1'),
    '--config.ema.power.relative_std=0.05',
    *('--config.every.picture_steps=0', '--config.evaluation.num_samples=4'),
  ]
  assert main.main(command) == 0
  return folder / 'run'


def searched(run, *flags):
  few = ['--config.search.num_samples=4', '--trust=tests']
  return main.main(
    [
      *('--mode=search', f'--workdir={run}', *few),
      '--config.precond.fn=tests.test_search_mode:last_sigma',
      '--config.metrics.frechet.fn=tests.test_search_mode:distance_of_last_sigma',
      '--config.samplers.few.fn=cmjax.samplers:multistep',
      '--config.samplers.few.sigmas=(80.0,)',
      *flags,
    ]
  )


def test_search_finds_the_best_noise_level_in_few_evaluations(run, capsys):
  assert searched(run, '--config.search.num_steps=3') == 0
  out = capsys.readouterr().out
  stored = json.loads((run / 'searched' / 'best_2.json').read_text())
  first, second = stored['sampler']['sigmas']
  assert first == 80
  assert second == pytest.approx(BEST, rel=0.02)
  assert stored['searched']['distance'] < 4e-4  # of ln BEST, within 2 %
  curve = stored['searched']['curve']
  assert 4 <= len(curve) <= 15
  assert [row['last_sigma'] for row in curve] == sorted(r['last_sigma'] for r in curve)
  # The third noise level lies below the second.
  third = json.loads((run / 'searched' / 'best_3.json').read_text())['sampler'][
    'sigmas'
  ]
  assert third[:2] == [first, second]
  assert third[2] < second
  assert '--samplers=best_2,best_3' in out
  text = (run / 'searched' / 'best_2.md').read_text()
  assert text.count('\n') == len(curve) + 1
  with Image.open(run / 'searched' / 'best_2.png') as picture:
    assert np.asarray(picture).std() > 0


def test_what_was_found_is_used_by_name_and_not_overwritten(run, capsys):
  if not (run / 'searched').exists():
    assert searched(run) == 0
  before = (run / 'searched' / 'best_2.json').read_bytes()
  assert searched(run, '--config.search.max_evaluations=3') == 0
  assert (run / 'searched' / 'best_2.json').read_bytes() == before
  assert (run / 'searched' / 'best_2_2.json').exists()
  capsys.readouterr()
  command = [f'--workdir={run}', '--mode=evaluate', '--samplers=best_2,heun']
  assert main.main([*command, '--config.evaluation.num_seeds=1']) == 0
  lines = capsys.readouterr().out.splitlines()
  rows = [line.split(' | ')[:2] for line in lines if line.startswith('| ')][2:]
  assert rows == [['| best_2', '2'], ['| heun', '35']]
  command = [f'--workdir={run}', '--mode=sample', '--samplers=best_9']
  assert main.main(command) == 2
  assert "no sampler 'best_9'; known: heun, one_step, best_2" in capsys.readouterr().err


def test_a_result_has_not_the_name_of_a_sampler_of_the_config(run, capsys):
  config = ['--config.samplers.best_2.fn=cmjax.samplers:one_step']
  assert searched(run, *config, '--config.search.sampler=few') == 0
  assert re.search(r'--samplers=best_2_\d+\n', capsys.readouterr().out)


def test_a_search_without_a_finite_value_stores_nothing(run, capsys):
  before = sorted(run.glob('searched/*'))
  few = '--config.search.max_evaluations=3'
  assert searched(run, '--config.search.metric=broken', few) == 2
  assert 'no value of broken is finite' in capsys.readouterr().err
  assert sorted(run.glob('searched/*')) == before


def test_a_search_with_a_guide_says_how_its_result_is_used(run, capsys):
  guided = [f'--config.guide={run}', '--config.search.sampler=guided']
  guided += ['--config.samplers.guided.fn=cmjax.guidance:autoguidance']
  guided += ['--config.samplers.guided.sampler.fn=cmjax.samplers:one_step']
  guided += ['--config.samplers.guided.guidance=2', '--config.search.key=guidance']
  guided += ['--config.search.low=1', '--config.search.high=3']
  assert searched(run, *guided, '--config.search.max_evaluations=3') == 0
  used = f'--samplers=best_guidance --config.guide={run}'
  assert used in capsys.readouterr().out


def test_a_whole_number_in_the_config_is_searched_too(run, tmp_path):
  stored = json.loads((run / 'config.json').read_text())
  stored['samplers'] = dict(flow=dict(fn='cmjax.diffusion_samplers:ode', rho=7))
  (tmp_path / 'config.json').write_text(json.dumps(stored))
  flags = [f'--config={tmp_path / "config.json"}', '--config.search.sampler=flow']
  flags += [
    '--config.search.key=rho',
    '--config.search.low=5',
    '--config.search.high=9',
  ]
  assert searched(run, *flags, '--config.search.max_evaluations=3') == 0
  (path,) = (run / 'searched').glob('best_rho*.json')
  assert 5 < json.loads(path.read_text())['sampler']['rho'] < 9


def test_a_damaged_result_is_one_line(run, capsys):
  (run / 'searched').mkdir(exist_ok=True)
  (run / 'searched' / 'other.json').write_text('{"key": "skip"}')
  (run / 'searched' / 'cut.json').write_text('{"key": ')
  for name in ('other', 'cut'):
    command = [f'--workdir={run}', '--mode=sample', f'--samplers={name}']
    assert main.main(command) == 2
    assert f'{name}.json' in capsys.readouterr().err
  for name in ('other', 'cut'):
    (run / 'searched' / f'{name}.json').unlink()


def test_search_varies_a_number_and_can_maximise(run):
  phased = (
    '--config.samplers.jumps.fn=cmjax.samplers:phased',
    '--config.samplers.jumps.edges=(1.0,)',
    '--config.samplers.jumps.skip=1.0',
  )
  arguments = (*phased, '--config.search.key=skip', '--config.search.low=0.5')
  # Golden section leaves 0.5 * 0.618^9 < 0.01 of the range.
  arguments += ('--config.search.max_evaluations=10',)
  assert searched(run, *arguments, '--config.search.high=1.0') == 0
  stored = json.loads((run / 'searched' / 'best_skip.json').read_text())
  # The last noise level is skip times 1, so that the largest is the closest to BEST.
  assert stored['sampler']['skip'] == pytest.approx(1, abs=0.02)
  arguments += ('--config.search.metric=size', '--config.search.high=0.8')
  assert searched(run, *arguments, '--config.search.maximise=True') == 0
  stored = json.loads((run / 'searched' / 'best_skip_2.json').read_text())
  assert stored['sampler']['skip'] == pytest.approx(0.8, abs=0.02)
  assert stored['searched']['size'] == pytest.approx(0.8, abs=0.02)


def test_search_varies_the_width_of_the_average(run, capsys):
  flags = ('--config.search.key=sample_relative_std', '--config.search.low=0.04')
  flags += ('--config.search.high=0.06', '--config.search.max_evaluations=3')
  # The model here ignores its weights, so that all widths are as good.
  assert searched(run, *flags) == 0
  out = capsys.readouterr().out
  tried = re.findall(r'^\d\. sample_relative_std (\S+): distance', out, re.M)
  assert len(set(tried)) == 3
  assert all(0.04 <= float(width) <= 0.06 for width in tried)
  assert re.search(r'use it as --config\.sample_relative_std=0\.0[456]', out)


BAD = {
  'seed of an evaluation': (['--config.search.seed=2'], r'config\.search\.seed: 2'),
  'a list of samplers': (['--samplers=few'], r'give --config\.search\.sampler=NAME'),
  'unknown sampler': (['--config.search.sampler=many'], "no sampler 'many'"),
  'unknown key': (['--config.search.key=skip'], "no key 'skip'"),
  'unknown metric': (
    ['--config.search.metric=fid'],
    "no 'fid'; known: distance, size, broken",
  ),
  'no range': (
    ['--config.search.sampler=heun', '--config.search.key=rho'],
    'must be the range of rho',
  ),
  'low above the first': (
    ['--config.search.low=80'],
    r'range of sigmas, got 80 and 80',
  ),
  'high above training': (['--config.search.high=99'], r'search: .* sigma = 99, which'),
  'low below zero': (['--config.search.low=-1'], r'search: .* sigma = -1, which'),
  'no sigma between': (['--config.search.low=79.9'], 'range of sigmas, got 79.9 and'),
  'a key of a value': (['--config.search.key=sigmas.x'], "no key 'sigmas.x'"),
  'not a number': (['--config.search.key=fn'], 'fn of few is not a number'),
  'one step': (['--config.search.num_steps=1'], 'num_steps: must be between 2'),
  'two evaluations': (['--config.search.max_evaluations=2'], 'max_evaluations'),
}


@pytest.mark.parametrize('name', BAD)
def test_mistakes_are_one_line(run, capsys, name):
  flags, message = BAD[name]
  assert searched(run, *flags) == 2
  out, err = capsys.readouterr()
  assert err.count('\n') == 1, err
  assert re.search(message, err), err
  if name != 'unknown metric':  # names are known after the first measurement
    assert 'features of the data' not in out
    assert '1. ' not in out
