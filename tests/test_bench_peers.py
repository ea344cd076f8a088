"""What of the comparison with other implementations needs none of them."""

import importlib.util
import json
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope='module')
def bench():
  """The script, as a module."""
  spec = importlib.util.spec_from_file_location(
    'bench_peers', ROOT / 'launch' / 'bench_peers.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def checkout(tmp_path):
  """A folder with a file where each peer has it."""
  for file in ('training/loss.py', 'jcm/losses.py'):
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).touch()
  return tmp_path


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    ([], 'no peer to compare with; give --ect=CHECKOUT or --jcm=CHECKOUT'),
    (['--ect=nowhere'], 'no training/loss.py in nowhere'),
    (['--jcm=nowhere'], 'no jcm/losses.py in nowhere'),
    (['--ect={}', '--batch=0'], '--batch: must be positive'),
    (['--ect={}', '--seconds=-1'], '--seconds: must be positive'),
    (['--ect={}', '--threads=100000'], '--threads: this machine has'),
    (['--ect={}', '--precision=int8'], '--precision'),
    (['--ect={}', '--bath=3'], '--bath=3'),
    (['--ect={}', '--batch=some'], '--batch'),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(bench, checkout, capsys, flags, words):
  assert bench.main([flag.format(checkout) for flag in flags]) == 2
  out, err = capsys.readouterr()
  assert not out
  assert len(err.splitlines()) == 1
  assert words in err


def test_a_python_that_is_not_there_is_one_line(bench, checkout):
  task = {'side': 'ect', 'checkout': str(checkout), 'threads': 1}
  with pytest.raises(bench.CannotRunError, match=r'cannot start .*/python \(No such'):
    bench.Side(task, str(checkout / 'python'), checkout / 'log.txt')


def test_a_missing_module_is_named(bench, checkout):
  task = {'side': 'ect', 'checkout': str(checkout), 'threads': 1}
  # Either there is no torch, or an empty checkout lacks a module of its own.
  with pytest.raises(bench.CannotRunError, match=r"has no module '(torch|training)"):
    bench.Side(task, sys.executable, checkout / 'log.txt')


def test_our_side_takes_its_turns(bench, tmp_path):
  task = {
    'side': 'ours',
    'peer': 'ect',
    'checkout': str(ROOT),
    'folder': str(tmp_path),
    'precision': 'float32',
    'batch': 2,
    'channels': 8,
    'num_blocks': 1,
    'threads': 1,
  }
  side = bench.Side(task, sys.executable, tmp_path / 'log.txt')
  assert side.facts['parameters'] > 0
  assert '--xla_' in side.facts['xla_flags']  # those of the tests, and cmjax's own
  assert set(side.facts['per_call']) == {'train', 'sample'}
  assert side.seconds('train', 1) > 0
  assert side.seconds('sample', 2) > 0
  side.close()


def test_variants_are_of_the_peer_the_precision_and_the_device(bench):
  assert bench.variants('jcm', 'float32', 'gpu') == ['pmap']
  assert not bench.variants('jcm', 'bfloat16', 'gpu')
  assert bench.variants('ect', 'float32', 'gpu') == list(bench.LAYOUTS)
  assert bench.variants('ect', 'bfloat16', 'cpu') == [
    'bfloat16+eager',
    'bfloat16+channels_last',
    'bfloat16+compile',
    'bfloat16+channels_last+compile',
  ]
  assert len(bench.variants('ect', 'bfloat16', 'gpu')) == 8


def test_ratio_is_of_medians_in_images_a_second(bench):
  summary = bench.summary(32, ours=[0.5, 0.4, 4.0], theirs=[1.0, 1.2, 2.0])
  assert summary == {
    'ours_images_per_s': pytest.approx(64.0),
    'theirs_images_per_s': pytest.approx(32 / 1.2),
    'ratio': pytest.approx(2.4),
    'lowest_ratio': pytest.approx(0.5),
    'highest_ratio': pytest.approx(3.0),
  }


class FakeSide:
  """What a side answers, without a process."""

  def __init__(self, task, python, log):
    self.speed = 0.5 if task['side'] == 'ours' else 1.0
    self.facts = {
      'python': '3.11',
      'versions': {'jax': '1'},
      'xla_flags': '--xla_some=1',
      'platform': 'cpu',
      'device': 'a CPU',
      'parameters': 7 if task.get('variant') == 'compile' else 3_500_000,
      'per_call': {'train': 1.0, 'sample': 1.0},
    }

  def seconds(self, function, calls):
    return self.speed

  def close(self):
    pass


def test_every_variant_has_rows_and_other_networks_are_refused(
  bench, checkout, capsys, monkeypatch
):
  monkeypatch.setattr(bench, 'Side', FakeSide)
  out = checkout / 'out'
  assert bench.main([f'--ect={checkout}', f'--out={out}', '--rounds=3']) == 0
  text = (out / 'bench_peers.md').read_text()
  assert text in capsys.readouterr().out
  assert text.splitlines()[2] == (
    '| ECT training step, 3.5 M, float32 | 32 | 64 images/s | 32 images/s '
    '| eager | 2.00 | 2.00 to 2.00 |'
  )
  assert 'Not run: ect, compile: parameters differ: ours 3500000, theirs 7.' in text
  rows = json.loads((out / 'bench_peers.json').read_text())['rows']
  assert len(rows) == 6
  assert rows[0]['ours_seconds'] == [0.5] * 3
  assert "XLA_FLAGS='--xla_some=1'" in text


def test_one_variant_can_be_chosen(bench, checkout, capsys, monkeypatch):
  monkeypatch.setattr(bench, 'Side', FakeSide)
  flags = [f'--ect={checkout}', f'--out={checkout / "out"}']
  assert bench.main([*flags, '--variant=eager']) == 0
  rows = json.loads((checkout / 'out' / 'bench_peers.json').read_text())['rows']
  assert [row['variant'] for row in rows] == ['eager'] * 2
  assert bench.main([*flags, '--variant=lazy']) == 2
  assert "it has no variant 'lazy'" in capsys.readouterr().err
