"""Placements on eight fake devices."""

import contextlib

import jax
import numpy as np
import pytest

from cmjax import core
from cmjax.runtime import sharding


def test_a_batch_is_split_and_parameters_are_everywhere():
  mesh = sharding.data_mesh()
  assert mesh.size == 8
  host = {'x': np.arange(48.0).reshape(16, 3), 'none': None}
  split = sharding.place(host, sharding.by_example(mesh))['x']
  np.testing.assert_array_equal(split, host['x'])
  for i, shard in enumerate(split.addressable_shards):
    np.testing.assert_array_equal(shard.data, host['x'][2 * i : 2 * i + 2])
  whole = sharding.place(host, sharding.replicated(mesh))['x']
  assert [shard.data.shape for shard in whole.addressable_shards] == [(16, 3)] * 8


def test_a_mesh_takes_the_devices_it_is_given():
  mesh = sharding.data_mesh(jax.devices()[2:4])
  assert list(mesh.devices.flat) == jax.devices()[2:4]


def test_state_is_split_on_its_longest_axis_that_divides():
  mesh = sharding.mesh(fsdp=True, num_slices=2)
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 4}
  shapes = {
    (3, 3, 64, 128): (3, 3, 64, 32),
    (3, 3, 128, 64): (3, 3, 32, 64),
    (4098, 8): (4098, 2),
    (4099, 3): (4099, 3),
    (512,): (512,),
    (): (),
  }
  tree = {str(shape): jax.ShapeDtypeStruct(shape, 'float32') for shape in shapes}
  places = sharding.of_state(mesh, tree)
  for whole, part in shapes.items():
    assert places[str(whole)].shard_shape(whole) == part
  for place in sharding.of_state(sharding.data_mesh(), tree).values():
    assert place.is_fully_replicated


@pytest.mark.parametrize('slices', [0, 3])
def test_slices_that_do_not_divide_the_devices_are_refused(slices):
  with pytest.raises(ValueError, match=f'num_slices={slices} .* 8 devices'):
    sharding.mesh(num_slices=slices)


@pytest.mark.parametrize('fsdp', [False, True])
def test_rows_of_a_process_make_the_batch(fsdp):
  mesh = sharding.mesh(fsdp=fsdp, num_slices=2)
  rows = sharding.local_rows(mesh, 16)
  np.testing.assert_array_equal(rows, np.arange(16))  # one process has all
  host = {'x': np.arange(48.0).reshape(16, 3), 'none': None}
  placed = sharding.place_rows(host, rows, 16, mesh)['x']
  np.testing.assert_array_equal(placed, host['x'])
  assert placed.sharding == sharding.by_example(mesh)
  assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize(('batch_size', 'advice'), [(12, 16), (3, 8)])
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(batch_size, advice):
  mesh = sharding.data_mesh()
  with pytest.raises(core.UserError, match=f'where: {batch_size} .* 8 .* is {advice}$'):
    sharding.check_divisible(batch_size, mesh, 'where')
  sharding.check_divisible(advice, mesh, 'where')


def test_the_first_line_that_differs_is_reported_with_its_processes():
  config = '{\n  "batch_size": 32,\n  "seed": 1\n}'
  other = config.replace('1', '2')
  difference = 'config: process 2 has "seed": 2, process 0 has "seed": 1'
  same = {'a': '', 'config': config}
  assert sharding.difference([same, same]) == ''
  text = sharding.difference([same, same, same | {'config': other}])
  assert text == f'{difference}; give the same to all processes'
  text = sharding.difference([same, same, same | {'config': other}, {'config': other}])
  assert (
    text == f'{difference} (processes [3] also differ); give the same to all processes'
  )
  text = sharding.difference([{'config': config}, {}])
  assert text.startswith('config: process 1 has nothing, process 0 has {; ')


def test_one_process_agrees_with_itself():
  sharding.check_same({'config': 'x'})
  assert sharding.all_true(True) is True
  assert sharding.all_true(False) is False


@pytest.mark.parametrize('kind', [core.UserError, core.RetryError])
def test_processes_end_with_the_error_of_the_first_and_its_kind(kind, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(
    sharding.multihost_utils, 'broadcast_one_to_all', lambda value: value
  )

  @contextlib.contextmanager
  def failing():
    raise kind('no answer')
    yield

  with (
    pytest.raises(kind, match='no answer') as error,
    sharding.on_process_0(failing()),
  ):
    pass
  assert type(error.value) is kind
