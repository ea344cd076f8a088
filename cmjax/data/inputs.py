"""Images to edit: files of the user, in the size and channels of a model."""

from pathlib import Path
import re

import numpy as np

from cmjax.core import UserError
from cmjax.data.images import IMAGE_SUFFIXES, image_files, read_image
from cmjax.data.reading import check_memory, local, reading


def read_inputs(
  path: str, where: str, shape: tuple[int, ...], factor: int = 1
) -> tuple[list[str], np.ndarray]:
  """Names, and images uint8[N, H, W, C] of `shape`, of a file or of a folder's files.

  A name is the stem of the file, with letters, digits, _ and - alone. A file of a model
  with one channel may be grey or RGB with equal channels. Images may also be smaller
  than the model's by `factor`; their pixels are then repeated.

  Raises: UserError, naming the key `where`, if there are no images, one cannot be read,
    has another size, or is coloured and the model is not.
  """
  top = local(path, where)
  if not top.exists():
    raise UserError(f'{where}: {path} does not exist; give an image or a folder')
  files = [top]
  if top.is_dir():
    with reading(f'{where}: cannot read {path}'):
      files = [top / name for name in image_files(top, where)]
    if not files:
      raise UserError(
        f'{where}: no image in {path}; looked for {sorted(IMAGE_SUFFIXES)}'
      )
  check_memory(4 * len(files) * int(np.prod(shape)), f'{where}: the images of {path}')
  images = [_of_shape(read_image(f, where), f, where, shape, factor) for f in files]
  # Without dots, no name is that of a file beside the folders of the images.
  return [re.sub(r'[^\w-]', '_', f.stem)[:80] for f in files], np.stack(images)


def _of_shape(
  image: np.ndarray, file: Path, where: str, shape: tuple[int, ...], factor: int
) -> np.ndarray:
  height, width, channels = shape
  divides = factor > 1 and height % factor == width % factor == 0
  if divides and image.shape[:2] == (height // factor, width // factor):
    image = np.repeat(np.repeat(image, factor, axis=0), factor, axis=1)
  if image.shape[:2] != (height, width):
    small = f' or {width // factor}x{height // factor}' if divides else ''
    raise UserError(
      f'{where}: {file} is {image.shape[1]}x{image.shape[0]} pixels, and the model has '
      f'{width}x{height}{small}; resize it first'
    )
  if channels == 3:
    return image
  if np.any(image != image[..., :1]):
    raise UserError(
      f'{where}: {file} is coloured, and the model has one channel; make it grey first'
    )
  return image[..., :1]


def read_one(path: str, where: str, shape: tuple[int, ...]) -> np.ndarray:
  """One image uint8[H, W, C] of `shape` from a file.

  Raises: UserError as `read_inputs`, and if the path is a folder.
  """
  if Path(path).is_dir():
    raise UserError(f'{where}: {path} is a folder; give one image')
  return read_inputs(path, where, shape)[1][0]


def read_mask(path: str, where: str, shape: tuple[int, ...]) -> np.ndarray:
  """f32[H, W], 0 (to generate) where an image is lighter than half, and 1 (known).

  Raises: UserError, naming the key `where`, if it cannot be read, has another size than
    `shape`, or nothing in it is white.
  """
  image = read_one(path, where, (*shape[:2], 3))
  known = image.mean(axis=-1) < 127.5
  if known.all():
    raise UserError(f'{where}: {path} has no white pixel, so that nothing is generated')
  return known.astype(np.float32)
