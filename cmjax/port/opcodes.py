"""The opcodes of pickles that checkpoints use, and how to read their arguments."""

from collections.abc import Callable
import pickletools
import struct
from typing import Any, NamedTuple


class Opcode(NamedTuple):
  """An opcode and the size of its argument: at most one of the three is not 0."""

  name: str
  fixed: int  # bytes of an argument of fixed length
  length: int  # bytes of the length that precedes an argument
  lines: int  # lines of an argument in text


def _opcode(info: pickletools.OpcodeInfo) -> Opcode:
  n = info.arg.n if info.arg else 0
  lengths = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
  }
  lines = 0
  if info.arg and n == pickletools.UP_TO_NEWLINE:
    lines = 1 + info.arg.name.endswith('pair')
  return Opcode(info.name, max(n, 0), lengths.get(n, 0), lines)


def unsigned(raw: bytes) -> int:
  """Little-endian bytes -> int >= 0."""
  return int.from_bytes(raw, 'little')


def _signed(raw: bytes) -> int:
  return int.from_bytes(raw, 'little', signed=True)


def _ascii(raw: bytes) -> str:
  return raw.decode('ascii')


def utf8(raw: bytes) -> str:
  """Decodes UTF-8, in which pickles may have lone surrogates."""
  return raw.decode('utf-8', 'surrogatepass')


def _decimal(raw: bytes) -> int:
  """Python 2 writes numbers of more than 32 bits in decimal."""
  if len(raw) > 24:
    raise ValueError('a number with too many digits')
  return int(raw)


# Opcodes that push a value: the function that decodes their argument.
VALUES: dict[str, Callable[[bytes], Any]] = {
  'NONE': lambda raw: None,
  'NEWTRUE': lambda raw: True,
  'NEWFALSE': lambda raw: False,
  'BININT': _signed,
  'BININT1': unsigned,
  'BININT2': unsigned,
  'LONG1': _signed,
  'INT': _decimal,
  'BINFLOAT': lambda raw: struct.unpack('>d', raw)[0],
  'BINSTRING': _ascii,
  'SHORT_BINSTRING': _ascii,
  'BINUNICODE': utf8,
  'SHORT_BINUNICODE': utf8,
  'BINUNICODE8': utf8,
  'BINBYTES': bytes,
  'SHORT_BINBYTES': bytes,
  'BINBYTES8': bytes,
  'BYTEARRAY8': bytes,
  'EMPTY_LIST': lambda raw: [],
  'EMPTY_SET': lambda raw: [],
  'EMPTY_DICT': lambda raw: {},
  'EMPTY_TUPLE': lambda raw: (),
}
BYTES = 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8'
# The other opcodes that picklers of protocols 2 to 5 write.
_STACK = 'PROTO', 'FRAME', 'STOP', 'MARK', 'POP', 'POP_MARK'
_MEMO = 'MEMOIZE', 'BINPUT', 'LONG_BINPUT', 'BINGET', 'LONG_BINGET'
_ITEMS = 'APPEND', 'APPENDS', 'ADDITEMS', 'FROZENSET', 'SETITEM', 'SETITEMS'
_TUPLES = 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3'
_CALLS = 'GLOBAL', 'STACK_GLOBAL', 'REDUCE', 'NEWOBJ', 'BUILD', 'BINPERSID'
OPCODES = {
  ord(info.code): _opcode(info)
  for info in pickletools.opcodes
  if info.name in {*VALUES, *_STACK, *_MEMO, *_ITEMS, *_TUPLES, *_CALLS}
}
