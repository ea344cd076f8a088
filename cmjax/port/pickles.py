"""Pickled checkpoints: bytes -> numpy arrays, without running any code in them.

`machine.Machine` runs the pickle with calls recorded instead of made; `_Decoder` then
turns the recorded calls that build arrays into views of the bytes of the file.
"""

from collections.abc import Callable, Iterator
import mmap
from typing import Any, NamedTuple

import numpy as np

from cmjax.port import arrays
from cmjax.port.machine import STORAGE, STREAM, Machine, RecordedCall

MAGIC = 0x1950A86A20F9469CFC6C  # the first value of torch's format before zip
_PLAIN_TYPES = str, bytes, bool, int, float

ReadStorage = Callable[[str], Any]  # key of a storage -> its bytes


class Module(NamedTuple):
  """A pickled torch module, flattened."""

  class_name: str  # 'EDMPrecond'; '' for torch's own modules
  arguments: dict[str, Any]  # of its constructor; positional ones under 'args'
  tensors: dict[str, np.ndarray]  # parameters and buffers by dotted name


class _Decoder:
  """Turns the recorded calls of one pickle into arrays and Modules."""

  def __init__(
    self,
    machine: Machine,
    read_storage: ReadStorage,
    *,
    file_size: int,
    nested: bool = False,
  ):
    self.machine, self.read_storage, self.nested = machine, read_storage, nested
    self.decoded: dict[int, Any] = {}  # by id: a call that is shared is decoded once
    self.values, self.max_viewed = 0, 2 * file_size
    self.viewed = 0  # bytes

  def decode(self, value: Any, depth: int = 0) -> Any:
    """Replaces the recorded calls in a value, and in the containers it is made of."""
    self._count(depth)
    if isinstance(value, dict):
      return {key: self.decode(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
      items = [self.decode(item, depth + 1) for item in value]
      return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, RecordedCall):
      if id(value) not in self.decoded:
        self.decoded[id(value)] = self._decode_call(value, depth + 1)
      return self.decoded[id(value)]
    if value is not None and type(value) not in _PLAIN_TYPES:
      raise TypeError(f'a value of type {type(value).__name__}')
    return value

  def _count(self, depth: int, values: int = 1):
    self.values += values
    if self.values > arrays.MAX_VALUES or depth > arrays.MAX_DEPTH:
      raise ValueError('too deep, or too many values')

  def _decode_call(self, call: RecordedCall, depth: int) -> Any:
    match type(call).__name__, *call.arguments:
      case 'storage', str(kind), str(key), _, int(numel):
        data, dtype = self.read_storage(key), arrays.STORAGES[_name_of(kind)]
        if len(data) != numel * dtype.itemsize:
          raise ValueError(f'storage {key[:60]} has {len(data)} bytes')
        return data, dtype
      case 'stream', bytes(data) if not self.nested:
        if id(data) not in self.decoded:
          self.decoded[id(data)] = _decode_legacy(data, self.machine, nested=True)
        return self.decoded[id(data)]
      case 'tensor', STORAGE() | STREAM() as storage, offset, shape, strides, *_:
        arguments = self.decode((storage, offset, shape, strides), depth)
        return self._counted_view(arrays.strided(*arguments))
      case 'parameter', data, *_:
        return self.decode(data, depth)
      case ('module',):
        return Module('', {}, arrays.named(self._module_tensors(call, '', depth)))
      case 'persistent', {'class_name': str(name), 'state': dict(state)}:
        arguments = self.decode(state.get('_init_kwargs') or {}, depth)
        if type(arguments) is not dict or not all(type(k) is str for k in arguments):
          raise TypeError('a constructor whose arguments have no names')
        if state.get('_init_args'):
          arguments['args'] = self.decode(state['_init_args'], depth)
        tensors = arrays.named(self._module_tensors(call, '', depth))
        return Module(name, arguments, tensors)
      case 'dtype', name, *_ if not call.state or call.state[1] in ('<', '|', '='):
        return arrays.numeric(name)
      case 'array', *_:
        _, shape, dtype, fortran, data = self.decode(call.state, depth)
        order = 'F' if fortran else 'C'
        return self._counted_view(arrays.contiguous(data, dtype, shape, order))
      case 'buffer', *arguments:
        return self._counted_view(arrays.contiguous(*self.decode(arguments, depth)))
      case 'scalar', dtype, data:
        data = self.decode(data, depth)
        return arrays.contiguous(data, self.decode(dtype, depth), ())[()]
      case 'encode', str(text), 'latin1':
        self._count(depth, len(text) // 16)  # one text may be encoded many times
        return text.encode('latin1')
      case 'set', *items:
        return self.decode(items[0] if items else [], depth)
      case 'size' | 'device', value, *_:
        return self.decode(value, depth)
    raise TypeError(f'{type(call).__name__} with unexpected arguments')

  def _counted_view(self, array: np.ndarray) -> np.ndarray:
    # Many tensors may view one storage, and each of them may be copied later.
    self.viewed += array.nbytes
    if self.viewed > self.max_viewed:
      raise ValueError('tensors of more than twice the size of the file')
    return array

  def _module_tensors(
    self, call: RecordedCall, prefix: str, depth: int
  ) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters and buffers of a module, then those of its children."""
    self._count(depth, 1 + len(prefix) // 16)
    if type(call).__name__ not in ('module', 'persistent'):
      raise TypeError(f'{prefix[:60]} is not a module')
    state = call.arguments[0]['state'] if call.arguments else call.state or {}
    for name, tensor in [*_entries(state, '_parameters'), *_entries(state, '_buffers')]:
      array = self.decode(tensor, depth)
      if not isinstance(array, np.ndarray):
        raise TypeError(f'{prefix[:60]}{name[:60]} is not a tensor')
      yield prefix + name, array
    for name, child in _entries(state, '_modules'):
      yield from self._module_tensors(child, f'{prefix}{name}.', depth + 1)


def _entries(state: dict, key: str) -> list[tuple[str, Any]]:
  return [(name, v) for name, v in state.get(key, {}).items() if v is not None]


def _name_of(storage_kind: str) -> str:
  return storage_kind.removeprefix('torch.')


def _check_end(data: bytes | mmap.mmap, end: int) -> None:
  if end != len(data):
    raise ValueError('more bytes follow the end')


def _decode_legacy(data: bytes, machine: Machine, *, nested: bool) -> Any:
  end, results = 0, []
  for _ in range(5):
    value, end, storages = machine.run(data, end)
    results.append((value, storages))
  (magic, _), _, (system, _), (root, storages), (keys, _) = results
  if magic != MAGIC or not system['little_endian']:
    raise ValueError('not a little-endian file of torch')
  bytes_of: dict[str, memoryview] = {}
  for key in keys:
    if type(key) is not str:
      raise ValueError('a storage whose key is not text')
    kind, _, _, numel = storages[key].arguments
    start = end + 8
    end = start + arrays.count(numel) * arrays.STORAGES[_name_of(kind)].itemsize
    if int.from_bytes(data[start - 8 : start], 'little') != numel or end > len(data):
      raise ValueError('a storage whose length does not fit')
    bytes_of[key] = memoryview(data)[start:end]
  _check_end(data, end)
  if nested and not isinstance(root, STORAGE):
    raise ValueError('a nested file of torch that is not a storage')
  decoder = _Decoder(machine, bytes_of.__getitem__, file_size=len(data), nested=nested)
  return decoder.decode(root)


def read_legacy(data: bytes) -> Any:
  """torch's format before zip: five pickles, then each storage's length and bytes."""
  return _decode_legacy(data, Machine(), nested=False)


def read_member(data: bytes, read_storage: ReadStorage, file_size: int) -> Any:
  """The pickle in a zip of torch, whose storages are other members of the zip."""
  machine = Machine()
  value, end, _ = machine.run(data)
  _check_end(data, end)
  return _Decoder(machine, read_storage, file_size=file_size).decode(value)


def read_pickle(file: Any) -> Any:
  """A pickle of whole objects, in which each tensor is a nested legacy file."""

  def read(start, end):  # a slice of the map would keep its pages in memory as well
    file.seek(start)
    return file.read(end - start)

  machine = Machine()
  with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    value, end, _ = machine.run(data, 0, read)
    _check_end(data, end)
    file_size = len(data)
  return _Decoder(machine, {}.__getitem__, file_size=file_size).decode(value)
