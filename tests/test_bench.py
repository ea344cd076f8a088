"""Timing: the table holds what was measured."""

import time

import jax
import pytest

from cmjax import bench
from cmjax import config as configs
from cmjax import run as runs
from tests.conftest import ROOT


@pytest.fixture(scope='module')
def found(one_device):
  """A small run of the stable field, measured briefly."""
  config = configs.load(ROOT / 'configs' / 'stable_ct.py:digits')
  config.network.width = config.network.embedding = 16
  config.network.blocks = 1
  config.batch_size = 16
  config.init_from = ''
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bench, 'ROUND_S', 0.05)
    yield bench.measure(runs.prepare(config, one_device))


def test_every_part_takes_some_time_and_less_than_all(found):
  assert {'network, jvp', 'optimiser', 'averages', 'stable field'} <= set(
    found['parts']
  )
  assert all(took > 0 for took in found['parts'].values())
  assert found['images_per_s'] == pytest.approx(16 / found['step_s'])
  assert 0 <= found['waiting_for_data'] < 1
  assert 0 < found['mfu'] < 1
  assert found['flops_a_device'] > 1e5


def test_the_report_says_what_was_measured(found):
  text = bench.report(found)
  assert f'| a step, median | {1e3 * found["step_s"]:.1f} ms |' in text
  assert '| stable field | ' in text


def test_seconds_are_the_median_and_wait_for_the_result():
  spans = iter([0.0] * bench.WARM_UP + [0.01, 0.01, 0.01, 0.2, 0.0] + [0.01] * 100)
  assert bench.seconds(lambda: time.sleep(next(spans))) == pytest.approx(0.01, rel=0.5)


@pytest.mark.parametrize(
  ('kind', 'name'),
  [('NVIDIA H200', 'NVIDIA H200'), ('NVIDIA A100-SXM4-80GB', 'NVIDIA A100')],
)
def test_a_known_device_has_the_peak_of_its_data_sheet(kind, name, monkeypatch):
  device = type('Device', (), {'device_kind': kind})
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  assert bench.peak_flops() == (bench.PEAKS[name], f'{name}, bfloat16, data sheet')
