"""The collectives of a compiled program, read from its HLO text."""

import math
import re
from typing import NamedTuple


class Collective(NamedTuple):
  """An operation that exchanges arrays between devices."""

  kind: str
  bytes: int  # per device: the output of an all-gather, the input of any other kind
  in_loop: bool  # whether it runs once per iteration of a while loop


_KINDS = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
_COMPUTATION = re.compile(r'(?:ENTRY )?%?([\w.-]+) \(.*\{$')
_OPERATION = re.compile(r'\s+(?:ROOT )?%?([\w.-]+) = (.*?)\s([a-z][a-z0-9-]*)\((.*)')
_CALLED = re.compile(
  r'(calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)'
)
_ARRAY = re.compile(r'([a-z]+)(\d*)\w*\[([\d,]*)\]')


def collectives(hlo: str) -> list[Collective]:
  """The collectives in the HLO text of an optimised program, in order.

  A pair of start and done operations counts as one, and so does an operation on several
  arrays.
  """
  operations: list[tuple[str, str, int]] = []  # computation, kind, bytes
  calls: dict[str, set[str]] = {}  # by computation
  looped: set[str] = set()  # computations within a loop
  computation, sizes = '', {}
  for line in hlo.splitlines():
    if heading := _COMPUTATION.match(line):
      computation, sizes = heading[1], {}
    elif operation := _OPERATION.match(line):
      name, shape, opcode, rest = operation.groups()
      sizes[name] = _bytes(shape)
      kind = opcode.removesuffix('-start')
      if kind in _KINDS:
        operands = re.findall(r'%([\w.-]+)', rest.partition(')')[0])
        size = input_size = sum(sizes[operand] for operand in operands)
        if kind == 'all-gather':  # the output of a start contains its input
          size = sizes[name] - (input_size if opcode != kind else 0)
        operations.append((computation, kind, size))
      for attribute, names in _CALLED.findall(rest):
        called = set(re.findall(r'[\w.-]+', names))
        calls.setdefault(computation, set()).update(called)
        looped |= called if attribute in ('body', 'condition') else set()
  while inner := {name for outer in looped for name in calls.get(outer, ())} - looped:
    looped |= inner
  return [Collective(kind, size, inside in looped) for inside, kind, size in operations]


def _bytes(shape: str) -> int:
  """Bytes of an array, or of all arrays of a tuple."""
  total = 0
  for kind, bits, sizes in _ARRAY.findall(shape):
    count = math.prod(int(n) for n in sizes.split(',') if n)
    total += count * (int(bits) if bits else 8 * (kind == 'pred')) // 8
  return total
