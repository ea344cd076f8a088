"""Checks shared by the readers of images."""

from collections.abc import Iterator
import contextlib
from pathlib import Path

import numpy as np

from cmjax.core import UserError, first_line
from cmjax.runtime import sharding

MAX_CLASSES = 10**6  # with more, one-hot labels would dominate the memory of a batch


def local(path: str, where: str) -> Path:
  """The path of data. Raises: UserError, naming the key `where`, for an address."""
  if '://' in path:
    raise UserError(
      f'{where}: {path} is not a local or mounted path; copy it to one, or mount the '
      'bucket'
    )
  return Path(path)


def check_memory(size: int, what: str, hint: str = 'fewer or smaller ones') -> None:
  """Raises: UserError if `size` bytes do not fit into the memory of this machine."""
  if size > sharding.host_memory():
    raise UserError(
      f'{what} take {size / 2**30:.3g} GiB, and this machine has '
      f'{sharding.host_memory() / 2**30:.3g}; use {hint}'
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


def checked_labels(labels: np.ndarray, num_examples: int, what: str) -> np.ndarray:
  """Labels i64[N], counted from 0.

  Raises: UserError if there are not `num_examples`, they are no integers from 0, or one
    is too large.
  """
  if labels.shape != (num_examples,):
    raise UserError(
      f'{what} have shape {labels.shape}, and there are {num_examples} examples'
    )
  if labels.dtype.kind not in 'iu' or (len(labels) and labels.min() < 0):
    raise UserError(f'{what} must be integers from 0')
  if len(labels) and labels.max() >= min(len(labels), MAX_CLASSES):
    raise UserError(
      f'the largest of {what.partition(": ")[2] or what} is {labels.max()}, which is '
      f'too large for {len(labels)} examples; number the classes from 0, up to '
      f'{MAX_CLASSES} of them'
    )
  return labels.astype(np.int64)


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
