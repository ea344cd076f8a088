"""The user's own data: an `.npz` file, or a folder of images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
import warnings
import zipfile

import numpy as np
from PIL import Image

from cmjax.core import UserError
from cmjax.data.reading import check_memory, checked_images, empty_images, reading
from cmjax.data.source import MAX_CLASSES, Source, image_source

IMAGE_SUFFIXES = {'.png', '.jpg', '.jpeg', '.bmp', '.webp'}


def from_path(*, path: str, conditional: bool = False, flip: bool = False) -> Source:
  """Images or points from an `.npz` file, or images from a folder.

  An `.npz` has `images`: uint8[N, H, W, C], or f32[N, H, W, C] or f32[N, D] in [-1, 1];
  with `conditional`, also `labels` i[N], counted from 0. A folder is searched
  recursively, symbolic links included; all images have one size and are converted to
  RGB. With `conditional`, the class of an image is the sub-folder of `path` it is in.
  With `flip`, each image of a batch is mirrored left to right with probability 1/2.

  Raises: UserError if the path has no images, they differ in size, values leave
    [-1, 1], labels are missing, or the images do not fit into memory.
  """
  if not path.strip():
    raise UserError('config.data.path: is empty; give a folder or an .npz file')
  data = Path(path)
  if data.is_dir():
    examples, labels = _read_folder(data, conditional)
  elif data.suffix == '.npz' and data.is_file():
    examples, labels = _read_npz(data, conditional)
  else:
    raise UserError(f'config.data.path: {path!r} is neither a folder nor an .npz file')
  if flip and examples.ndim != 4:
    raise UserError(
      f'config.data.flip: {path} has points, and only images can be flipped'
    )
  classes = 0 if labels is None else int(labels.max()) + 1
  return image_source(data.name, examples, labels, classes, flip)


def _read_npz(path: Path, conditional: bool) -> tuple[np.ndarray, np.ndarray | None]:
  keys = ['images', 'labels'] if conditional else ['images']
  with reading(f'config.data.path: cannot read {path}'):
    with zipfile.ZipFile(path) as file:
      members = file.infolist()
    sizes = [
      (member.filename.removesuffix('.npy'), member.file_size) for member in members
    ]
    names = [name for name, _ in sizes]
    if 'images' not in names:
      raise UserError(f"config.data.path: {path} has no 'images'; it has {names}")
    size = sum(size for name, size in sizes if name in keys)
    check_memory(size, f'config.data.path: the arrays of {path}')
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: np.asarray(file[name]) for name in keys if name in names}
  images = checked_images(arrays['images'], f"config.data.path: 'images' of {path}")
  if not conditional:
    return images, None
  if 'labels' not in arrays or arrays['labels'].shape != images.shape[:1]:
    raise UserError(
      f"config.data.path: {path} has no 'labels' of shape ({len(images)},), and the "
      'model is conditional; add them, or set config.data.conditional=False'
    )
  labels = arrays['labels']
  if labels.dtype.kind not in 'iu' or labels.min() < 0:
    raise UserError(f"config.data.path: 'labels' of {path} must be integers from 0")
  if labels.max() >= min(len(labels), MAX_CLASSES):
    raise UserError(
      f"config.data.path: the largest of 'labels' of {path} is {labels.max()}, which "
      f'is too large for {len(labels)} examples; number the classes from 0, up to '
      f'{MAX_CLASSES} of them'
    )
  return images, labels.astype(np.int64)


def _read_folder(
  folder: Path, conditional: bool
) -> tuple[np.ndarray, np.ndarray | None]:
  with reading(f'config.data.path: cannot read {folder}'):
    files = sorted(image_files(folder, 'config.data.path'))
  if not files:
    raise UserError(
      f'config.data.path: no image in {folder}; looked for {sorted(IMAGE_SUFFIXES)}'
    )
  if conditional and any(file.parent == folder for file in files):
    raise UserError(
      f'config.data.path: {folder} has images outside a class folder, and the model is '
      'conditional; sort them into folders, or set config.data.conditional=False'
    )
  first = read_image(files[0], 'config.data.path')
  images = empty_images(len(files), first, f'config.data.path: the images of {folder}')
  for i, file in enumerate(files):
    image = read_image(file, 'config.data.path') if i else first
    if image.shape != images.shape[1:]:
      raise UserError(
        f'config.data.path: images differ in size: {files[0]} is '
        f'{images.shape[2]}x{images.shape[1]}, {file} is '
        f'{image.shape[1]}x{image.shape[0]}; resize them first'
      )
    images[i] = image
  if not conditional:
    return images, None
  names = [file.relative_to(folder).parts[0] for file in files]
  return images, np.unique(names, return_inverse=True)[1]


def image_files(folder: Path, where: str, above: Sequence[Path] = ()) -> Iterator[Path]:
  """Paths of the images below a folder; `above` are the folders that contain it.

  Raises: UserError, naming the key `where`, if a folder links to one of those.
  """
  resolved = folder.resolve()
  if resolved in above:
    raise UserError(
      f'{where}: {folder} links to a folder that contains it; remove the link'
    )
  for path in folder.iterdir():
    if path.is_dir():
      yield from image_files(path, where, (*above, resolved))
    elif path.suffix.lower() in IMAGE_SUFFIXES:
      yield path


def read_image(file: Path, where: str) -> np.ndarray:
  """An image file as RGB uint8[H, W, 3].

  Raises: UserError, naming the key `where`, if it cannot be read, is no image of 8 bits
    per channel, or has transparency.
  """
  with reading(f'{where}: cannot read {file}'), warnings.catch_warnings():
    warnings.simplefilter('error', Image.DecompressionBombWarning)
    if not file.is_file():  # opening a pipe would block
      raise OSError('not a file')
    with Image.open(file) as image:
      # `convert` would lose their range or transparency without a warning. RGB of 16
      # bits has the mode RGB, and only its decoder is another.
      wide = image.mode[0] in 'IF' or ';16B' in str(image.tile)
      if wide or image.has_transparency_data:
        raise OSError(f'mode {image.mode}; store 8 bits per channel, no transparency')
      return np.asarray(image.convert('RGB'))
