"""Processes, the device mesh and shardings: the only module with axis names.

Examples are sharded over all devices of a mesh; parameters, averages and optimiser
state over its axis `fsdp`, which has length 1 in data-parallel training.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import hashlib
import itertools
import json
import math
import os
from typing import Any, TypeVar

import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from cmjax.core import RetryError, UserError, first_line

T = TypeVar('T')
Device = Any  # jax.Device, which type checkers take for a variable

# Arrays with fewer elements are replicated: gathering them costs more than it saves.
MIN_SHARDED_SIZE = 1024


def start(coordinator: str = '', processes: int = 0, process: int = -1) -> None:
  """Connects the processes of a job; to be called before any use of devices.

  Args:
    coordinator: `host:port` of process 0; detected on TPU pods, GKE, Slurm and Open MPI
      if empty.
    processes: number of processes; detected if 0.
    process: index of this process, from 0; detected if -1.

  Raises: UserError if they cannot be detected or connected.
  """
  try:
    jax.distributed.initialize(
      coordinator or None,
      processes or None,
      None if process < 0 else process,
      # The job ends once a process has sent no heartbeat for this long.
      heartbeat_timeout_seconds=60,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f'--distributed: {first_line(error)}; outside TPU pods, GKE and Slurm, give '
      '--coordinator=HOST:PORT --processes=N --process=I'
    ) from error


def all_true(value: bool) -> bool:
  """Whether `value` is true in all processes; a collective, so all must call it."""
  return bool(np.all(multihost_utils.process_allgather(np.array(value))))


@contextlib.contextmanager
def on_process_0(
  context: contextlib.AbstractContextManager[T],
) -> Iterator[T | None]:
  """Enters a context in process 0 only; if that fails, raises UserError in all.

  Yields what the context does, and None in other processes.
  """
  with contextlib.ExitStack() as stack:
    values = []

    def enter() -> None:
      try:
        values.append(stack.enter_context(context))
      except OSError as error:
        raise UserError(str(error)) from error

    from_process_0(enter)
    yield values[0] if values else None


def from_process_0(compute: Callable[[], T]) -> T:
  """The result of a function, as JSON, that is called in process 0 only.

  A collective, so all processes must call it.

  Raises: UserError or RetryError in all processes if the function raises it.
  """
  if jax.process_count() == 1:
    return compute()
  text = b''
  if jax.process_index() == 0:
    try:
      text = json.dumps({'result': compute()}).encode()
    except UserError as error:
      retry = isinstance(error, RetryError)
      text = json.dumps({'error': str(error), 'retry': retry}).encode()
  size = int(multihost_utils.broadcast_one_to_all(np.array(len(text))))
  padded = np.resize(np.frombuffer(text or b' ', np.uint8), size)
  message = json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))
  if 'error' in message:
    raise (RetryError if message['retry'] else UserError)(message['error'])
  return message['result']


def bytes_held(tree: Any) -> int:
  """Bytes of a tree of sharded arrays on each device, without padding."""
  return sum(
    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    for a in jax.tree.leaves(tree)
  )


def host_memory() -> float:
  """Bytes of memory of this machine; infinity where the system does not report it."""
  try:
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  except (AttributeError, ValueError):
    return math.inf


def check_same(texts: Mapping[str, str]) -> None:
  """Checks that all processes have the same texts; a collective, so all must call it.

  Args:
    texts: what to compare, by name.

  Raises: UserError with the first line that differs, the same in all processes.
  """
  if jax.process_count() == 1:
    return
  local = np.frombuffer(json.dumps(dict(texts), sort_keys=True).encode(), np.uint8)
  digest = np.frombuffer(hashlib.sha256(local).digest(), np.uint8)
  digests = multihost_utils.process_allgather(digest)
  if np.all(digests == digests[0]):
    return
  sizes = multihost_utils.process_allgather(np.array(len(local)))
  padded = np.pad(local, (0, np.max(sizes) - len(local)))
  rows = multihost_utils.process_allgather(padded)
  by_process = [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]
  raise UserError(difference(by_process))


def difference(by_process: Sequence[Mapping[str, str]]) -> str:
  """The first line in which the texts of a process differ from those of process 0.

  Empty if none does.
  """
  for name in sorted(set().union(*by_process)):
    first, *others = (texts.get(name, '').split('\n') for texts in by_process)
    differing = [i for i, lines in enumerate(others, 1) if lines != first]
    if differing:
      pairs = itertools.zip_longest(others[differing[0] - 1], first, fillvalue='')
      pair = next((a, b) for a, b in pairs if a != b)
      a, b = (line.strip(' ,')[:80] or 'nothing' for line in pair)
      more = f' (processes {differing[1:]} also differ)' if differing[1:] else ''
      return (
        f'{name}: process {differing[0]} has {a}, process 0 has {b}{more}; give the '
        'same to all processes'
      )
  return ''


def data_mesh(devices: Sequence[Device] | None = None) -> Mesh:
  """A mesh for data parallelism over the given devices, or all: state is replicated."""
  return mesh(devices=devices)


def mesh(
  *,
  fsdp: bool = False,
  num_slices: int = 1,
  devices: Sequence[Device] | None = None,
) -> Mesh:
  """A mesh for data parallelism, with or without sharded state (FSDP).

  Args:
    fsdp: shard parameters, averages and optimiser state over the devices of a slice.
    num_slices: groups of devices with slow links between them, such as TPU slices or
      GPU nodes; each holds a copy of the state, and they exchange only gradients.
    devices: all if None.

  Raises: ValueError if `num_slices` does not divide the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if num_slices < 1 or len(devices) % num_slices:
    raise ValueError(f'{num_slices=} must divide the {len(devices)} devices')
  per_slice = len(devices) // num_slices
  shape = (num_slices, per_slice) if fsdp else (len(devices), 1)
  axes, kinds = ('data', 'fsdp'), (AxisType.Auto,) * 2
  if 1 < num_slices == len({getattr(device, 'slice_index', 0) for device in devices}):
    near = (1, per_slice) if fsdp else (per_slice, 1)
    arranged = mesh_utils.create_hybrid_device_mesh(near, (num_slices, 1), devices)
    return Mesh(arranged, axes, axis_types=kinds)
  return jax.make_mesh(shape, axes, axis_types=kinds, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy of the array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
  """The first axis sharded over all devices."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def of_state(mesh: Mesh, tree: Any) -> Any:
  """The sharding of each array of parameters, averages or optimiser state.

  Arrays are sharded over `fsdp` along their longest axis that its length divides.
  """
  num_shards = mesh.shape['fsdp']

  def sharding(a):
    sizes = [n if n % num_shards == 0 else 0 for n in a.shape]
    if num_shards == 1 or math.prod(a.shape) < MIN_SHARDED_SIZE or not any(sizes):
      return replicated(mesh)
    axis = max(range(len(sizes)), key=sizes.__getitem__)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, 'fsdp'))

  return jax.tree.map(sharding, tree)


def abstract(mesh: Mesh, tree: Any) -> Any:
  """Shapes, dtypes and shardings of state."""
  return jax.tree.map(
    lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
    tree,
    of_state(mesh, tree),
  )


def check_divisible(
  batch_size: int, mesh: Mesh, where: str, num_parts: int = 1
) -> None:
  """Raises UserError, naming the key `where`, if a part is split unequally."""
  unit = mesh.size * num_parts
  if batch_size % unit:
    parts = f' in {num_parts} parts' if num_parts > 1 else ''
    raise UserError(
      f'{where}: {batch_size} examples do not divide evenly over {mesh.size} '
      f'devices{parts}; the next size that does is {-(-batch_size // unit) * unit}'
    )


def attached(mesh: Mesh) -> bool:
  """Whether this process can use the devices, or only compile for them."""
  device = mesh.devices.flat[0]
  try:
    return device in jax.devices(device.platform)
  except RuntimeError:  # the process has no such platform
    return False


def place(tree: Any, shardings: Any) -> Any:
  """Global device arrays from host arrays, of which every process has a copy.

  `shardings` is a tree, or one for all arrays. Where the devices are not `attached`,
  returns shapes and dtypes with shardings instead.
  """

  def put(a, sharding):
    a = np.asarray(a)
    if not attached(sharding.mesh):
      return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])

  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(put, tree, shardings)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Which rows of a batch sharded `by_example` are on devices of this process."""
  indices = by_example(mesh).addressable_devices_indices_map((batch_size,)).values()
  return np.unique([np.arange(batch_size)[index] for index in indices])


def place_rows(tree: Any, rows: np.ndarray, batch_size: int, mesh: Mesh) -> Any:
  """Global arrays sharded `by_example`, from host arrays that hold only `rows`."""

  def put(a):
    def shard(index):  # consecutive rows; a slice is not copied
      start, stop, _ = index[0].indices(batch_size)
      first = np.searchsorted(rows, start)
      return a[first : first + stop - start]

    shape = (batch_size, *a.shape[1:])
    return jax.make_array_from_callback(shape, by_example(mesh), shard)

  return jax.tree.map(put, tree)
