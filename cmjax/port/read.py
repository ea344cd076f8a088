"""Foreign checkpoints: a file of any of four formats -> numpy arrays, safely."""

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
from cmjax.port import pickles

MOST_HEADER = 2**24  # bytes of a safetensors header
MOST_DIRECTORY = 2**20  # bytes of a zip's list of members
MOST_ITEMS = 64  # of a list of msgpack: room for this many is made before one is seen


class File(NamedTuple):
  """A checkpoint as its file has it: no name changed, no array transposed."""

  kind: str  # 'pickle', 'torch', 'msgpack' or 'safetensors'
  content: Any  # nested dicts and lists of arrays, numbers, strings and Modules
  metadata: dict[str, str]  # of safetensors


def _check_directory(file: Any, size: int):
  """Refuses a zip of so many members that listing them takes many times its size."""
  file.seek(max(0, size - 2**16 - 98))
  tail = file.read(2**16 + 98)
  for end in (match.start() for match in re.finditer(b'PK\5\6', tail)):
    claims = [tail[end + 12 : end + 16]]
    if tail[end - 20 : end - 16] == b'PK\6\7':
      claims.append(tail[end - 36 : end - 28])
    if any(int.from_bytes(claim, 'little') > MOST_DIRECTORY for claim in claims):
      raise ValueError('a directory of too many members')


def read_zip(file: Any) -> Any:
  """torch's format: a zip of one pickle, and of each storage's bytes by key."""
  size = file.seek(0, io.SEEK_END)
  _check_directory(file, size)
  with zipfile.ZipFile(file) as archive:
    members = {member.filename: member for member in archive.infolist()}
    if len(members) < len(archive.infolist()):
      raise ValueError('two members of one name')
    if any(m.compress_type or m.file_size != m.compress_size for m in members.values()):
      raise ValueError('a compressed member, which torch does not write')
    if sum(member.file_size for member in members.values()) > size:
      raise ValueError('members larger than the file')
    (name,) = (n for n in members if n.endswith('/data.pkl'))
    folder = name.removesuffix('data.pkl')
    order = members.get(f'{folder}byteorder')
    if order and archive.read(order) != b'little':
      raise ValueError('not little-endian')
    return pickles.read_whole(
      archive.read(name),
      lambda key: archive.read(members[f'{folder}data/{key}']),
      pickles.Machine(size),
    )


def read_msgpack(file: Any) -> Any:
  """flax.serialization.to_bytes: nested dicts of arrays, the largest in chunks."""
  values = 0

  def counted(found: Any) -> Any:
    nonlocal values
    values += 1 + len(found)  # also of empty ones: each takes 60 bytes for one
    if values > pickles.MOST_VALUES:
      raise ValueError('too many values')
    return found

  def extension(code: int, data: bytes) -> Any:
    limits = dict(max_array_len=MOST_ITEMS, max_map_len=0, list_hook=counted)
    parts = msgpack.unpackb(data, raw=True, **limits)
    if code == 2:
      return complex(*parts)
    shape, name, raw = counted(parts)
    array = pickles.array_of(raw, pickles.numeric(name.decode()), shape)
    return array if code == 1 else {3: array}[code][()]

  def mapping(found: dict) -> Any:
    if '__msgpack_chunked_array__' not in counted(found):
      return found
    shape, chunks = (
      [found[part][str(i)] for i in range(len(found[part]))]
      for part in ('shape', 'chunks')
    )
    return np.concatenate(chunks).reshape(pickles.counts(shape))

  with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    content = msgpack.unpackb(
      data,
      ext_hook=extension,
      object_hook=mapping,
      list_hook=counted,
      max_array_len=MOST_ITEMS,
      max_map_len=4096,
    )
  tensors(content)  # refuses a tree too deep
  return content


def read_safetensors(file: Any) -> tuple[Any, dict[str, str]]:
  """Arrays by name, and what the file says about itself."""
  file.seek(0)
  if int.from_bytes(file.read(8), 'little') > MOST_HEADER:
    raise ValueError('a header longer than any')
  with safetensors.safe_open(file.name, framework='numpy') as found:
    names = found.keys()
    return {name: found.get_tensor(name) for name in names}, found.metadata() or {}


def tensors(tree: Any, separator: str = '.') -> dict[str, np.ndarray]:
  """Nested dicts, lists and Modules of arrays as one dict by name; other leaves drop.

  Raises: ValueError for a tree too deep, or where two arrays have one name.
  """
  values = 0

  def walk(value: Any, name: str, depth: int) -> Iterator[tuple[str, np.ndarray]]:
    nonlocal values
    values += 1 + len(name) // 16
    if depth > pickles.MOST_DEPTH or values > pickles.MOST_VALUES:
      raise ValueError('too deep, or too many values')
    parts = {}
    if isinstance(value, np.ndarray | np.generic):
      yield name, np.asarray(value)
    elif isinstance(value, pickles.Module):
      parts = {key.replace('.', separator): part for key, part in value.tensors.items()}
    elif isinstance(value, dict):
      parts = value
    elif isinstance(value, list | tuple):
      parts = dict(enumerate(value))
    for key, part in parts.items():
      yield from walk(part, f'{name}{separator if name else ""}{key}', depth + 1)

  return pickles.named(walk(tree, '', 0))


def one_line(error: Exception) -> str:
  """What an error says of a file, without what its bytes would do to a terminal."""
  return re.sub('[^ -~]', '?', first_line(error))[:120]


def kind_of(head: bytes) -> str:
  """The format of a file from its first bytes, '' for none that is known."""
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
  """Reads a checkpoint of another project, in any of four formats, told by content.

  Raises: UserError in one line, where there is none, or a damaged or a hostile one.
  """
  path = Path(path)
  if not path.is_file():
    what = 'is a folder; give a file in it' if path.is_dir() else 'is not there'
    raise UserError(f'{path}: {what}')
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
          data = file.read()
          machine = pickles.Machine(len(data))
          return File('torch', pickles.read_legacy(data, machine), {})
        case 'zip':
          return File('torch', read_zip(file), {})
        case 'msgpack':
          return File('msgpack', read_msgpack(file), {})
        case 'safetensors':
          return File('safetensors', *read_safetensors(file))
        case 'web page':
          raise UserError(f'{path}: is a web page, so the download did not work')
        case 'pointer':
          raise UserError(f'{path}: only points to the file; fetch: git lfs pull')
      raise ValueError('of no format that cmjax knows')
  except UserError:
    raise
  except pickles.RefusedError as error:
    name = one_line(error)
    raise UserError(
      f'{path}: wants {name}, which cmjax does not run; use a file of weights only'
    ) from None
  except Exception as error:  # whatever a parser meets in bytes that nobody checked
    raise UserError(
      f'{path}: damaged or not a checkpoint ({one_line(error)}); download it again'
    ) from error
