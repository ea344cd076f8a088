"""Timing: the table holds what was measured."""

import time

import jax
import jax.numpy as jnp
import pytest

from cmjax import core, train
from cmjax.modes import bench
from cmjax.runtime import batches
from cmjax.runtime.config import read
from cmjax.runtime.flops import PEAKS, flops
from cmjax.runtime.run import prepare
from cmjax.runtime.state import random_state
from tests.conftest import ROOT
from tests.test_train import small


@pytest.fixture(scope='module')
def result(one_device):
  """A small run of Stable Consistency Tuning, measured briefly."""
  config = read(ROOT / 'configs' / 'stable_ct.py:digits')
  config.network.width = config.network.embedding = 16
  config.network.num_blocks = 1
  config.batch_size = 16
  config.init_from = ''
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bench, 'ROUND_S', 0.05)
    patch.setattr(bench, 'WINDOW_S', 0.05)
    yield bench.measure(prepare(config, one_device))


def test_every_part_takes_some_time_and_less_than_all(result):
  assert {
    'network, jvp',
    'optimiser',
    'averages',
    'objective, without its networks',
  } <= set(result['parts'])
  assert all(took > 0 for took in result['parts'].values())
  assert result['flops_a_device'] > 1e5


def test_an_objective_without_its_networks_multiplies_no_matrices(one_device):
  run = prepare(small(), one_device)
  params, batch = random_state(run).params, batches.batch(run, 0)

  def counted(loss):
    keys = core.streams(jax.random.key(0), 0)
    jitted = jax.jit(lambda params: loss(core.Nets(params), batch, 0, keys).loss)
    return flops(jitted.trace(params).jaxpr)

  assert counted(run.loss) > 0
  assert counted(bench._loss_without_networks(run)) == 0


def test_the_numbers_of_one_report_agree(result):
  alone, with_data = result['images_per_s'], result['loop_images_per_s']
  assert alone == pytest.approx(16 / result['step_s'])
  assert result['waiting_for_data'] == pytest.approx(max(0, 1 - with_data / alone))
  assert result['flops_per_s_a_device'] == result['flops_a_device'] / result['step_s']
  share = result['flops_per_s_a_device'] / result['peak_flops_per_s']
  assert 0 < result['of_peak'] == share < 1


def test_data_that_takes_as_long_as_a_step_is_waited_for(monkeypatch, one_device):
  run = prepare(small(network__width=16, network__num_blocks=1), one_device)
  batch = batches.batch(run, 0)

  class Sleeper(bench.Stepper):
    def __call__(self, batch):
      time.sleep(0.01)
      return {}

  def slow(run, step):
    time.sleep(0.01)
    return batch

  monkeypatch.setattr(batches, 'batch', slow)
  monkeypatch.setattr(bench, 'ROUND_S', 0.0)
  monkeypatch.setattr(bench, 'WINDOW_S', 0.05)
  alone, with_data = bench._loop_seconds(run, Sleeper(run, None, None), batch)
  assert alone >= 0.01
  assert with_data >= 0.02
  assert with_data == pytest.approx(2 * alone, rel=0.5)  # sleeps are never exact


def test_the_report_says_what_was_measured(result):
  text = bench.report(result)
  assert f'| one step | {1e3 * result["step_s"]:.1f} ms |' in text
  assert '| fraction of the fastest float32 matmul measured | ' in text
  assert '| objective, without its networks | ' in text


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
  assert bench.peak_flops() == (PEAKS[name], f'the bfloat16 peak of {name}')


def test_an_unknown_device_has_the_best_of_all_rounds_and_sizes(monkeypatch):
  monkeypatch.setattr(bench, '_MATRIX_SIZES', (8, 4))
  rounds = iter([[2.0, 1.0, 3.0], [0.5, 0.25, 1.0]])
  monkeypatch.setattr(bench, '_rounds', lambda call: next(rounds))
  assert bench.peak_flops()[0] == max(2 * 8**3 / 1.0, 2 * 4**3 / 0.25)


# Floating-point operations ---------------------------------------------------------


def traced_flops(f, *shapes):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return flops(jax.jit(f).trace(*args).jaxpr)


def conv(x, w):
  numbers = ('NHWC', 'HWIO', 'NHWC')
  return jax.lax.conv_general_dilated(x, w, (1, 1), 'SAME', dimension_numbers=numbers)


def test_products_and_convolutions_are_counted_as_often_as_they_run():
  product = 2 * 4 * 5 * 6
  assert traced_flops(jnp.matmul, (4, 5), (5, 6)) == product
  assert traced_flops(conv, (2, 8, 8, 3), (3, 3, 3, 7)) == 2 * 2 * 64 * 7 * 27
  square = traced_flops(jnp.matmul, (4, 4), (4, 4))

  def scanned(x, ws):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

  assert traced_flops(scanned, (4, 4), (7, 4, 4)) == 7 * square


def test_the_gradient_costs_twice_and_recomputing_once_more():
  shapes = (4, 8), (8, 8)

  def loss(x, w):
    return jnp.sum(jnp.matmul(jnp.sin(jnp.matmul(x, w)), w) ** 2)

  once = traced_flops(loss, *shapes)
  assert traced_flops(jax.grad(loss, (0, 1)), *shapes) == 3 * once
  again = traced_flops(jax.grad(jax.checkpoint(loss), (0, 1)), *shapes)
  assert 3 * once < again <= 4 * once


def test_parts_of_a_batch_take_as_many_operations_as_the_whole(one_device):
  def counted(accumulate):
    run = prepare(small(accumulate=accumulate), one_device)
    state = train.abstract_state(run)
    traced = train.compiled_step(run).trace(state, run.frozen, batches.batch(run, 0))
    return flops(traced.jaxpr)

  assert counted(2) == counted(1) > 0
