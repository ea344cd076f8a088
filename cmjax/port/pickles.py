"""Pickles of checkpoints: bytes -> numpy arrays; nothing that a pickle says is run.

A pickle is a program. Ours is first walked without running it, so that no size it
claims is believed; then run with a table of the few names that checkpoints use, each
of which makes an inert `Record` of the call instead of the call; then the records that
mean arrays become views of the bytes read.
"""

from collections.abc import Callable, Iterator
import io
import math
import mmap
import pickle
import pickletools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

MOST_OPCODES = 2**19  # of a pickle; one may make 200 bytes, a tensor takes about 100
MOST_TUPLES = 2**16  # hashing nested ones recurses in C, without a guard
MOST_TEXT = 2**24  # bytes of names and source: text may take four times its size
MOST_VALUES = 2**18  # of a file once flattened: shared parts multiply
MOST_NAME = 1000  # letters of a dotted name
MOST_DEPTH = 100
MAGIC = 0x1950A86A20F9469CFC6C  # opens torch's file format before zip
BFLOAT16 = jnp.dtype('bfloat16')
STORAGES = {
  'DoubleStorage': np.dtype('<f8'),
  'FloatStorage': np.dtype('<f4'),
  'HalfStorage': np.dtype('<f2'),
  'BFloat16Storage': BFLOAT16,
  'LongStorage': np.dtype('<i8'),
  'IntStorage': np.dtype('<i4'),
  'ShortStorage': np.dtype('<i2'),
  'CharStorage': np.dtype('i1'),
  'ByteStorage': np.dtype('u1'),
  'BoolStorage': np.dtype('?'),
}
DTYPES = 'float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'uint8', 'bool'


class Module(NamedTuple):
  """A pickled torch module, flattened."""

  class_name: str  # 'EDMPrecond'; '' for torch's own modules
  arguments: dict[str, Any]  # of its constructor, as recorded; positional: 'args'
  tensors: dict[str, np.ndarray]  # parameters and buffers by dotted name


class RefusedError(Exception):
  """A pickle asks for a name that is not on the list."""


class Record:
  """A call that a pickle asks for: kept, not made."""

  __slots__ = ('arguments', 'state')

  def __new__(cls, *arguments):
    """Keeps them."""
    if len(arguments) > 16:  # a long tuple would be copied at each call
      raise ValueError('a call of too many arguments')
    self = super().__new__(cls)
    self.arguments, self.state = arguments, None
    return self

  def __setstate__(self, state):
    """What the pickle wants to be set afterwards."""
    self.state = state


class Dict(dict):
  """OrderedDict and EasyDict: filled item by item, attributes dropped."""

  __slots__ = ('pairs',)

  def __init__(self, pairs=()):
    """Python 2 gave items here; taken later, as one list may be given many times."""
    self.pairs = pairs

  def __setstate__(self, state):
    """Drops it."""


def items(value: dict) -> Iterator[tuple[Any, Any]]:
  """What a pickle put into a dict."""
  if isinstance(value, Dict):
    yield from ((name, part) for name, part in value.pairs)
  yield from value.items()


def record(name: str) -> type[Record]:
  """The kind of Record that stands for a name."""
  return type(name, (Record,), {'__slots__': ()})


TORCH_MODULE = record('module')
STORAGE = record('storage')
STREAM = record('stream')
BUILTINS = str, bytes, bytearray, bool, int, float, complex
GLOBALS = {
  ('collections', 'OrderedDict'): Dict,
  ('dnnlib', 'EasyDict'): Dict,
  ('dnnlib.util', 'EasyDict'): Dict,
  ('builtins', 'set'): record('set'),
  ('__builtin__', 'set'): record('set'),
  ('_codecs', 'encode'): record('encode'),
  ('numpy', 'dtype'): record('dtype'),
  ('numpy', 'ndarray'): record('ndarray'),
  ('torch', 'Size'): record('size'),
  ('torch', 'device'): record('device'),
  ('torch._utils', '_rebuild_parameter'): record('parameter'),
  ('torch._utils', '_rebuild_tensor'): record('tensor'),
  ('torch._utils', '_rebuild_tensor_v2'): record('tensor'),
  ('torch.storage', '_load_from_bytes'): STREAM,
  ('torch_utils.persistence', '_reconstruct_persistent_obj'): record('persistent'),
  **{('torch', name): f'torch.{name}' for name in [*STORAGES, *DTYPES]},
}
for _package in ('numpy.core', 'numpy._core'):
  GLOBALS[f'{_package}.multiarray', '_reconstruct'] = record('array')
  GLOBALS[f'{_package}.multiarray', 'scalar'] = record('scalar')
  GLOBALS[f'{_package}.numeric', '_frombuffer'] = record('buffer')


def _layout(opcode: pickletools.OpcodeInfo) -> tuple[str, int, int, int]:
  """An opcode's name, and its argument: fixed bytes, bytes of its length, lines."""
  n = opcode.arg.n if opcode.arg else 0
  lengths = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
  }
  lines = n == pickletools.UP_TO_NEWLINE and 1 + opcode.arg.name.endswith('pair')
  return opcode.name, max(n, 0), lengths.get(n, 0), int(lines)


OPCODES = {
  ord(opcode.code): _layout(opcode)
  for opcode in pickletools.opcodes
  if not opcode.name.startswith('EXT') and not opcode.name.endswith('_BUFFER')
}
RAW = {'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8'}
PUTS = {'PUT', 'BINPUT', 'LONG_BINPUT'}


def scan(data: bytes | mmap.mmap, at: int = 0) -> int:
  """Walks a pickle without running it -> where it ends.

  Raises: ValueError for a size beyond the bytes that are there, a memo index that no
  pickler writes (the list up to it would be allocated), or too much of anything.
  """
  size, frame, text, tuples = len(data), 0, 0, 0
  for count in range(MOST_OPCODES):
    if at >= size:
      raise ValueError('it ends too early')
    if data[at] not in OPCODES:
      raise ValueError(f'byte {at} is no opcode that a checkpoint uses')
    name, fixed, length, lines = OPCODES[data[at]]
    end = at + 1 + fixed + length
    if length:
      end += int.from_bytes(data[end - length : end], 'little')
    for _ in range(lines):
      end = data.find(b'\n', end) + 1 or size + 1
    if end > size or at < frame < end:
      raise ValueError(f'{name} at byte {at} is longer than what is there')
    if (length or lines) and name not in RAW:
      text += end - at
    if name in PUTS:
      argument = data[at + 1 : end]
      index = int(argument) if lines else int.from_bytes(argument, 'little')
      if index > count:
        raise ValueError(f'{name} at byte {at} has index {index}')
    elif name == 'FRAME':
      if at < frame:
        raise ValueError(f'FRAME at byte {at} is within another')
      frame = end + int.from_bytes(data[at + 1 : end], 'little')
      if frame > size:
        raise ValueError(f'FRAME at byte {at} is longer than what is there')
    tuples += name.startswith('TUPLE')
    if text > MOST_TEXT or tuples > MOST_TUPLES:
      raise ValueError('too much text, or too many tuples')
    if name == 'STOP':
      return end
    at = end
  raise ValueError(f'more than {MOST_OPCODES} opcodes')


class _Unpickler(pickle.Unpickler):
  """Makes Records of the names on the list, and refuses every other name."""

  def __init__(self, file: Any):
    super().__init__(file)
    self.storages = {}  # by key, as they are met

  def find_class(self, module: str, name: str) -> Any:
    if module.startswith('torch.nn.modules.'):
      return TORCH_MODULE
    if (module, name) not in GLOBALS:
      raise RefusedError(f'{module}.{name}')
    return GLOBALS[module, name]

  def persistent_load(self, pid: Any) -> Any:
    if type(pid) is tuple and pid[:2] == ('module', TORCH_MODULE):
      return TORCH_MODULE  # the older format puts a class here, with its source
    if type(pid) is not tuple or pid[0] != 'storage' or pid[5:] not in ((), (None,)):
      raise ValueError('a persistent id that is not a whole storage')
    storage = STORAGE(*pid[1:5])
    if self.storages.setdefault(pid[2], storage).arguments != storage.arguments:
      raise ValueError('two storages of one key')
    return self.storages[pid[2]]


def count(value: Any) -> int:
  """The value, if it is a whole number and not negative."""
  if type(value) is not int or value < 0:
    raise ValueError('a size that is not a whole number from 0')
  return value


def numeric(name: Any) -> np.dtype:
  """A dtype of numbers by its name; raises ValueError for any other."""
  dtype = None
  if type(name) is str and len(name) <= 16:
    dtype = BFLOAT16 if name == 'bfloat16' else np.dtype(name)
  if dtype is None or not (dtype == BFLOAT16 or dtype.kind in 'biufc'):
    raise ValueError('an array that is not of little-endian numbers')
  return dtype


def named(tensors: Iterator[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """As a dict; raises ValueError for a name that is there twice, or too long."""
  found = {}
  for name, array in tensors:
    if name in found or len(name) > MOST_NAME:
      raise ValueError(f'the name {name[:60]} is there twice, or too long')
    found[name] = array
  return found


class Meaning:
  """What the records of one pickle stand for; `raw` has the storages' bytes by key."""

  def __init__(self, raw: Callable[[str], Any], nested: bool = False):
    self.raw, self.nested = raw, nested
    self.known, self.values = {}, 0

  def _visit(self, depth: int, values: int = 1):
    self.values += values
    if self.values > MOST_VALUES or depth > MOST_DEPTH:
      raise ValueError('too deep, or too many values')

  def plain(self, value: Any, depth: int = 0) -> Any:
    """Records, and containers of them, as arrays, Modules and builtins."""
    self._visit(depth)
    if isinstance(value, dict):
      return {
        self.plain(key, depth + 1): self.plain(part, depth + 1)
        for key, part in items(value)
      }
    if isinstance(value, list | tuple | set | frozenset):
      parts = [self.plain(part, depth + 1) for part in value]
      return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, Record):
      if id(value) not in self.known:
        self.known[id(value)] = self._meaning(value, depth + 1)
      return self.known[id(value)]
    if value is not None and type(value) not in BUILTINS:
      raise TypeError(f'a value that is {type(value).__name__}')
    return value

  def _meaning(self, value: Record, depth: int) -> Any:
    match type(value).__name__, *value.arguments:
      case 'storage', str(kind), str(key), _, int(numel):
        raw, dtype = self.raw(key), STORAGES[kind.removeprefix('torch.')]
        if len(raw) != numel * dtype.itemsize:
          raise ValueError(f'storage {key[:60]} has {len(raw)} bytes')
        return raw, dtype
      case 'stream', bytes(data) if not self.nested:
        if id(data) not in self.known:
          self.known[id(data)] = read_legacy(data, nested=True)
        return self.known[id(data)]
      case 'tensor', STORAGE() | STREAM() as storage, offset, shape, strides, *_:
        return _tensor(*self.plain((storage, offset, shape, strides), depth))
      case 'parameter', data, *_:
        return self.plain(data, depth)
      case ('module',):
        return Module('', {}, named(self._walk(value, '', depth)))
      case 'persistent', {'class_name': str(name), 'state': dict(state)}:
        arguments = dict(self.plain(state.get('_init_kwargs') or {}, depth))
        if state.get('_init_args'):
          arguments['args'] = self.plain(state['_init_args'], depth)
        return Module(name, arguments, named(self._walk(value, '', depth)))
      case 'dtype', name, *_ if not value.state or value.state[1] in ('<', '|', '='):
        return numeric(name)
      case 'array', *_:
        _, shape, dtype, fortran, data = self.plain(value.state, depth)
        return array_of(data, dtype, shape, 'F' if fortran else 'C')
      case 'buffer', *arguments:
        return array_of(*self.plain(arguments, depth))
      case 'scalar', dtype, data:
        return array_of(self.plain(data, depth), self.plain(dtype, depth), ())[()]
      case 'encode', str(text), 'latin1':
        self._visit(depth, len(text) // 16)  # one text may be encoded many times
        return text.encode('latin1')
      case 'set', *parts:
        return self.plain(parts[0] if parts else [], depth)
      case 'size' | 'device', part, *_:
        return self.plain(part, depth)
    raise TypeError(f'{type(value).__name__} of unknown arguments')

  def _walk(self, value: Record, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    """A module's parameters and buffers, then its children's."""
    self._visit(depth, 1 + len(prefix) // 16)
    if type(value).__name__ not in ('module', 'persistent'):
      raise TypeError(f'{prefix[:60]} is not a module')
    state = value.arguments[0]['state'] if value.arguments else value.state or {}
    for name, tensor in [*_part(state, '_parameters'), *_part(state, '_buffers')]:
      array = self.plain(tensor, depth)
      if not isinstance(array, np.ndarray):
        raise TypeError(f'{prefix[:60]}{name[:60]} is not a tensor')
      yield prefix + name, array
    for name, child in _part(state, '_modules'):
      yield from self._walk(child, f'{prefix}{name}.', depth + 1)


def _part(state: dict, part: str) -> list[tuple[str, Any]]:
  return [(name, v) for name, v in items(state.get(part, {})) if v is not None]


def _tensor(storage: tuple, offset: int, shape: tuple, strides: tuple) -> np.ndarray:
  """A view of a storage; refuses one beyond it, and one that has more elements."""
  raw, dtype = storage
  shape, strides = [count(n) for n in shape], [count(n) for n in strides]
  if not math.prod(shape):
    return np.frombuffer(b'', dtype).reshape(shape)
  last = count(offset) + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  if max(last + 1, math.prod(shape)) * dtype.itemsize > len(raw):
    raise ValueError('a tensor larger than its storage')
  strides = [n * dtype.itemsize for n in strides]
  return np.ndarray(shape, dtype, raw, offset * dtype.itemsize, strides)


def array_of(data: bytes, dtype: np.dtype, shape: Any, order: str = 'C') -> np.ndarray:
  """A view of the bytes, all of them."""
  if not isinstance(data, bytes | bytearray) or not isinstance(dtype, np.dtype):
    raise TypeError('an array without bytes')
  return np.frombuffer(data, dtype).reshape([count(n) for n in shape], order=order)


def load(file: Any, raw: Callable[[str], Any]) -> Any:
  """The value of a pickle that `scan` has passed; `raw` as of `Meaning`."""
  return Meaning(raw).plain(_Unpickler(file).load())


def read_legacy(data: bytes, nested: bool = False) -> Any:
  """torch's format before zip: five pickles, then each storage's length and bytes."""
  at, parts, file = 0, [], io.BytesIO(data)
  for _ in range(5):
    end = scan(data, at)
    file.seek(at)
    unpickler = _Unpickler(file)
    parts.append((unpickler.load(), unpickler.storages))
    at = end
  (magic, _), _, (system, _), (root, storages), (keys, _) = parts
  if magic != MAGIC or not system['little_endian']:
    raise ValueError('not a little-endian stream of torch')
  raw = {}
  for key in keys:
    kind, _, _, numel = storages[key].arguments
    start = at + 8
    at = start + count(numel) * STORAGES[kind.removeprefix('torch.')].itemsize
    if int.from_bytes(data[start - 8 : start], 'little') != numel or at > len(data):
      raise ValueError('a storage of another length')
    raw[key] = memoryview(data)[start:at]
  if at != len(data):
    raise ValueError('something follows its end')
  if nested and not isinstance(root, STORAGE):
    raise ValueError('a stream that is not a storage')
  return Meaning(raw.__getitem__, nested).plain(root)


def read_pickle(file: Any) -> Any:
  """A pickle of whole objects, each tensor a small stream of torch's older format."""
  with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    if scan(data) != len(data):
      raise ValueError('something follows its end')
  file.seek(0)
  return load(file, {}.__getitem__)
