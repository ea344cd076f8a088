"""Placements on eight fake devices."""

import jax
import numpy as np
import pytest

from cmjax import core, sharding


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


@pytest.mark.parametrize(('batch_size', 'advice'), [(12, 16), (3, 8)])
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(batch_size, advice):
  mesh = sharding.data_mesh()
  with pytest.raises(core.UserError, match=f'where: {batch_size} .* 8 .* is {advice}$'):
    sharding.check_divisible(batch_size, mesh, 'where')
  sharding.check_divisible(advice, mesh, 'where')
