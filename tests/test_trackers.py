"""What trackers write can be read back, and one that fails ends no run."""

import contextlib
from importlib import util
import io
import json
import math
import os
import re
import struct
import sys
import time

import numpy as np
from PIL import Image
import pytest
from tensorboard.backend.event_processing import event_accumulator

from cmjax import main, train
from cmjax.core import UserError
from cmjax.runtime import trackers, tracking
from cmjax.runtime.config_json import from_json, to_json
from cmjax.runtime.config_record import ConfigDict, checked
from cmjax.runtime.run import prepare
from cmjax.runtime.workdir import check_claim, config_for, write_config
from tests.conftest import ROOT
from tests.test_main import SMALL
from tests.test_train import small

OWN = 'cmjax.runtime.trackers'
IMAGE = np.random.default_rng(0).integers(0, 200, (6, 9, 3), np.uint8)
NESTED = {'seed': 0, 'data': {'path': 'photos', 'sizes': (8, 16)}, 'w=1': math.nan}
needs = {
  package: pytest.mark.skipif(
    util.find_spec(package) is None, reason=f'{package} is not installed'
  )
  for package in ('wandb', 'mlflow')
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  """An empty home, without logins or a network for W&B; must stay empty."""
  home = tmp_path / 'home'
  home.mkdir()
  for name in [name for name in os.environ if name.startswith(('WANDB_', 'MLFLOW_'))]:
    monkeypatch.delenv(name)
  monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')  # for the client of the tests
  monkeypatch.setenv('HOME', str(home))
  monkeypatch.setenv('NETRC', str(home / '.netrc'))
  monkeypatch.setenv('WANDB_BASE_URL', 'http://localhost:9')
  monkeypatch.setattr('sys.stdin', None)  # nobody is asked for anything
  yield home
  assert list(home.iterdir()) == []


def logged(tracker):
  """Steps 10, 20 and again 20, as after a crash, and a picture of step 20."""
  tracker.log(10, {'loss': 1.0, 'w=2/frechet': 0.25})
  tracker.log(20, {'loss': math.nan})
  tracker.log(20, {'loss': 0.5})
  tracker.log(20, {'heun': IMAGE})
  tracker.close()


# TensorBoard -------------------------------------------------------------------------


def events(workdir):
  found = event_accumulator.EventAccumulator(str(workdir / 'tensorboard'))
  return found.Reload()


def test_tensorboard_reads_scalars_and_pictures(tmp_path):
  logged(trackers.tensorboard(workdir=tmp_path))
  found = events(tmp_path)
  assert set(found.Tags()['scalars']) == {'loss', 'w_2/frechet'}
  (event,) = found.Scalars('w_2/frechet')
  assert (event.step, event.value) == (10, 0.25)
  (event,) = found.Images('heun')
  assert (event.step, event.height, event.width) == (20, 6, 9)
  (tmp_path / 'event.png').write_bytes(event.encoded_image_string)
  with Image.open(tmp_path / 'event.png') as picture:
    np.testing.assert_array_equal(np.asarray(picture), IMAGE)


def test_events_of_the_same_second_are_all_kept(tmp_path):
  for step in (1, 2):
    tracker = trackers.tensorboard(workdir=tmp_path)
    tracker.log(step, {'loss': float(step)})
    tracker.close()
  assert [(e.step, e.value) for e in events(tmp_path).Scalars('loss')] == [
    (1, 1.0),
    (2, 2.0),
  ]


# MLflow ------------------------------------------------------------------------------


def mlflow_runs(folder, experiment='cmjax'):
  """The client of a file store, and its runs."""
  from mlflow import tracking as of_mlflow

  client = of_mlflow.MlflowClient(tracking_uri=folder.resolve().as_uri())
  found = client.get_experiment_by_name(experiment)
  return client, client.search_runs([found.experiment_id])


@needs['mlflow']
def test_mlflow_s_client_reads_its_file_store(tmp_path):
  folder = tmp_path / 'a run'  # with a space, as its path becomes an address
  folder.mkdir()
  logged(trackers.mlflow(workdir=folder, config=NESTED))
  client, (run,) = mlflow_runs(folder / 'mlruns')
  assert (run.info.run_name, run.info.status) == ('a run', 'FINISHED')
  assert run.data.params == {
    'seed': '0',
    'data.path': 'photos',
    'data.sizes': '(8, 16)',
    'w_1': 'nan',
  }
  history = client.get_metric_history(run.info.run_id, 'loss')
  steps = [(m.step, m.value) for m in history]
  assert (steps[0], steps[-1]) == ((10, 1.0), (20, 0.5))
  assert steps[1][0] == 20
  assert math.isnan(steps[1][1])
  (metric,) = client.get_metric_history(run.info.run_id, 'w_2/frechet')
  assert (metric.step, metric.value) == (10, 0.25)
  (path,) = (folder / 'mlruns').rglob('heun*.png')
  with Image.open(path) as picture:
    np.testing.assert_array_equal(np.asarray(picture), IMAGE)


@needs['mlflow']
def test_an_mlflow_run_continues_and_a_lost_one_is_replaced(tmp_path, capsys):
  for _ in range(2):
    logged(trackers.mlflow(workdir=tmp_path, config=NESTED | {'seed': 1}))
  client, (run,) = mlflow_runs(tmp_path / 'mlruns')
  assert len(client.get_metric_history(run.info.run_id, 'loss')) == 6
  assert capsys.readouterr().out == ''
  client.delete_run(run.info.run_id)
  logged(trackers.mlflow(workdir=tmp_path, config=NESTED))
  _, (new,) = mlflow_runs(tmp_path / 'mlruns')
  assert new.info.run_id != run.info.run_id
  assert re.fullmatch(r'MLflow: starts a new run: .+\n', capsys.readouterr().out)


@needs['mlflow']
def test_mlflow_without_its_server_is_one_line_within_seconds(tmp_path):
  start = time.monotonic()
  with pytest.raises(ValueError, match='MLflow does not start; without tracking_uri'):
    trackers.mlflow(workdir=tmp_path, config={}, tracking_uri='http://localhost:9')
  assert time.monotonic() - start < 30  # measured: 6 s, of which retries are 6


# W&B ---------------------------------------------------------------------------------


def wandb_records(path):
  """The records of a .wandb file: a log of LevelDB with protocol buffers."""
  from wandb.proto import wandb_internal_pb2

  data, at, whole = path.read_bytes(), 7, b''
  assert data.startswith(b':W&B')
  while at + 7 <= len(data):
    left = 2**15 - at % 2**15  # in the block; a header is not split
    if left < 7:
      at += left
      continue
    _, size, kind = struct.unpack('<IHB', data[at : at + 7])
    whole += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # whole, or the last part
      record = wandb_internal_pb2.Record()
      record.ParseFromString(whole)
      whole = b''
      yield record


def wandb_rows(records):
  """The rows of the history, without W&B's clocks."""
  for record in records:
    if record.WhichOneof('record_type') == 'history':
      items = record.history.item
      row = {'.'.join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
      yield {k: v for k, v in row.items() if k not in ('_timestamp', '_runtime')}


@needs['wandb']
def test_an_offline_run_of_wandb_holds_all_and_continues(tmp_path, home, capfd):
  folder = tmp_path / 'run'
  folder.mkdir()
  for _ in range(2):
    logged(trackers.wandb(workdir=folder, config=NESTED, mode='offline', project='p'))
    time.sleep(1)  # W&B names its folders by the second
  paths = sorted(folder.glob('wandb/offline-run-*/*.wandb'))
  assert len(paths) == 2
  ids = set()
  for path in paths:
    records = list(wandb_records(path))
    (run,) = [r.run for r in records if r.WhichOneof('record_type') == 'run']
    ids.add(run.run_id)
    assert (run.project, run.display_name) == ('p', 'run')
    config = {item.key: item.value_json for item in run.config.update}
    assert json.loads(config['data']) == {'path': 'photos', 'sizes': [8, 16]}
    metrics = [r.metric for r in records if r.WhichOneof('record_type') == 'metric']
    assert ('*', 'step') in [(m.glob_name, m.step_metric) for m in metrics]
    first, second, again, picture = wandb_rows(records)
    assert first == {'_step': 10, 'step': 10, 'loss': 1, 'w=2/frechet': 0.25}
    assert (second['_step'], second['step']) == (20, 20)
    assert again == {'_step': 21, 'step': 20, 'loss': 0.5}
    assert (picture['_step'], picture['step']) == (22, 20)
    with Image.open(path.parent / 'files' / picture['heun.path']) as image:
      np.testing.assert_array_equal(np.asarray(image), IMAGE)
  assert len(ids) == 1
  assert json.loads((folder / 'trackers' / 'wandb.json').read_text()) == {
    '/p': ids.pop()
  }
  assert capfd.readouterr() == ('', '')  # no banners


@needs['wandb']
def test_wandb_without_a_login_is_one_line_within_seconds(tmp_path, capfd):
  start = time.monotonic()
  with pytest.raises(ValueError, match=r"give mode='offline' .* \(there is no login\)"):
    trackers.wandb(workdir=tmp_path, config={})
  assert time.monotonic() - start < 10  # measured: 0.5 s
  assert capfd.readouterr() == ('', '')


@needs['wandb']
def test_wandb_without_a_network_is_one_line_within_seconds(tmp_path, monkeypatch):
  monkeypatch.setenv('WANDB_API_KEY', '0' * 40)
  monkeypatch.setattr(trackers, 'INIT_S', 1.0)
  start = time.monotonic()
  with pytest.raises(ValueError, match=r"run `wandb login`, or give mode='offline'"):
    trackers.wandb(workdir=tmp_path, config={})
  assert time.monotonic() - start < 15  # measured: 2 s


@needs['wandb']
def test_a_run_that_was_deleted_at_wandb_is_replaced(tmp_path, monkeypatch, capsys):
  import wandb

  trackers.wandb(workdir=tmp_path, config={}, mode='offline').close()
  path = tmp_path / 'trackers' / 'wandb.json'
  deleted = json.loads(path.read_text())['/cmjax']
  init = wandb.init

  def refuse(*, id, **settings):  # what the server answers; there is none here
    if id == deleted:
      message = f'run {id} was previously created and deleted; try a new run name'
      raise wandb.Error(message)
    return init(id=id, **settings)

  monkeypatch.setattr(wandb, 'init', refuse)
  trackers.wandb(workdir=tmp_path, config={}, mode='offline').close()
  new = json.loads(path.read_text())['/cmjax']
  assert list(tmp_path.glob(f'wandb/offline-run-*-{new}'))
  assert re.fullmatch(
    rf'W&B: starts a new run: run {deleted} was previously created and deleted;.*\n',
    capsys.readouterr().out,
  )


# Mistakes, before any compute ---------------------------------------------------------


def parts(**keywords):
  """A config with one tracker, named `mine`."""
  return ConfigDict({'mine': keywords})


@pytest.mark.parametrize('mode', ['train', 'dry_run'])
@pytest.mark.parametrize('name', ['wandb', 'mlflow'])
def test_a_missing_package_is_one_line(name, mode, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
  flags = [f'--mode={mode}', f'--workdir={tmp_path / "run"}']
  code = main.main([*SMALL, *flags, f'--config.trackers.mine.fn={OWN}:{name}'])
  assert code == 2
  out, err = capsys.readouterr()
  assert re.fullmatch(
    rf"cmjax: config\.trackers\.mine: needs the package {name}; pip install '.*{name}"
    r".*>=\d+\.\d+'\n",
    err,
  )
  assert out == ''
  assert not (tmp_path / 'run').exists()


def test_an_old_package_is_one_line(monkeypatch):
  monkeypatch.setattr(tracking.util, 'find_spec', lambda name: object())
  monkeypatch.setattr(tracking.metadata, 'version', lambda name: '0.19.11')
  with pytest.raises(UserError, match=r'needs wandb 0\.30, not 0\.19\.11; pip install'):
    tracking.check(parts(fn=f'{OWN}:wandb'))
  monkeypatch.setattr(tracking.metadata, 'version', lambda name: '1.0')
  tracking.check(parts(fn=f'{OWN}:wandb'))


WRONG = {
  'a key': (dict(fn=f'{OWN}:wandb', projekt='x'), r'mine\.projekt: .* mean project\?'),
  'a mode': (
    dict(fn=f'{OWN}:wandb', mode='of'),
    r"mode: must be one of online, off.*'of'",
  ),
  'a type': (dict(fn=f'{OWN}:mlflow', experiment=3), r'experiment: must be str, got 3'),
  'a key of the run': (
    dict(fn=f'{OWN}:tensorboard', workdir='x'),
    r'mine\.workdir: is set by the run',
  ),
  'another kind': (dict(fn='cmjax.samplers:one_step'), r'returns Sampler, not Tracker'),
}


@pytest.mark.parametrize('mistake', WRONG)
def test_a_mistake_in_a_part_is_found_before_it_starts(mistake):
  part, message = WRONG[mistake]
  with pytest.raises(UserError, match=message):
    prepare(small(trackers={'mine': part}))


@pytest.mark.parametrize(
  ('name', 'key'), [('wandb', 'entity'), ('mlflow', 'tracking_uri')]
)
def test_a_stored_config_does_not_decide_where_a_run_is_sent(name, key, monkeypatch):
  monkeypatch.setattr(tracking, '_check_installed', lambda library, where: None)
  config = small(trackers={'mine': {'fn': f'{OWN}:{name}', key: 'http://theirs'}})
  tracking.check(config.trackers)  # the user's own
  with pytest.raises(UserError, match=rf'mine\.{key}: .* give --trust={name}'):
    tracking.check(from_json(to_json(config)).trackers)
  tracking.check(from_json(to_json(config), trust=(name,)).trackers)
  config.trackers.mine[key] = ''
  tracking.check(from_json(to_json(config)).trackers)
  config.trackers.mine = dict(fn='tests.test_trackers:recorder')
  with pytest.raises(UserError, match='not a function of cmjax that returns Tracker'):
    tracking.check(from_json(to_json(config)).trackers)


# Trackers of the user's own ----------------------------------------------------------

CALLS = []


class Recorder:
  def __init__(self, name, fails_at=0):
    self.name, self.fails_at = name, fails_at

  def log(self, step, values):
    CALLS.append((self.name, step, *values))
    if step == self.fails_at:
      raise ConnectionError('the network is gone')

  def close(self):
    CALLS.append((self.name, 'closed'))


def recorder(*, name: str = '', fails_at: int = 0, start: int, config: dict):
  assert config['seed'] == 0
  CALLS.append((name, 'start', start))
  return Recorder(name, fails_at)


def refusing(*, start: int):
  raise ValueError('no space left')


def nothing():
  return {}


@pytest.fixture(autouse=True)
def no_calls():
  CALLS.clear()


def started(workdir, start, **named):
  config = checked(small(trackers={k: dict(v) for k, v in named.items()}))
  return tracking.Trackers(config, workdir, start)


RECORDER = dict(fn='tests.test_trackers:recorder')


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path, capsys):
  named = {
    'a': RECORDER | dict(name='a'),
    'b': RECORDER | dict(name='b', fails_at=2),
  }
  trackers_of_run = started(tmp_path, 0, **named)
  with trackers_of_run.running():
    for step in (1, 2, 3):
      trackers_of_run.log(step, {'loss': 0.5})
  of = {name: [call[1:] for call in CALLS if call[0] == name] for name in 'ab'}
  steps = [(1, 'loss'), (2, 'loss')]
  assert of['a'] == [('start', 0), *steps, (3, 'loss'), ('closed',)]
  assert of['b'] == [('start', 0), *steps, ('closed',)]
  err = capsys.readouterr().err
  assert 'in log' in err  # the traceback of code that is not of cmjax
  assert err.splitlines()[-1] == (
    'cmjax: config.trackers.b: failed (the network is gone); left out until the next '
    'start, and metrics.jsonl has all rows'
  )


def test_a_tracker_of_cmjax_that_fails_is_one_line(tmp_path, capsys):
  trackers_of_run = started(tmp_path, 0, tb=dict(fn=f'{OWN}:tensorboard'))
  with trackers_of_run.running():
    trackers_of_run.log(1, {'loss': None})
    trackers_of_run.log(2, {'loss': 0.5})
  err = capsys.readouterr().err
  assert re.fullmatch(r'cmjax: config\.trackers\.tb: failed \(.*\); left out .*\n', err)


def test_one_that_does_not_start_ends_a_run_that_starts_and_no_other(tmp_path, capsys):
  mine = dict(fn='tests.test_trackers:nothing')
  run = started(tmp_path, 0, first=RECORDER, mine=mine)
  wrong = pytest.raises(UserError, match=r'mine\.fn: .* of type dict, not Tracker')
  with wrong, run.running():
    pass
  assert CALLS == [('', 'start', 0), ('', 'closed')]
  with started(tmp_path, 6, mine=mine).running():
    pass
  assert 'type dict, not Tracker; left out until the next' in capsys.readouterr().err
  run = started(tmp_path, 6, mine=dict(fn='tests.test_trackers:refusing'))
  with pytest.raises(ValueError, match='no space'), run.running():
    pass  # a mistake in code that is not of cmjax is never left out


# A run and its resumption ------------------------------------------------------------


@pytest.fixture(scope='module')
def resumed(tmp_path_factory, one_device):
  """A run whose own tracker fails at its first row, and resumes with other trackers.

  Its folder, what was printed on stderr, and the calls of each start.
  """
  place = tmp_path_factory.mktemp('resumed')
  readme = (ROOT / 'configs' / 'README.md').read_text(encoding='utf-8')
  (code,) = re.findall(r'^```python\n([^`]*def log\([^`]*)^```', readme, re.S | re.M)
  (fn,) = re.findall(r"fn='(mylab\.\w+:\w+)'", readme)
  (place / 'mylab').mkdir()
  module = place / fn.partition(':')[0].replace('.', '/')
  module.with_suffix('.py').write_text(code)
  of_libraries = {
    'wandb': dict(fn=f'{OWN}:wandb', mode='offline'),
    'mlflow': dict(fn=f'{OWN}:mlflow', experiment='digits'),
  }
  kept = {name: part for name, part in of_libraries.items() if util.find_spec(name)}
  failing = {'mine': RECORDER | dict(name='first', fails_at=6), **kept}
  changed = {'mine': RECORDER | dict(name='second'), 'csv': dict(fn=fn), **kept}
  CALLS.clear()
  errors = io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
    patch.syspath_prepend(str(place))
    patch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    train.train(prepare(small(trackers=failing), one_device), place / 'run')
    ids = {path.name: path.read_text() for path in place.glob('run/trackers/*')}
    (place / 'run' / 'checkpoints' / '24').rename(place / 'gone')
    time.sleep(1)  # W&B names its folders by the second
    train.train(prepare(small(trackers=changed), one_device), place / 'run')
  calls = [(name, *rest) for name, *rest in CALLS]
  for name in [name for name in sys.modules if name.partition('.')[0] == 'mylab']:
    del sys.modules[name]
  assert ids == {path.name: path.read_text() for path in place.glob('run/trackers/*')}
  assert ids.keys() == {f'{name}.json' for name in kept}
  return place / 'run', errors.getvalue(), calls


def rows(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').open()]


def test_a_run_loses_nothing_with_its_tracker_and_may_change_it(resumed):
  folder, errors, calls = resumed
  assert [row['step'] for row in rows(folder)] == [6, 12, 18, 24]
  assert errors.count('config.trackers.mine: failed (the network is gone)') == 1
  assert [call[1] for call in calls if call[0] == 'first'] == ['start', 6, 'closed']
  assert [call[1:3] for call in calls if call[:2] == ('second', 'start')] == [
    ('start', 18)
  ]
  ((_, _, *names),) = [c for c in calls if c[0] == 'second' and c[1] == 24]
  assert {'loss', 'grad_norm', 'images_per_s'} <= set(names)
  assert calls[-1] == ('second', 'closed')
  assert not (folder / 'tensorboard').exists()  # it was left out


def test_the_tracker_of_the_readme_works(resumed):
  (path,) = resumed[0].glob('*.csv')
  lines = path.read_text().splitlines()
  (line,) = [line for line in lines if ',loss,' in line]
  assert line == f'24,loss,{rows(resumed[0])[-1]["loss"]}'
  assert '24,skipped_steps,0' in lines


@needs['mlflow']
def test_a_resumed_run_is_one_run_of_mlflow(resumed):
  client, (found,) = mlflow_runs(resumed[0] / 'mlruns', 'digits')
  losses = client.get_metric_history(found.info.run_id, 'loss')
  assert [m.step for m in losses] == [6, 12, 18, 24, 24]  # the last was repeated
  assert [m.value for m in losses[:4]] == [row['loss'] for row in rows(resumed[0])]
  assert losses[3].value == losses[4].value


@needs['wandb']
def test_a_resumed_run_is_one_run_of_wandb(resumed):
  by_step = {}
  for path in sorted(resumed[0].glob('wandb/offline-run-*/*.wandb')):
    by_step |= {row['step']: row for row in wandb_rows(wandb_records(path))}
  assert [by_step[row['step']]['loss'] for row in rows(resumed[0])] == [
    row['loss'] for row in rows(resumed[0])
  ]


def test_a_run_of_before_trackers_has_the_default_one(tmp_path):
  config = checked(small())
  write_config(tmp_path, config)
  path = tmp_path / 'config.json'
  old = json.loads(path.read_text())
  del old['trackers']
  path.write_text(json.dumps(old))
  found = config_for('', tmp_path)
  assert found.trackers.to_dict() == {'tensorboard': {'fn': f'{OWN}:tensorboard'}}
  check_claim(tmp_path, config.replace(trackers={}))
  path.write_text(to_json(config))
  check_claim(tmp_path, config.replace(trackers={'mine': RECORDER}))
