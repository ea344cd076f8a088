"""The mesh and what lies where on it: the only place with axis names."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

from cmjax.core import UserError


def data_mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """One axis over all devices (or those given): data parallel."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
    (len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The first axis split over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def check_divisible(batch_size: int, mesh: jax.sharding.Mesh, where: str) -> None:
  """Refuses a batch that the devices cannot share evenly.

  Raises: UserError naming the key, the number of devices and the next size that fits.
  """
  n = mesh.size
  if batch_size % n:
    raise UserError(
      f'{where}: {batch_size} examples do not divide over {n} devices; '
      f'the next size that does is {-(-batch_size // n) * n}'
    )


def place(tree: Any, sharding: NamedSharding) -> Any:
  """Host arrays, each process holding its share, as global device arrays."""
  return jax.tree.map(
    lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), tree
  )
