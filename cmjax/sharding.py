"""Processes, the mesh, and what lies where on it: the only place with axis names.

A mesh says how a run is placed. Examples are split over all of its devices; the
parameters, averages and optimiser state over its axis `fsdp`, which has one device
where each is to hold the whole.
"""

from collections.abc import Mapping, Sequence
import hashlib
import itertools
import json
import math
import os
from typing import Any

import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from cmjax.core import UserError, first_line

# Elements; smaller arrays stay whole, as gathering them takes longer than it saves.
SMALLEST_SPLIT = 1024


def start(coordinator: str = '', processes: int = 0, process: int = -1) -> None:
  """Joins this process to the others of a job; before anything else touches devices.

  Args:
    coordinator: `host:port` of process 0; if empty, what the cluster says (TPU pod,
      GKE, Slurm, Open MPI).
    processes: how many there are; 0: what the cluster says.
    process: which this is, from 0; -1: what the cluster says.

  Raises: UserError if the others are not found.
  """
  try:
    jax.distributed.initialize(
      coordinator or None,
      processes or None,
      None if process < 0 else process,
      # A process that is gone is noticed after this long, and the job ends.
      heartbeat_timeout_seconds=60,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f'--distributed: {first_line(error)}; outside TPU pods, GKE and Slurm give '
      '--coordinator=HOST:PORT --processes=N --process=I'
    ) from error


def all_true(well: bool) -> bool:
  """Whether it is true in every process; every process must ask."""
  return bool(np.all(multihost_utils.process_allgather(np.array(well))))


def bytes_held(tree: Any) -> int:
  """What one device holds of arrays, by their places and without padding."""
  return sum(
    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    for a in jax.tree.leaves(tree)
  )


def host_memory() -> float:
  """Bytes that this machine has; infinity where that is not known."""
  try:
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  except (AttributeError, ValueError):
    return math.inf


def check_same(texts: Mapping[str, str]) -> None:
  """Refuses a job whose processes were given different things; every process must ask.

  Args:
    texts: what to compare, by name.

  Raises: UserError, the same in every process, naming the first line that differs.
  """
  if jax.process_count() == 1:
    return
  own = np.frombuffer(json.dumps(dict(texts), sort_keys=True).encode(), np.uint8)
  digest = np.frombuffer(hashlib.sha256(own).digest(), np.uint8)
  digests = multihost_utils.process_allgather(digest)
  if np.all(digests == digests[0]):
    return
  sizes = multihost_utils.process_allgather(np.array(len(own)))
  padded = np.pad(own, (0, np.max(sizes) - len(own)))
  rows = multihost_utils.process_allgather(padded)
  each = [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]
  raise UserError(difference(each))


def difference(each: Sequence[Mapping[str, str]]) -> str:
  """The first line in which the texts of a process are not those of process 0."""
  for name in sorted(set().union(*each)):
    ours, *others = (texts.get(name, '').split('\n') for texts in each)
    differing = [i for i, theirs in enumerate(others, 1) if theirs != ours]
    if differing:
      pairs = itertools.zip_longest(others[differing[0] - 1], ours, fillvalue='')
      lines = next(pair for pair in pairs if pair[0] != pair[1])
      a, b = (line.strip(' ,')[:80] or 'nothing' for line in lines)
      also = f' (others that differ: {differing[1:]})' if differing[1:] else ''
      return (
        f'{name}: process {differing[0]} has {a}, process 0 has {b}{also}; give every '
        'process the same'
      )
  return ''


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Data parallel: the state whole on every device, all of them or those given."""
  return mesh(devices=devices)


def mesh(
  *,
  fsdp: bool = False,
  slices: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Data parallel, or with the state split too.

  Args:
    fsdp: split parameters, averages and optimiser state over the devices of a slice.
    slices: 1: over all devices. More: parts that are far from each other, such as TPU
      slices or GPU nodes; each holds the whole state, and only gradients travel
      between them.
    devices: all if None.

  Raises: ValueError if the devices do not divide over the slices.
  """
  devices = jax.devices() if devices is None else devices
  if slices < 1 or len(devices) % slices:
    raise ValueError(f'{slices=} do not divide {len(devices)} devices')
  within = len(devices) // slices
  shape = (slices, within) if fsdp else (len(devices), 1)
  axes, kinds = ('data', 'fsdp'), (AxisType.Auto,) * 2
  if 1 < slices == len({getattr(device, 'slice_index', 0) for device in devices}):
    near = (1, within) if fsdp else (within, 1)
    arranged = mesh_utils.create_hybrid_device_mesh(near, (slices, 1), devices)
    return Mesh(arranged, axes, axis_types=kinds)
  return jax.make_mesh(shape, axes, axis_types=kinds, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
  """The first axis split over the devices."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def of_state(mesh: Mesh, tree: Any) -> Any:
  """Where each array of parameters, averages or optimiser state lies.

  Along `fsdp`, each is split on the longest of its axes that divides.
  """
  parts = mesh.shape['fsdp']

  def place(a):
    sizes = [n if n % parts == 0 else 0 for n in a.shape]
    if parts == 1 or math.prod(a.shape) < SMALLEST_SPLIT or not any(sizes):
      return replicated(mesh)
    axis = max(range(len(sizes)), key=sizes.__getitem__)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, 'fsdp'))

  return jax.tree.map(place, tree)


def abstract(mesh: Mesh, tree: Any) -> Any:
  """Shapes and dtypes of state, with its places."""
  return jax.tree.map(
    lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
    tree,
    of_state(mesh, tree),
  )


def check_divisible(batch_size: int, mesh: Mesh, where: str) -> None:
  """Refuses a batch that the devices cannot share evenly.

  Raises: UserError naming the key, the number of devices and the next size that fits.
  """
  n = mesh.size
  if batch_size % n:
    raise UserError(
      f'{where}: {batch_size} examples do not divide over {n} devices; '
      f'the next size that does is {-(-batch_size // n) * n}'
    )


def attached(mesh: Mesh) -> bool:
  """Whether arrays can lie on the mesh, or only be compiled for its devices."""
  device = mesh.devices.flat[0]
  try:
    return device in jax.devices(device.platform)
  except RuntimeError:  # no device of that kind is here
    return False


def place(tree: Any, shardings: Any) -> Any:
  """Host arrays that every process holds whole, as global device arrays.

  `shardings` is one for all, or a tree of them. On devices that are not attached, they
  become shapes and dtypes with their places.
  """

  def put(a, sharding):
    a = np.asarray(a)
    if not attached(sharding.mesh):
      return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])

  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(put, tree, shardings)


def rows_here(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Which rows of a batch split `by_example` lie on devices of this process."""
  indices = by_example(mesh).addressable_devices_indices_map((batch_size,)).values()
  return np.unique([np.arange(batch_size)[index] for index in indices])


def place_rows(tree: Any, rows: np.ndarray, batch_size: int, mesh: Mesh) -> Any:
  """Host arrays of this process's rows, as global arrays split `by_example`."""

  def put(a):
    def part(index):
      at = np.searchsorted(rows, np.arange(batch_size)[index[0]])
      return a[at]

    shape = (batch_size, *a.shape[1:])
    return jax.make_array_from_callback(shape, by_example(mesh), part)

  return jax.tree.map(put, tree)
