"""Pickles of checkpoints: bytes -> numpy arrays; nothing that a pickle says is run.

A pickle is a program for a stack machine. `Machine` runs it with inert values: a name
must be on a short list, a call becomes a `Record` of the call, a set becomes a list,
and only text and small whole numbers are keys, so nothing is hashed or compared that
was not checked, and no size is believed. Then the records that mean arrays become
views of the bytes read.
"""

from collections.abc import Callable, Iterator
import math
import mmap
import pickletools
import struct
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

MOST_OPCODES = 2**20  # of a file; one makes 64 bytes, a tensor takes about 200
MOST_TEXT = 2**24  # bytes of names and source: text may take four times its size
MOST_NUMBERS = 2**14  # keys that are numbers: their hashes can be made to collide
MOST_VALUES = 2**18  # of a file once flattened: shared parts multiply
MOST_NAME = 1000  # letters of a dotted name
MOST_DEPTH = 100
MOST_AXES = 32
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

  def __init__(self, arguments: tuple):
    self.arguments, self.state = arguments, None


def record(name: str) -> type[Record]:
  """The kind of Record that stands for a name."""
  return type(name, (Record,), {'__slots__': ()})


TORCH_MODULE = record('module')
STORAGE = record('storage')
STREAM = record('stream')
BUILTINS = str, bytes, bool, int, float
GLOBALS = {
  ('collections', 'OrderedDict'): dict,
  ('dnnlib', 'EasyDict'): dict,
  ('dnnlib.util', 'EasyDict'): dict,
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


def _unsigned(raw: bytes) -> int:
  return int.from_bytes(raw, 'little')


def _signed(raw: bytes) -> int:
  return int.from_bytes(raw, 'little', signed=True)


def _ascii(raw: bytes) -> str:
  return raw.decode('ascii')


def _utf8(raw: bytes) -> str:
  return raw.decode('utf-8', 'surrogatepass')


def _short_number(raw: bytes) -> int:
  """Python 2 wrote numbers of more than 32 bits in decimal."""
  if len(raw) > 24:
    raise ValueError('a number of too many digits')
  return int(raw)


# Opcodes that put a value on the stack, by their arguments.
VALUES = {
  'NONE': lambda raw: None,
  'NEWTRUE': lambda raw: True,
  'NEWFALSE': lambda raw: False,
  'BININT': _signed,
  'BININT1': _unsigned,
  'BININT2': _unsigned,
  'LONG1': _signed,
  'INT': _short_number,
  'BINFLOAT': lambda raw: struct.unpack('>d', raw)[0],
  'BINSTRING': _ascii,
  'SHORT_BINSTRING': _ascii,
  'BINUNICODE': _utf8,
  'SHORT_BINUNICODE': _utf8,
  'BINUNICODE8': _utf8,
  'BINBYTES': bytes,
  'SHORT_BINBYTES': bytes,
  'BINBYTES8': bytes,
  'BYTEARRAY8': bytes,
  'EMPTY_LIST': lambda raw: [],
  'EMPTY_SET': lambda raw: [],
  'EMPTY_DICT': lambda raw: {},
  'EMPTY_TUPLE': lambda raw: (),
}
RAW = 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8'
# The others that picklers of protocols 2 to 5 write, by what they are for.
STACK = 'PROTO', 'FRAME', 'STOP', 'MARK', 'POP', 'POP_MARK'
MEMO = 'MEMOIZE', 'BINPUT', 'LONG_BINPUT', 'BINGET', 'LONG_BINGET'
PARTS = 'APPEND', 'APPENDS', 'ADDITEMS', 'FROZENSET', 'SETITEM', 'SETITEMS'
TUPLES = 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3'
CALLS = 'GLOBAL', 'STACK_GLOBAL', 'REDUCE', 'NEWOBJ', 'BUILD', 'BINPERSID'
OPCODES = {
  ord(opcode.code): _layout(opcode)
  for opcode in pickletools.opcodes
  if opcode.name in {*VALUES, *STACK, *MEMO, *PARTS, *TUPLES, *CALLS}
}


class Machine:
  """Runs the pickles of one file; what it counts is of all of them together."""

  def __init__(self, size: int):
    self.size = size  # bytes of the file
    self.opcodes = self.text = self.numbers = self.viewed = 0

  def run(
    self,
    data: bytes | mmap.mmap,
    at: int = 0,
    read: Callable[[int, int], bytes] | None = None,
  ) -> tuple[Any, int, dict[str, Record]]:
    """One pickle -> its value, where it ends, and its storages by key.

    Args:
      data: holds the pickle.
      at: where it begins.
      read: (begin, end) -> those bytes of `data`; a slice of it by default.

    Raises: RefusedError for a name that is not on the list; ValueError or what Python
      raises for a size beyond the bytes that are there, too much of anything, or what
      no pickler of a checkpoint writes.
    """
    stack, marks, memo, storages = [], [], [], {}

    def since_mark():
      start = marks.pop()
      parts = stack[start:]
      del stack[start:]
      return parts

    while True:
      name, raw, at = self._next(data, at, read)
      if name in VALUES:
        stack.append(VALUES[name](raw))
        continue
      match name:
        case 'MEMOIZE':
          memo.append(stack[-1])
        case 'BINPUT' | 'LONG_BINPUT':
          index = _unsigned(raw)
          if index > self.opcodes:  # no pickler writes it, and room would be made
            raise ValueError(f'{name} has index {index}')
          memo.extend([None] * (index + 1 - len(memo)))
          memo[index] = stack[-1]
        case 'BINGET' | 'LONG_BINGET':
          stack.append(memo[_unsigned(raw)])
        case 'MARK':
          marks.append(len(stack))
        case 'POP_MARK':
          since_mark()
        case 'POP':
          stack.pop()
        case 'TUPLE':
          stack.append(tuple(since_mark()))
        case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
          stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
        case 'FROZENSET':
          stack.append(since_mark())
        case 'APPEND':
          _extend(stack[-2], [stack.pop()])
        case 'APPENDS' | 'ADDITEMS':
          parts = since_mark()
          _extend(stack[-1], parts)
        case 'SETITEM':
          key, value = stack[-2:]
          del stack[-2:]
          self._fill(stack[-1], [(key, value)])
        case 'SETITEMS':
          parts = since_mark()
          self._fill(stack[-1], zip(parts[::2], parts[1::2], strict=True))
        case 'GLOBAL':
          stack.append(find_class(*_utf8(raw).split('\n')[:2]))
        case 'STACK_GLOBAL':
          stack[-2:] = [find_class(*stack[-2:])]
        case 'REDUCE' | 'NEWOBJ':
          arguments = stack.pop()
          stack[-1] = self._call(stack[-1], arguments)
        case 'BUILD':
          state = stack.pop()
          if isinstance(stack[-1], Record):
            stack[-1].state = state
          elif type(stack[-1]) is not dict:  # whose attributes are dropped
            raise ValueError('a state is set on a value that is not an object')
        case 'BINPERSID':
          stack[-1] = _storage(stack[-1], storages)
        case 'STOP':
          return stack.pop(), at, storages

  def _next(
    self, data: bytes | mmap.mmap, at: int, read: Callable | None
  ) -> tuple[str, bytes, int]:
    """The opcode at a place, its argument, and where it ends."""
    size = len(data)
    if at >= size:
      raise ValueError('it ends too early')
    if data[at] not in OPCODES:
      raise ValueError(f'byte {at} is no opcode that a checkpoint uses')
    name, fixed, length, lines = OPCODES[data[at]]
    start = at + 1 + length
    end = start + fixed
    if length:
      end += int.from_bytes(data[at + 1 : start], 'little')
    for _ in range(lines):
      end = data.find(b'\n', end) + 1 or size + 1
    if end > size:
      raise ValueError(f'{name} at byte {at} is longer than what is there')
    self.opcodes += 1
    if (length or lines) and name not in RAW:
      self.text += end - at
    if self.opcodes > MOST_OPCODES or self.text > MOST_TEXT:
      raise ValueError(f'more than {MOST_OPCODES} opcodes, or too much text')
    if end - start > 2**16 and read:
      return name, read(start, end), end
    return name, data[start:end], end

  def _fill(self, target: Any, pairs: Any) -> None:
    """Sets items of a dict, if the keys are text or small whole numbers."""
    if type(target) is not dict:
      raise ValueError('items are set on a value that is not a dict')
    for key, value in pairs:
      self.numbers += type(key) is int
      small = type(key) is int and abs(key) < 2**60 and self.numbers <= MOST_NUMBERS
      if not small and type(key) not in (str, bytes):
        raise ValueError('a key that is not text, or too many or too large numbers')
      target[key] = value

  def _call(self, function: Any, arguments: Any) -> Any:
    """A Record of a call, or the dict that it makes."""
    known = type(function) is type and type(arguments) is tuple
    if not known or len(arguments) > 16:
      raise ValueError('a call that no checkpoint makes')
    if function is not dict:
      return function(arguments)
    found = {}
    if arguments:  # Python 2 gave items here
      self.opcodes += len(arguments[0])  # one list may be given many times
      if type(arguments[0]) is not list or self.opcodes > MOST_OPCODES:
        raise ValueError('items that are not a list, or too many')
      self._fill(found, arguments[0])
    return found


def _extend(target: Any, parts: list) -> None:
  if type(target) is not list:
    raise ValueError('parts are added to a value that is not a list')
  target.extend(parts)


def find_class(module: Any, name: Any) -> Any:
  """What stands for a name on the list; raises RefusedError for every other."""
  if type(module) is not str or type(name) is not str:
    raise ValueError('a name that is not text')
  if module.startswith('torch.nn.modules.'):
    return TORCH_MODULE
  if (module, name) not in GLOBALS:
    raise RefusedError(f'{module}.{name}')
  return GLOBALS[module, name]


def _storage(pid: Any, storages: dict[str, Record]) -> Any:
  """What a persistent id stands for; new storages are added to those by key."""
  if type(pid) is tuple and pid[:2] == ('module', TORCH_MODULE):
    return TORCH_MODULE  # the older format puts a class here, with its source
  kinds = [type(part) for part in pid] if type(pid) is tuple else []
  whole = kinds[:5] == [str, str, str, str, int] and pid[5:] in ((), (None,))
  if not whole or pid[0] != 'storage':
    raise ValueError('a persistent id that is not a whole storage')
  storage = storages.setdefault(pid[2], STORAGE(pid[1:5]))
  if storage.arguments != pid[1:5]:
    raise ValueError('two storages of one key')
  return storage


def count(value: Any) -> int:
  """The value, if it is a whole number in [0, 2^63)."""
  if type(value) is not int or not 0 <= value < 2**63:
    raise ValueError('a size that is not a whole number from 0')
  return value


def counts(values: Any) -> list[int]:
  """A shape, or strides; raises ValueError for more axes than any array has."""
  if len(values) > MOST_AXES:
    raise ValueError(f'an array of more than {MOST_AXES} axes')
  return [count(value) for value in values]


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

  def __init__(self, raw: Callable[[str], Any], machine: Machine, nested: bool = False):
    self.raw, self.machine, self.nested = raw, machine, nested
    self.known, self.values = {}, 0

  def _visit(self, depth: int, values: int = 1):
    self.values += values
    if self.values > MOST_VALUES or depth > MOST_DEPTH:
      raise ValueError('too deep, or too many values')

  def plain(self, value: Any, depth: int = 0) -> Any:
    """Records, and containers of them, as arrays, Modules and builtins."""
    self._visit(depth)
    if isinstance(value, dict):
      return {key: self.plain(part, depth + 1) for key, part in value.items()}
    if isinstance(value, list | tuple):
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
          self.known[id(data)] = read_legacy(data, self.machine, nested=True)
        return self.known[id(data)]
      case 'tensor', STORAGE() | STREAM() as storage, offset, shape, strides, *_:
        parts = self.plain((storage, offset, shape, strides), depth)
        return self._view(_tensor(*parts))
      case 'parameter', data, *_:
        return self.plain(data, depth)
      case ('module',):
        return Module('', {}, named(self._walk(value, '', depth)))
      case 'persistent', {'class_name': str(name), 'state': dict(state)}:
        arguments = self.plain(state.get('_init_kwargs') or {}, depth)
        if type(arguments) is not dict or not all(type(k) is str for k in arguments):
          raise TypeError('a constructor without names of its arguments')
        if state.get('_init_args'):
          arguments['args'] = self.plain(state['_init_args'], depth)
        return Module(name, arguments, named(self._walk(value, '', depth)))
      case 'dtype', name, *_ if not value.state or value.state[1] in ('<', '|', '='):
        return numeric(name)
      case 'array', *_:
        _, shape, dtype, fortran, data = self.plain(value.state, depth)
        return self._view(array_of(data, dtype, shape, 'F' if fortran else 'C'))
      case 'buffer', *arguments:
        return self._view(array_of(*self.plain(arguments, depth)))
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

  def _view(self, array: np.ndarray) -> np.ndarray:
    # One storage may be viewed by many tensors, each of which may be copied later.
    self.machine.viewed += array.nbytes
    if self.machine.viewed > 2 * self.machine.size:
      raise ValueError('tensors of more bytes than twice those of the file')
    return array

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
  return [(name, v) for name, v in state.get(part, {}).items() if v is not None]


def _tensor(storage: tuple, offset: int, shape: tuple, strides: tuple) -> np.ndarray:
  """A view of a storage; refuses one beyond it, and one that has more elements."""
  raw, dtype = storage
  shape, strides = counts(shape), counts(strides)
  if not math.prod(shape):
    return np.frombuffer(b'', dtype).reshape(shape)
  last = count(offset) + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  if max(last + 1, math.prod(shape)) * dtype.itemsize > len(raw):
    raise ValueError('a tensor larger than its storage')
  strides = [n * dtype.itemsize for n in strides]
  return np.ndarray(shape, dtype, raw, offset * dtype.itemsize, strides)


def array_of(data: bytes, dtype: np.dtype, shape: Any, order: str = 'C') -> np.ndarray:
  """A view of the bytes, all of them."""
  if not isinstance(data, bytes) or not isinstance(dtype, np.dtype):
    raise TypeError('an array without bytes')
  return np.frombuffer(data, dtype).reshape(counts(shape), order=order)


def read_legacy(data: bytes, machine: Machine, nested: bool = False) -> Any:
  """torch's format before zip: five pickles, then each storage's length and bytes."""
  at, parts = 0, []
  for _ in range(5):
    value, at, storages = machine.run(data, at)
    parts.append((value, storages))
  (magic, _), _, (system, _), (root, storages), (keys, _) = parts
  if magic != MAGIC or not system['little_endian']:
    raise ValueError('not a little-endian stream of torch')
  raw = {}
  for key in keys:
    if type(key) is not str:
      raise ValueError('a storage whose key is not text')
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
  return Meaning(raw.__getitem__, machine, nested).plain(root)


def read_whole(data: bytes, raw: Callable[[str], Any], machine: Machine) -> Any:
  """One pickle that is all of the bytes; `raw` as of `Meaning`."""
  value, end, _ = machine.run(data)
  if end != len(data):
    raise ValueError('something follows its end')
  return Meaning(raw, machine).plain(value)


def read_pickle(file: Any) -> Any:
  """A pickle of whole objects, each tensor a small stream of torch's older format."""

  def read(start, end):  # as a copy of mapped bytes would keep both in memory
    file.seek(start)
    return file.read(end - start)

  with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    machine = Machine(len(data))
    value, end, _ = machine.run(data, 0, read)
    if end != len(data):
      raise ValueError('something follows its end')
  return Meaning({}.__getitem__, machine).plain(value)
