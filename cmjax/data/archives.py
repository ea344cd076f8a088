"""Images of folders and zip files, as NVlabs/edm `dataset_tool.py` writes them."""

import dataclasses
import io
import json
import os
from pathlib import Path
import struct
from typing import Any, BinaryIO
import zipfile
import zlib

import numpy as np

from cmjax.core import UserError
from cmjax.data import images
from cmjax.data.disk import facts_of
from cmjax.data.reading import checked_labels, reading

LABELS = 'dataset.json'  # {"labels": [["00000/img00000000.png", 6], ...]}, or null
_MAX_BYTES = 2**29  # of an encoded image or of the labels
_MAX_NAME = 1024  # bytes, since names are stored at the length of the longest


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
  """The image files of a folder, in the order of their paths: a `disk.Reader`."""

  root: Path
  names: np.ndarray  # bytes[N], paths below the root
  resize: images.Resize

  def __len__(self) -> int:
    """The number of images."""
    return len(self.names)

  def name(self, i: int) -> str:
    """The path of an image."""
    return str(self.root / os.fsdecode(self.names[i]))

  def read(self, index):
    """The images of these indices, as RGB uint8[H, W, 3]."""
    for i in index:
      yield images.read_image(Path(self.name(i)), 'config.data.path', self.resize)

  def identity(self) -> str:
    """Path, names, sizes and times of the files, and how they are decoded."""
    names = map(os.fsdecode, self.names.tolist())
    return _identity(self, self.root, facts_of(self.root, names))


@dataclasses.dataclass(frozen=True, eq=False)
class Zip:
  """The images of a zip file, in the order of their names: a `disk.Reader`.

  Nothing is extracted: a member is read, and decoded in memory.
  """

  path: Path
  names: np.ndarray  # bytes[N]
  members: np.ndarray  # i64[N, 5]: offset, size, stored size, method, CRC-32
  resize: images.Resize

  def __len__(self) -> int:
    """The number of images."""
    return len(self.names)

  def name(self, i: int) -> str:
    """The path of the zip file, and the name of an image in it."""
    return f'{self.path}/{self.names[i].decode()}'

  def read(self, index):
    """The images of these indices, as RGB uint8[H, W, 3]."""
    with reading(f'config.data.path: cannot read {self.path}'):
      file = open(self.path, 'rb')  # noqa: SIM115, closed below
    with file:
      for i in index:
        with reading(f'config.data.path: cannot read {self.name(i)}'):
          content = _member(file, *self.members[i].tolist())
          image = images.decoded(io.BytesIO(content), self.resize)
        yield image

  def identity(self) -> str:
    """Path, size and time of the file, and how its images are decoded."""
    return _identity(self, self.path, facts_of(self.path.parent, [self.path.name]))


def _identity(reader: Folder | Zip, path: Path, facts: list) -> str:
  kind = type(reader).__name__
  return repr((kind, images.PILLOW, *reader.resize, str(path.resolve()), facts))


def _member(
  file: BinaryIO, offset: int, size: int, stored: int, method: int, crc: int
) -> bytes:
  """The content of a member of a zip file, whose threads need no lock.

  Source: PKWARE APPNOTE.TXT 6.3.10, section 4.3.7.
  """
  start = data_offset(file, offset)
  content = os.pread(file.fileno(), stored, start)
  if method == zipfile.ZIP_DEFLATED:
    # One byte more, as 0 would be no limit.
    content = zlib.decompressobj(-15).decompress(content, size + 1)
  if len(content) != size or zlib.crc32(content) != crc:
    raise OSError('the zip file is damaged')
  return content


def data_offset(file: BinaryIO, offset: int) -> int:
  """Where the content of a member starts, whose local header is at `offset`."""
  header = os.pread(file.fileno(), 30, offset)
  if header[:4] != b'PK\3\4' or len(header) < 30:
    raise OSError('the zip file is damaged')
  return offset + 30 + sum(struct.unpack('<HH', header[26:]))


def read_folder(
  root: Path, names: list[str], conditional: bool, resize: images.Resize
) -> tuple[Folder, np.ndarray | None]:
  """The images of a folder, whose paths below it are `names`, and their labels i64[N].

  Raises: UserError if `conditional` is set and there are no labels.
  """
  reader = Folder(root, np.array([os.fsencode(name) for name in names]), resize)
  if not conditional:
    return reader, None
  path, labels = root / LABELS, None
  if path.is_file():
    with reading(f'config.data.path: cannot read {path}'):
      labels = _content(path.read_bytes() if path.stat().st_size < _MAX_BYTES else b'')
  return reader, _labels(labels, names, root)


def read_zip(
  path: Path, conditional: bool, resize: images.Resize
) -> tuple[Zip, np.ndarray | None]:
  """The images of a zip file, and their labels i64[N].

  Raises: UserError if it cannot be read, has no images, or `conditional` is set and
    there are no labels.
  """
  content = None
  with reading(f'config.data.path: cannot read {path}'), zipfile.ZipFile(path) as file:
    # In the order of the same files in a folder.
    members = [m for m in file.infolist() if images.is_image(m.filename)]
    members.sort(key=lambda member: member.filename.split('/'))
    for member in members:
      if member.flag_bits & 1 or member.compress_type not in (0, zipfile.ZIP_DEFLATED):
        raise OSError(f'{member.filename} is encrypted or compressed by other means')
      if max(member.file_size, member.compress_size) > _MAX_BYTES:
        raise OSError(f'{member.filename} is larger than {_MAX_BYTES >> 20} MiB')
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
      raise OSError('two images have the same name')
    encoded = [name.encode() for name in names]
    longest = max(map(len, encoded), default=0)
    if longest > _MAX_NAME:
      raise OSError(f'a name of {longest} bytes, which is longer than {_MAX_NAME}')
    if conditional and LABELS in file.namelist():
      if file.getinfo(LABELS).file_size > _MAX_BYTES:
        raise OSError(f'{LABELS} is larger than {_MAX_BYTES >> 20} MiB')
      content = _content(file.read(LABELS))
  if not members:
    raise UserError(
      f'config.data.path: no image in {path}; looked for '
      f'{sorted(images.IMAGE_SUFFIXES)}'
    )
  numbers = [
    (m.header_offset, m.file_size, m.compress_size, m.compress_type, m.CRC)
    for m in members
  ]
  reader = Zip(path, np.array(encoded), np.array(numbers, np.int64), resize)
  return reader, _labels(content, names, path) if conditional else None


def _content(text: bytes) -> Any:
  content = json.loads(text)
  if not isinstance(content, dict) or 'labels' not in content:
    raise OSError(f'{LABELS} must be {{"labels": [[NAME, CLASS], ...]}}')
  return content


def _labels(content: Any, names: list[str], path: Path) -> np.ndarray:
  """The labels of images by name; without `dataset.json`, those of their folders."""
  if content is None:
    parts = [name.partition(os.sep if path.is_dir() else '/') for name in names]
    if not all(separator for _, separator, _ in parts):
      raise UserError(
        f'config.data.path: {path} has images outside a class folder, and the model is '
        f'conditional; sort them into folders, add a {LABELS}, or set '
        'config.data.conditional=False'
      )
    number = {top: i for i, top in enumerate(sorted({top for top, _, _ in parts}))}
    return np.array([number[top] for top, _, _ in parts], np.int64)
  pairs, where = content['labels'], f'{LABELS} of {path}'
  if pairs is None:
    raise UserError(
      f'config.data.path: {where} has no labels, and the model is conditional; set '
      'config.data.conditional=False'
    )
  if not isinstance(pairs, list) or not all(
    isinstance(pair, list)
    and len(pair) == 2
    and isinstance(pair[0], str)
    and type(pair[1]) is int
    and abs(pair[1]) < 2**63
    for pair in pairs
  ):
    raise UserError(
      f'config.data.path: the labels of {where} must be pairs of a name and an integer'
    )
  found = dict(pairs)
  if len(found) < len(pairs):
    raise UserError(f'config.data.path: {where} names an image twice')
  for missing in (found.keys() - set(names), set(names) - found.keys()):
    if missing:
      what = 'has no label for' if min(missing) not in found else 'names'
      rest = '' if what != 'names' else ', which is not among the images'
      raise UserError(f'config.data.path: {where} {what} {min(missing)!r:.80}{rest}')
  labels = np.array([found[name] for name in names], np.int64)
  return checked_labels(labels, len(names), f'config.data.path: the labels of {where}')
