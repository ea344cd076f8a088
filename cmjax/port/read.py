"""Reads checkpoints of four formats into numpy arrays, without trusting the file."""

from collections.abc import Iterator
import io
import mmap
from pathlib import Path
import pickle
import re
from typing import Any, NamedTuple
import zipfile

import msgpack
import numpy as np
import safetensors

from cmjax.core import UserError, first_line
from cmjax.port import arrays, machine, pickles

MAX_HEADER = 2**24  # bytes of a safetensors header
MAX_DIRECTORY = 2**20  # bytes of the central directory of a zip
MAX_ITEMS = 64  # of a list of msgpack, which is allocated before its items are read


class File(NamedTuple):
  """The contents of a checkpoint: no name changed, no array transposed."""

  kind: str  # 'pickle', 'torch', 'msgpack' or 'safetensors'
  content: Any  # nested dicts and lists of arrays, numbers, strings and Modules
  metadata: dict[str, str]  # of safetensors


def check_directory(file: Any, size: int) -> None:
  """Raises ValueError if a zip has so many members that listing them is expensive."""
  file.seek(max(0, size - 2**16 - 98))
  tail = file.read(2**16 + 98)
  for end in (match.start() for match in re.finditer(b'PK\5\6', tail)):
    sizes = [tail[end + 12 : end + 16]]
    if tail[end - 20 : end - 16] == b'PK\6\7':
      sizes.append(tail[end - 36 : end - 28])
    if any(int.from_bytes(size, 'little') > MAX_DIRECTORY for size in sizes):
      raise ValueError('too many members')


def read_zip(file: Any) -> Any:
  """torch's format: a zip of a pickle and the bytes of each storage."""
  size = file.seek(0, io.SEEK_END)
  check_directory(file, size)
  with zipfile.ZipFile(file) as archive:
    members = {member.filename: member for member in archive.infolist()}
    if len(members) < len(archive.infolist()):
      raise ValueError('two members with the same name')
    if any(m.compress_type or m.file_size != m.compress_size for m in members.values()):
      raise ValueError('a compressed member, which torch never writes')
    if sum(member.file_size for member in members.values()) > size:
      raise ValueError('members larger than the file')
    (name,) = (n for n in members if n.endswith('/data.pkl'))
    folder = name.removesuffix('data.pkl')
    order = members.get(f'{folder}byteorder')
    if order and archive.read(order) != b'little':
      raise ValueError('not little-endian')

    def read_storage(key):
      return archive.read(members[f'{folder}data/{key}'])

    return pickles.read_member(archive.read(name), read_storage, size)


def read_msgpack(file: Any) -> Any:
  """flax.serialization.to_bytes: nested dicts of arrays, large ones in chunks."""
  values = 0

  def counted(container: Any) -> Any:
    nonlocal values
    values += 1 + len(container)  # an empty one takes 60 bytes
    if values > arrays.MAX_VALUES:
      raise ValueError('too many values')
    return container

  def extension(code: int, data: bytes) -> Any:
    limits = dict(max_array_len=MAX_ITEMS, max_map_len=0, list_hook=counted)
    items = msgpack.unpackb(data, raw=True, **limits)
    if code == 2:
      return complex(*items)
    shape, name, raw = counted(items)
    array = arrays.contiguous(raw, arrays.numeric(name.decode()), shape)
    return array if code == 1 else {3: array}[code][()]

  def mapping(tree: dict) -> Any:
    if '__msgpack_chunked_array__' not in counted(tree):
      return tree
    shape, chunks = (
      [tree[key][str(i)] for i in range(len(tree[key]))] for key in ('shape', 'chunks')
    )
    return np.concatenate(chunks).reshape(arrays.counts(shape))

  with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    content = msgpack.unpackb(
      data,
      ext_hook=extension,
      object_hook=mapping,
      list_hook=counted,
      max_array_len=MAX_ITEMS,
      max_map_len=4096,
    )
  tensors(content)  # raises if the tree is too deep
  return content


def read_safetensors(file: Any) -> tuple[Any, dict[str, str]]:
  """Arrays by name, and the metadata of the file."""
  file.seek(0)
  if int.from_bytes(file.read(8), 'little') > MAX_HEADER:
    raise ValueError('the header is too long')
  with safetensors.safe_open(file.name, framework='numpy') as opened:
    names = opened.keys()
    return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}


def tensors(tree: Any, separator: str = '.') -> dict[str, np.ndarray]:
  """Flattens nested dicts, lists and Modules into arrays by name; drops other leaves.

  Raises: ValueError if the tree is too deep, or two arrays have the same name.
  """
  values = 0

  def walk(value: Any, name: str, depth: int) -> Iterator[tuple[str, np.ndarray]]:
    nonlocal values
    values += 1 + len(name) // 16
    if depth > arrays.MAX_DEPTH or values > arrays.MAX_VALUES:
      raise ValueError('too deep, or too many values')
    children: dict[Any, Any] = {}
    if isinstance(value, np.ndarray | np.generic):
      yield name, np.asarray(value)
    elif isinstance(value, pickles.Module):
      children = {
        key.replace('.', separator): array for key, array in value.tensors.items()
      }
    elif isinstance(value, dict):
      children = value
    elif isinstance(value, list | tuple):
      children = dict(enumerate(value))
    for key, child in children.items():
      yield from walk(child, f'{name}{separator if name else ""}{key}', depth + 1)

  return arrays.named(walk(tree, '', 0))


def printable(error: Exception) -> str:
  """The message of an error about a file, without control characters."""
  return re.sub('[^ -~]', '?', first_line(error))[:120]


def kind_of(head: bytes) -> str:
  """The format of a file from its first bytes; '' if unknown."""
  if head[:4] == b'PK\x03\x04':
    return 'zip'
  if head[8:9] == b'{' and head[4:8] == bytes(4):
    return 'safetensors'
  if head[:1] == b'\x80' and head[1:2] in (b'\2', b'\3', b'\4', b'\5'):
    return 'legacy' if pickle.dumps(pickles.MAGIC, 2)[2:] in head[:32] else 'pickle'
  if 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):
    return 'msgpack'
  if head.lstrip(b' \t\r\n\xef\xbb\xbf').startswith(b'<'):
    return 'web page'
  return 'pointer' if head.startswith(b'version https://git-lfs') else ''


def read(path: str | Path) -> File:
  """Reads a checkpoint in any of four formats, recognised by its contents.

  Raises: UserError if the file is missing, damaged, hostile, or of another format.
  """
  path = Path(path)
  if not path.is_file():
    problem = 'is a folder; give a file in it' if path.is_dir() else 'no such file'
    raise UserError(f'{path}: {problem}')
  try:
    with open(path, 'rb') as file:
      head = file.read(64)
      if not head:
        raise UserError(f'{path}: is empty; download it again')
      file.seek(0)
      match kind_of(head):
        case 'pickle':
          return File('pickle', pickles.read_pickle(file), {})
        case 'legacy':
          return File('torch', pickles.read_legacy(file.read()), {})
        case 'zip':
          return File('torch', read_zip(file), {})
        case 'msgpack':
          return File('msgpack', read_msgpack(file), {})
        case 'safetensors':
          return File('safetensors', *read_safetensors(file))
        case 'web page':
          raise UserError(f'{path}: is a web page, not a checkpoint; download it again')
        case 'pointer':
          raise UserError(f'{path}: is a Git LFS pointer; run: git lfs pull')
      raise ValueError('unknown format')
  except UserError:
    raise
  except machine.RefusedError as error:
    name = printable(error)
    raise UserError(
      f'{path}: contains code, {name}, which cmjax does not run; use a file that holds '
      'only weights'
    ) from None
  except Exception as error:  # damaged bytes raise errors of many types
    raise UserError(
      f'{path}: damaged or not a checkpoint ({printable(error)}); download it again'
    ) from error
