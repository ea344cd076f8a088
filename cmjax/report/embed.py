"""Pictures inside a page: as `data:` URIs, within a number of bytes."""

import base64
from collections.abc import Sequence
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
  from PIL.Image import Image

MAX_FILE = 30_000_000  # bytes, and
MAX_PIXELS = 40_000_000  # beyond which a file is not read
# Tried in turn until a picture fits: quality, and longest side in pixels.
LOSSY = ((92, 1600), (80, 1200), (60, 1000), (45, 700), (40, 600), (30, 480), (20, 320))


class Embedded(NamedTuple):
  """A picture as WebP."""

  uri: str
  width: int
  height: int


def embedded(paths: Sequence[Path], budget: int) -> list[Embedded | str]:
  """Each picture, or why there is none: their URIs together take `budget` bytes.

  A picture that takes less than its share leaves the rest to the following ones. They
  are without loss where they fit, and otherwise compressed and made smaller.
  """
  found: list[Embedded | str] = []
  left = budget * 3 // 4  # base64 takes four bytes for three
  for i, path in enumerate(paths):
    data = _encoded(path, left // (len(paths) - i))
    if isinstance(data, tuple):
      left -= len(data[0])
      uri = 'data:image/webp;base64,' + base64.b64encode(data[0]).decode('ascii')
      data = Embedded(uri, *data[1])
    found.append(data)
  return found


def shape_of(path: Path) -> tuple[int, int] | None:
  """Width and height of a picture in pixels; None if it cannot be read."""
  from PIL import Image

  try:
    with Image.open(path) as opened:
      return opened.size
  except Exception:  # damaged files raise errors of many types
    return None


def _encoded(path: Path, most: int) -> tuple[bytes, tuple[int, int]] | str:
  """The bytes of a picture and its size in pixels, or why there are none."""
  from PIL import Image  # slow to import

  try:
    if path.stat().st_size > MAX_FILE:
      return 'too large'
    with Image.open(path) as opened:
      if opened.width * opened.height > MAX_PIXELS:
        return 'too large'
      picture = opened.convert('RGB')
  except Exception:  # damaged files raise errors of many types
    return 'cannot be read'
  size = picture.size
  # WebP is rarely less than a quarter of the PNG, and takes long to find out.
  if path.stat().st_size < 4 * most and size[0] * size[1] < 2_000_000:
    data = _webp(picture, lossless=True, quality=0, method=1)
    if len(data) <= most:
      return data, size
  bytes_per_pixel = 0.0
  for quality, side in LOSSY:
    scale = min(1.0, side / max(size))
    likely = bytes_per_pixel * scale**2 * size[0] * size[1]
    if likely > 4 * most and (quality, side) != LOSSY[-1]:
      continue  # a lower quality alone saves less
    smaller = picture.copy()
    smaller.thumbnail((side, side))
    data = _webp(smaller, quality=quality, method=2)
    if len(data) <= most:
      return data, size
    bytes_per_pixel = len(data) / (smaller.width * smaller.height)
  return 'does not fit in the page'


def _webp(picture: 'Image', **settings: Any) -> bytes:
  buffer = io.BytesIO()
  picture.save(buffer, 'webp', **settings)
  return buffer.getvalue()
