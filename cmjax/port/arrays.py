"""Arrays from untrusted bytes: every dtype, shape and stride is checked first."""

from collections.abc import Iterable, Sequence
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

MAX_VALUES = 2**18  # of a file after flattening, in which shared parts are repeated
MAX_DEPTH = 100  # of nested containers
MAX_NAME = 1000  # characters of a dotted name
MAX_AXES = 32
BFLOAT16 = jnp.dtype('bfloat16')
# The storage classes of torch.
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


def count(value: Any) -> int:
  """Returns the value; raises ValueError unless it is a whole number in [0, 2^63)."""
  if type(value) is not int or not 0 <= value < 2**63:
    raise ValueError('a size that is not a whole number >= 0')
  return value


def counts(values: Any) -> list[int]:
  """A shape or strides; raises ValueError unless they are at most MAX_AXES `count`s."""
  if len(values) > MAX_AXES:
    raise ValueError(f'an array with more than {MAX_AXES} axes')
  return [count(value) for value in values]


def numeric(name: Any) -> np.dtype:
  """The dtype with that name; raises ValueError unless its elements are numbers."""
  dtype = None
  if type(name) is str and len(name) <= 16:
    dtype = BFLOAT16 if name == 'bfloat16' else np.dtype(name)
  if dtype is None or not (dtype == BFLOAT16 or dtype.kind in 'biufc'):
    raise ValueError('an array of a dtype that is not numeric and little-endian')
  return dtype


def named(tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Collects a dict; raises ValueError for a duplicate or overlong name."""
  result = {}
  for name, array in tensors:
    if name in result or len(name) > MAX_NAME:
      raise ValueError(f'the name {name[:60]} is duplicate or too long')
    result[name] = array
  return result


def strided(
  storage: tuple[Any, np.dtype], offset: int, shape: Sequence, strides: Sequence
) -> np.ndarray:
  """A view of a storage (bytes, dtype); offset and strides count elements.

  Raises: ValueError if it reaches beyond the storage or repeats elements.
  """
  data, dtype = storage
  sizes, steps = counts(shape), counts(strides)
  if not math.prod(sizes):
    return np.frombuffer(b'', dtype).reshape(sizes)
  last = count(offset) + sum((n - 1) * s for n, s in zip(sizes, steps, strict=True))
  if max(last + 1, math.prod(sizes)) * dtype.itemsize > len(data):
    raise ValueError('a tensor larger than its storage')
  byte_strides = [n * dtype.itemsize for n in steps]
  return np.ndarray(sizes, dtype, data, offset * dtype.itemsize, byte_strides)


def contiguous(
  data: bytes, dtype: np.dtype, shape: Any, order: Literal['C', 'F'] = 'C'
) -> np.ndarray:
  """A view of all of the bytes; raises ValueError if the shape does not fit them."""
  if not isinstance(data, bytes) or not isinstance(dtype, np.dtype):
    raise TypeError('an array without bytes')
  return np.frombuffer(data, dtype).reshape(counts(shape), order=order)
