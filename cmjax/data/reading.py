"""Checks shared by the readers of images."""

from collections.abc import Iterator
import contextlib

import numpy as np

from cmjax.core import UserError, first_line
from cmjax.runtime import sharding


def check_memory(size: int, what: str) -> None:
  """Raises: UserError if `size` bytes do not fit into the memory of this machine."""
  if size > sharding.host_memory():
    raise UserError(
      f'{what} take {size / 2**30:.3g} GiB, and this machine has '
      f'{sharding.host_memory() / 2**30:.3g}; use fewer or smaller ones'
    )


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
  """Turns any error of a damaged file into a UserError of one line."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    raise UserError(f'{what} ({first_line(error)})') from error


def empty_images(n: int, image: np.ndarray, what: str) -> np.ndarray:
  """An uninitialised array for n images of the shape and dtype of `image`.

  Raises: UserError if they do not fit into memory.
  """
  check_memory(n * image.nbytes, what)
  return np.empty((n, *image.shape), image.dtype)


def checked_images(images: np.ndarray, what: str) -> np.ndarray:
  """Images uint8 or f32[N, H, W, C], or points f32[N, D], of valid shape and range.

  Raises: UserError naming the shape, dtype or range that is wrong.
  """
  if images.dtype.kind not in 'fiu':
    raise UserError(f'{what} are {images.dtype}; store uint8 or float32')
  is_uint8 = images.dtype == np.uint8
  if not images.size or images.ndim not in ((4,) if is_uint8 else (2, 4)):
    hint = '; one image is images[None], grey images are images[..., None]'
    raise UserError(
      f'{what} have shape {images.shape}; store uint8 as [N, H, W, C], float32 as '
      f'that or [N, D]{hint if images.ndim == 3 else ""}'
    )
  if images.ndim == 4 and images.shape[3] not in (1, 3):
    hint = 'store one or three, such as images[..., :3]'
    if images.shape[1] in (1, 3):
      hint = 'move the channels last: np.moveaxis(images, 1, -1)'
    raise UserError(
      f'{what} have shape {images.shape}, with {images.shape[3]} channels; {hint}'
    )
  if not is_uint8:
    with np.errstate(over='ignore'):  # infinity is refused below
      images = images.astype(np.float32)
    # Written so that NaN fails too.
    if not (images.min() >= -1 and images.max() <= 1):
      raise UserError(
        f'{what} are outside [-1, 1] or not numbers; store uint8, or scale them'
      )
  return images
