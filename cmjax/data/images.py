"""Image files: which ones a folder has, how they are decoded, cropped and resized."""

from collections.abc import Iterator, Sequence
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple
import warnings

import numpy as np
from PIL import Image

from cmjax.core import UserError
from cmjax.data.reading import reading

IMAGE_SUFFIXES = {'.png', '.jpg', '.jpeg', '.bmp', '.webp'}
PILLOW = Image.__version__  # decoded pixels may differ between versions
_MAX_PIXELS = 89_478_485  # of one image: the limit of Pillow, which only warns
_MAX_SIDE = 8192

# `_decoded` refuses these images; changing filters for one call is not thread-safe.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)


class Resize(NamedTuple):
  """How images become squares of `size` pixels; size 0: they stay as they are.

  `crop` names the rule, which is exact to the bit:

  - '': the image must be a square, resized by Lanczos. Source: NVlabs/edm
    `dataset_tool.py` with --resolution alone.
  - 'edm': the square in the centre of the image, resized by Lanczos. Source: the same
    with --transform=center-crop.
  - 'adm': halved (box) while the shorter side is at least twice `size`, resized
    (bicubic) so that it is `size`, and cropped. Source: openai/guided-diffusion
    `image_datasets.py:center_crop_arr`.
  - 'lsun': resized (box) so that the shorter side is `size`, and cropped. Source:
    openai/guided-diffusion `datasets/lsun_bedroom.py`.
  """

  size: int = 0
  crop: str = ''

  def __call__(self, image: Image.Image) -> np.ndarray:
    """The image as uint8[size, size, C].

    Raises: OSError if the rule does not take an image of this shape.
    """
    if self.size:
      short, long = sorted(image.size)
      if self.crop in ('adm', 'lsun') and self.size**2 * long > _MAX_PIXELS * short:
        raise OSError(f'{image.width} x {image.height} pixels are too oblong')
      image = _CROPS[self.crop](image, self.size)
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def _square(image: Image.Image, size: int) -> Image.Image:
  if image.width != image.height:
    raise OSError(
      f'{image.width} x {image.height} pixels are no square; set config.data.crop to '
      "'edm', 'adm' or 'lsun'"
    )
  return image.resize((size, size), Image.Resampling.LANCZOS)


def _edm(image: Image.Image, size: int) -> Image.Image:
  (width, height), side = image.size, min(image.size)
  box = (width - side) // 2, (height - side) // 2
  box += (width + side) // 2, (height + side) // 2
  return image.crop(box).resize((size, size), Image.Resampling.LANCZOS)


def _adm(image: Image.Image, size: int) -> Image.Image:
  while min(image.size) >= 2 * size:
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
  return _centre(image, size, Image.Resampling.BICUBIC)


def _lsun(image: Image.Image, size: int) -> Image.Image:
  return _centre(image, size, Image.Resampling.BOX)


def _centre(image: Image.Image, size: int, rule: Image.Resampling) -> Image.Image:
  scale = size / min(image.size)
  # `round` to even, as both sources do.
  image = image.resize((round(image.width * scale), round(image.height * scale)), rule)
  left, top = (image.width - size) // 2, (image.height - size) // 2
  return image.crop((left, top, left + size, top + size))


_CROPS = {'': _square, 'edm': _edm, 'adm': _adm, 'lsun': _lsun}


def resize_of(size: int, crop: str) -> Resize:
  """The rule of the keys `size` and `crop` of config.data.

  Raises: UserError if there is no such rule, or a crop without a size.
  """
  if not 0 <= size <= _MAX_SIDE:
    raise UserError(f'config.data.size: {size} is not from 0 to {_MAX_SIDE}')
  if crop not in _CROPS:
    names = ', '.join(repr(name) for name in _CROPS)
    raise UserError(f'config.data.crop: must be one of {names}, got {crop!r}')
  if crop and not size:
    raise UserError(f'config.data.crop: {crop!r} needs config.data.size, such as 64')
  return Resize(size, crop)


def image_files(folder: Path, where: str) -> list[str]:
  """Paths, below a folder, of the images in it, in the order of their parts.

  Raises: UserError, naming the key `where`, if a folder links to one that contains it.
  """
  # As text, since there may be millions of them.
  names = _image_files(str(folder), '', where, ())
  return sorted(names, key=lambda name: name.replace(os.sep, '\0'))


def _image_files(
  folder: str, prefix: str, where: str, above: Sequence[str]
) -> Iterator[str]:
  """PREFIX/NAME of images; `above` are the folders that contain this one."""
  resolved = os.path.realpath(folder)
  if resolved in above:
    raise UserError(
      f'{where}: {folder} links to a folder that contains it; remove the link'
    )
  with os.scandir(folder) as entries:  # which know whether they are folders
    for entry in entries:
      name = prefix + entry.name
      # A link may be one to itself.
      if entry.is_dir() if not entry.is_symlink() else os.path.isdir(entry.path):
        yield from _image_files(entry.path, name + os.sep, where, (*above, resolved))
      elif is_image(entry.name):
        yield name


def is_image(name: str) -> bool:
  """Whether a file has the suffix of an image."""
  return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def read_image(file: Path, where: str, resize: Resize | None = None) -> np.ndarray:
  """An image file as RGB uint8[H, W, 3].

  Raises: UserError, naming the key `where`, if it cannot be read, is no image of 8 bits
    per channel, or has transparency.
  """
  with reading(f'{where}: cannot read {file}'):
    if not file.is_file():  # opening a pipe would block
      raise OSError('not a file')
    return decoded(file, resize or Resize())


def decoded(file: Path | BinaryIO, resize: Resize) -> np.ndarray:
  """An image as RGB uint8[H, W, 3], after `resize`.

  Raises: OSError, or what Pillow raises, as `read_image` raises UserError.
  """
  with Image.open(file) as image:
    if image.width * image.height > _MAX_PIXELS:
      raise OSError(f'{image.width} x {image.height} pixels')
    # `convert` would lose their range or transparency without a warning. RGB of 16
    # bits has the mode RGB, and only its decoder is another.
    wide = image.mode[0] in 'IF' or ';16B' in str(image.tile)
    if wide or image.has_transparency_data:
      raise OSError(f'mode {image.mode}; store 8 bits per channel, no transparency')
    return resize(image.convert('RGB'))


def resized(image: np.ndarray, resize: Resize) -> np.ndarray:
  """A decoded image uint8[H, W, C], C 1 or 3, after `resize`."""
  if not resize.size:
    return image
  return resize(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image))
