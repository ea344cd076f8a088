"""The stack machine of pickles, run on inert values: calls are recorded, not made.

A pickle is a program. A name must be on the list `GLOBALS`; a call becomes a
`RecordedCall`; a set becomes a list; and only text, bytes and small whole numbers may
be keys, so that hashing and comparing values is safe. Sizes and counts are bounded.
"""

from collections.abc import Callable
import mmap
from typing import Any

from cmjax.port.arrays import STORAGES
from cmjax.port.opcodes import BYTES, OPCODES, VALUES, unsigned, utf8

MAX_OPCODES = 2**20  # of a file; each makes at most 64 bytes, a tensor takes about 200
MAX_TEXT = 2**24  # bytes of names and source: decoded text may take four times as much
MAX_NUMBERS = 2**14  # keys that are numbers, whose hashes can be made to collide
DTYPES = 'float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'uint8', 'bool'


class RefusedError(Exception):
  """A pickle names a class or function that is not on the list."""


class RecordedCall:
  """A call in a pickle: recorded, never made."""

  __slots__ = ('arguments', 'state')

  def __init__(self, arguments: tuple):
    self.arguments = arguments
    self.state: Any = None


def recorded(name: str) -> type[RecordedCall]:
  """The type that records the calls of a function or class."""
  return type(name, (RecordedCall,), {'__slots__': ()})


TORCH_MODULE = recorded('module')
STORAGE = recorded('storage')
STREAM = recorded('stream')
GLOBALS: dict[tuple[str, str], Any] = {
  ('collections', 'OrderedDict'): dict,
  ('dnnlib', 'EasyDict'): dict,
  ('dnnlib.util', 'EasyDict'): dict,
  ('builtins', 'set'): recorded('set'),
  ('__builtin__', 'set'): recorded('set'),
  ('_codecs', 'encode'): recorded('encode'),
  ('numpy', 'dtype'): recorded('dtype'),
  ('numpy', 'ndarray'): recorded('ndarray'),
  ('torch', 'Size'): recorded('size'),
  ('torch', 'device'): recorded('device'),
  ('torch._utils', '_rebuild_parameter'): recorded('parameter'),
  ('torch._utils', '_rebuild_tensor'): recorded('tensor'),
  ('torch._utils', '_rebuild_tensor_v2'): recorded('tensor'),
  ('torch.storage', '_load_from_bytes'): STREAM,
  ('torch_utils.persistence', '_reconstruct_persistent_obj'): recorded('persistent'),
  **{('torch', name): f'torch.{name}' for name in [*STORAGES, *DTYPES]},
}
for _package in ('numpy.core', 'numpy._core'):
  GLOBALS[f'{_package}.multiarray', '_reconstruct'] = recorded('array')
  GLOBALS[f'{_package}.multiarray', 'scalar'] = recorded('scalar')
  GLOBALS[f'{_package}.numeric', '_frombuffer'] = recorded('buffer')


class Machine:
  """Runs the pickles of one file, and counts what all of them use together."""

  def __init__(self):
    self.opcodes = self.text_bytes = self.number_keys = 0

  def run(
    self,
    data: bytes | mmap.mmap,
    at: int = 0,
    read: Callable[[int, int], bytes] | None = None,
  ) -> tuple[Any, int, dict[str, RecordedCall]]:
    """Runs one pickle and returns its value, its end, and its storages by key.

    Args:
      data: bytes that contain the pickle.
      at: index of its first byte.
      read: (start, end) -> those bytes of `data`, used for large arguments; a slice of
        `data` by default.

    Raises: RefusedError for a name that is not on the list; ValueError, or any other
      exception of Python's, for a damaged pickle, for one that exceeds a limit, or for
      what no pickler of a checkpoint writes.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []
    storages: dict[str, RecordedCall] = {}

    def pop_to_mark():
      start = marks.pop()
      items = stack[start:]
      del stack[start:]
      return items

    while True:
      name, raw, at = self._next(data, at, read)
      if name in VALUES:
        stack.append(VALUES[name](raw))
        continue
      match name:
        case 'MEMOIZE':
          memo.append(stack[-1])
        case 'BINPUT' | 'LONG_BINPUT':
          index = unsigned(raw)
          if index > self.opcodes:  # no pickler writes it, and the memo would grow
            raise ValueError(f'{name} has index {index}')
          memo.extend([None] * (index + 1 - len(memo)))
          memo[index] = stack[-1]
        case 'BINGET' | 'LONG_BINGET':
          stack.append(memo[unsigned(raw)])
        case 'MARK':
          marks.append(len(stack))
        case 'POP_MARK':
          pop_to_mark()
        case 'POP':
          stack.pop()
        case 'TUPLE':
          stack.append(tuple(pop_to_mark()))
        case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
          stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
        case 'FROZENSET':
          stack.append(pop_to_mark())
        case 'APPEND':
          _extend(stack[-2], [stack.pop()])
        case 'APPENDS' | 'ADDITEMS':
          items = pop_to_mark()
          _extend(stack[-1], items)
        case 'SETITEM':
          key, value = stack[-2:]
          del stack[-2:]
          self._set_items(stack[-1], [(key, value)])
        case 'SETITEMS':
          items = pop_to_mark()
          self._set_items(stack[-1], zip(items[::2], items[1::2], strict=True))
        case 'GLOBAL':
          stack.append(_find_class(*utf8(raw).split('\n')[:2]))
        case 'STACK_GLOBAL':
          stack[-2:] = [_find_class(*stack[-2:])]
        case 'REDUCE' | 'NEWOBJ':
          arguments = stack.pop()
          stack[-1] = self._call(stack[-1], arguments)
        case 'BUILD':
          state = stack.pop()
          if isinstance(stack[-1], RecordedCall):
            stack[-1].state = state
          elif type(stack[-1]) is not dict:  # attributes of a dict are dropped
            raise ValueError('a state is set on a value that is not an object')
        case 'BINPERSID':
          stack[-1] = _storage(stack[-1], storages)
        case 'STOP':
          return stack.pop(), at, storages

  def _next(
    self, data: bytes | mmap.mmap, at: int, read: Callable | None
  ) -> tuple[str, bytes, int]:
    """The name and argument of the opcode at an index, and the index of the next."""
    size = len(data)
    if at >= size:
      raise ValueError('unexpected end')
    if data[at] not in OPCODES:
      raise ValueError(f'byte {at} is not an opcode that checkpoints use')
    name, fixed, length, lines = OPCODES[data[at]]
    start = at + 1 + length
    end = start + fixed
    if length:
      end += int.from_bytes(data[at + 1 : start], 'little')
    for _ in range(lines):
      end = data.find(b'\n', end) + 1 or size + 1
    if end > size:
      raise ValueError(f'{name} at byte {at} exceeds the file')
    self.opcodes += 1
    if (length or lines) and name not in BYTES:
      self.text_bytes += end - at
    if self.opcodes > MAX_OPCODES or self.text_bytes > MAX_TEXT:
      raise ValueError(f'more than {MAX_OPCODES} opcodes, or too much text')
    if end - start > 2**16 and read:
      return name, read(start, end), end
    return name, data[start:end], end

  def _set_items(self, target: Any, pairs: Any) -> None:
    """Sets items of a dict; raises ValueError for keys that are unsafe to hash."""
    if type(target) is not dict:
      raise ValueError('items are set on a value that is not a dict')
    for key, value in pairs:
      self.number_keys += type(key) is int
      small = type(key) is int and abs(key) < 2**60 and self.number_keys <= MAX_NUMBERS
      if not small and type(key) not in (str, bytes):
        raise ValueError(
          'a key that is not text, or too many or too large numbers as keys'
        )
      target[key] = value

  def _call(self, function: Any, arguments: Any) -> Any:
    """A RecordedCall, or the dict that a call of `dict` makes."""
    valid = type(function) is type and type(arguments) is tuple
    if not valid or len(arguments) > 16:
      raise ValueError('a call that no checkpoint makes')
    if function is not dict:
      return function(arguments)
    result: dict[Any, Any] = {}
    if arguments:  # Python 2 pickles the items of an OrderedDict as an argument
      self.opcodes += len(arguments[0])  # one list may be passed many times
      if type(arguments[0]) is not list or self.opcodes > MAX_OPCODES:
        raise ValueError('items that are not a list, or too many items')
      self._set_items(result, arguments[0])
    return result


def _extend(target: Any, items: list) -> None:
  if type(target) is not list:
    raise ValueError('items are added to a value that is not a list')
  target.extend(items)


def _find_class(module: Any, name: Any) -> Any:
  """The inert value of a name on the list; raises RefusedError for any other."""
  if type(module) is not str or type(name) is not str:
    raise ValueError('a name that is not text')
  if module.startswith('torch.nn.modules.'):
    return TORCH_MODULE
  if (module, name) not in GLOBALS:
    raise RefusedError(f'{module}.{name}')
  return GLOBALS[module, name]


def _storage(pid: Any, storages: dict[str, RecordedCall]) -> Any:
  """The storage of a persistent id, which is added to `storages` if new."""
  if type(pid) is tuple and pid[:2] == ('module', TORCH_MODULE):
    return TORCH_MODULE  # the legacy format stores classes with their source
  kinds = [type(part) for part in pid] if type(pid) is tuple else []
  valid = kinds[:5] == [str, str, str, str, int] and pid[5:] in ((), (None,))
  if not valid or pid[0] != 'storage':
    raise ValueError('a persistent id that is not a storage')
  storage = storages.setdefault(pid[2], STORAGE(pid[1:5]))
  if storage.arguments != pid[1:5]:
    raise ValueError('two storages with the same key')
  return storage
