"""Sources of examples, and (seed, step, process) -> host batch: the only door for tfds.

The batch of a step is a pure function of its arguments: resuming needs no saved cursor.
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image, UnidentifiedImageError
from sklearn import datasets
import tensorflow_datasets

from cmjax import oracles
from cmjax.core import Batch, UserError, first_line
from cmjax.fields import Reference

IMAGE_SUFFIXES = {'.png', '.jpg', '.jpeg', '.bmp', '.webp'}
DATA_DIR_VARIABLE = 'CMJAX_DATA_DIR'


class Source(NamedTuple):
  """A data set in memory, as stored, and how it becomes x0."""

  name: str  # as it should be quoted beside a number
  examples: np.ndarray  # uint8 or f32[N, H, W, C], or f32[N, D]
  labels: np.ndarray | None  # i[N] in [0, classes); None: unconditional
  classes: int  # 0: unconditional
  low: float  # smallest stored value, -inf where there is none
  high: float  # largest stored value
  offset: float  # x0 = (stored - offset) * scale
  scale: float
  flip: bool  # mirror half of the images left to right

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one example."""
    return self.examples.shape[1:]


def batch_at(
  source: Source,
  seed: int,
  step: int,
  batch_size: int,
  rows: np.ndarray | None = None,
) -> Batch:
  """The step's global batch, or those rows i[R] of it, as numpy arrays.

  The examples follow one endless sequence of permutations, so that each is seen once an
  epoch whatever the batch size. x0 f32[R, ...], images in [-1, 1].
  """
  rows = np.arange(batch_size) if rows is None else rows
  first = step * batch_size
  index = _endless_permutation(seed, len(source.examples), first, batch_size)[rows]
  x0 = as_x0(source, source.examples[index])
  if source.flip:
    bits = np.random.Generator(np.random.Philox(key=[seed, 2**32 + step]))
    mirrored = bits.integers(2, size=batch_size)[rows].astype(bool)
    x0[mirrored] = x0[mirrored, :, ::-1]
  cond = None if source.labels is None else one_hot(source, index)
  return Batch(x0, cond, index.astype(np.int32))


def reference(source: Source, *, per_class: int = 0, seed: int = 0) -> Reference:
  """The examples as stored, in one bucket a class, for `fields.stable_denoiser`.

  Without labels there is one bucket. `per_class` examples of each are kept, drawn by
  `seed`; 0 keeps all.

  Raises: ValueError if `per_class` is negative.
  """
  if per_class < 0:
    raise ValueError(f'reference: needs {per_class=} >= 0')
  labels = np.zeros(len(source.examples), int)
  if source.labels is not None:
    labels = source.labels
  order = np.random.Generator(np.random.Philox(key=[seed, 2**33])).permutation
  members = []
  for label in range(max(source.classes, 1)):
    there = np.flatnonzero(labels == label)
    members.append(order(there)[:per_class] if per_class else there)
  size = max(map(len, members))
  examples = np.zeros((len(members), size, *source.shape), source.examples.dtype)
  slots = np.full(len(labels), -1, np.int32)
  for bucket, there in zip(examples, members):
    bucket[: len(there)] = source.examples[there]
    slots[there] = np.arange(len(there))
  return Reference(
    examples=examples,
    counts=np.array([len(there) for there in members], np.int32),
    slots=slots,
    offset=np.float32(source.offset),
    scale=np.float32(source.scale),
  )


def as_x0(source: Source, stored: np.ndarray) -> np.ndarray:
  """Stored values [N, ...] -> f32[N, ...], images in [-1, 1]."""
  return (stored.astype(np.float32) - source.offset) * np.float32(source.scale)


def clip(source: Source, x0: np.ndarray) -> np.ndarray:
  """Samples f32[N, ...] inside the range that stored data can have."""
  low, high = ((v - source.offset) * source.scale for v in (source.low, source.high))
  return np.clip(x0, low, high)


def as_uint8(source: Source, x0: np.ndarray) -> np.ndarray:
  """Samples f32[N, ...] -> uint8[N, ...], black to white, rounded to the nearest."""
  stored = clip(source, x0) / source.scale + source.offset
  return np.rint((stored - source.low) / (source.high - source.low) * 255).astype(
    'uint8'
  )


def one_hot(source: Source, index: np.ndarray) -> np.ndarray:
  """Labels of the examples i[N] -> f32[N, classes]."""
  return np.eye(source.classes, dtype=np.float32)[source.labels[index]]


def _endless_permutation(seed: int, n: int, first: int, count: int) -> np.ndarray:
  parts, stop = [], first + count
  while first < stop:
    epoch, start = divmod(first, n)
    parts.append(_permutation(seed, epoch, n)[start : start + stop - first])
    first += len(parts[-1])
  return np.concatenate(parts)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def digits(*, conditional: bool = True) -> Source:
  """The 1,797 real 8x8 scans that ship inside scikit-learn: no download.

  x0 has mean 0 and standard deviation 0.5, inside [-0.41, 0.93].

  Source: Alpaydin & Kaynak 1998, test part (UCI "Optical Recognition of Handwritten
  Digits").
  """
  scans = datasets.load_digits()
  examples = scans.images[..., None].astype(np.float32)
  return Source(
    name='digits (scikit-learn, 8x8)',
    examples=examples,
    labels=scans.target if conditional else None,
    classes=10 if conditional else 0,
    low=0.0,
    high=16.0,
    offset=float(examples.mean()),
    scale=float(0.5 / examples.std()),
    flip=False,
  )


def tfds(
  *,
  name: str,
  split: str = 'train',
  data_dir: str = '',
  conditional: bool = False,
  flip: bool = False,
  quoted_as: str = '',
) -> Source:
  """A data set prepared by TFDS in the `array_record` format, read without TensorFlow.

  `data_dir` falls back to the variable CMJAX_DATA_DIR, then to TFDS's own default.
  `quoted_as` is the name to print beside numbers, `name` where it is empty.

  Raises: UserError if the data set is not there, or has no image, or no label where
    the model is conditional.
  """
  place = data_dir or os.environ.get(DATA_DIR_VARIABLE, '') or None
  try:
    builder = tensorflow_datasets.builder(name, data_dir=place)
    records = builder.as_data_source(split=split)
  except Exception as error:  # TFDS raises many kinds; all mean that it is not there
    raise UserError(
      f'config.data: no data set {name!r} split {split!r} in array_record format under '
      f'{place or "the default TFDS folder"} ({first_line(error)}); prepare it with '
      f'TFDS, or point config.data.data_dir or {DATA_DIR_VARIABLE} at it'
    ) from error
  features = builder.info.features
  if 'image' not in features:
    raise UserError(f'config.data: {name!r} has no image; it has {", ".join(features)}')
  label = dict(features.items()).get('label')
  if conditional and not hasattr(label, 'num_classes'):
    raise UserError(
      f'config.data: {name!r} has no class label, and the model is conditional; '
      'set config.data.conditional=False'
    )
  rows = [records[i] for i in range(len(records))]
  labels = np.array([row['label'] for row in rows]) if conditional else None
  return _images(
    quoted_as or name,
    np.stack([row['image'] for row in rows]),
    labels,
    label.num_classes if conditional else 0,
    flip,
  )


def array(*, path: str, conditional: bool = False, flip: bool = False) -> Source:
  """Your own data: an `.npz`, or a folder of images.

  An `.npz` holds `images` uint8[N, H, W, C], or f32 in [-1, 1] as that or [N, D],
  and, for a conditional model, `labels` i[N] from 0. In a folder, images lie at any
  depth, all of one size, and are read as RGB, grey ones too; the name of the first
  sub-folder is the label.

  Raises: UserError if there is nothing there, images differ in size, values leave
    [-1, 1], or labels are missing where the model is conditional.
  """
  place = Path(path)
  if place.is_dir():
    examples, labels = _read_folder(place, conditional)
  elif place.suffix == '.npz' and place.is_file():
    examples, labels = _read_npz(place, conditional)
  else:
    raise UserError(f'config.data.path: {path!r} is neither a folder nor an .npz file')
  if flip and examples.ndim != 4:
    raise UserError(f'config.data.flip: {path} holds no images to flip, but points')
  classes = 0 if labels is None else int(labels.max()) + 1
  return _images(place.name, examples, labels, classes, flip)


def points(*, oracle: oracles.Mixture, samples: int = 50_000, seed: int = 0) -> Source:
  """Samples f32[samples, D] of an oracle, drawn once from `seed`."""
  drawn = oracles.sample(oracle, jax.random.key(seed), samples)
  examples = np.asarray(drawn, np.float32)
  return Source(
    name=f'{len(oracle.weights)}-mode mixture',
    examples=examples,
    labels=None,
    classes=0,
    low=-np.inf,
    high=np.inf,
    offset=0.0,
    scale=1.0,
    flip=False,
  )


def blank(
  *, size: int, channels: int = 3, classes: int = 0, examples: int = 50_000
) -> Source:
  """Black images uint8[examples, size, size, channels] that take no memory.

  For compiling or timing a step without its data set; labels are 0 of `classes`.

  Raises: ValueError for a size, channels or examples below 1, or negative classes.
  """
  if min(size, channels, examples) < 1 or classes < 0:
    raise ValueError(
      f'needs {size=}, {channels=}, {examples=} >= 1 and {classes=} >= 0'
    )
  black = np.broadcast_to(np.uint8(0), (examples, size, size, channels))
  labels = np.broadcast_to(0, examples) if classes else None
  return _images('blank images', black, labels, classes, False)


def _images(name, examples, labels, classes, flip) -> Source:
  if examples.dtype == np.uint8:
    low, high, offset, scale = 0.0, 255.0, 127.5, 1 / 127.5
  else:
    low, high, offset, scale = -1.0, 1.0, 0.0, 1.0
  return Source(name, examples, labels, classes, low, high, offset, scale, flip)


def _read_npz(place: Path, conditional: bool):
  try:
    with np.load(place, allow_pickle=False) as file:
      arrays = dict(file)
  except Exception as error:  # zip, header and pickle faults each raise their own kind
    raise UserError(f'config.data.path: cannot read {place} ({error})') from error
  if 'images' not in arrays:
    raise UserError(f"config.data.path: {place} has no 'images'; it has {list(arrays)}")
  images = arrays['images']
  if images.dtype.kind not in 'fiu':
    raise UserError(
      f"config.data.path: 'images' of {place} are {images.dtype}; store uint8 or "
      'float32'
    )
  if images.dtype != np.uint8:
    images = images.astype(np.float32)
    if not np.all(np.abs(images) <= 1):
      raise UserError(
        f"config.data.path: 'images' of {place} leave [-1, 1] or are not numbers; "
        'store uint8, or scale them'
      )
  if not images.size or images.ndim not in (
    (4,) if images.dtype == np.uint8 else (2, 4)
  ):
    raise UserError(
      f"config.data.path: 'images' of {place} have shape {images.shape}; store uint8 "
      'as [N, H, W, C], float32 as that or [N, D]'
    )
  if not conditional:
    return images, None
  if 'labels' not in arrays or arrays['labels'].shape != images.shape[:1]:
    raise UserError(
      f"config.data.path: {place} has no 'labels' of shape ({len(images)},), and the "
      'model is conditional; add them, or set config.data.conditional=False'
    )
  labels = arrays['labels']
  if labels.dtype.kind not in 'iu' or labels.min() < 0:
    raise UserError(f"config.data.path: 'labels' of {place} must be integers from 0")
  return images, labels


def _read_folder(place: Path, conditional: bool):
  files = sorted(p for p in place.rglob('*') if p.suffix.lower() in IMAGE_SUFFIXES)
  if not files:
    raise UserError(
      f'config.data.path: no image in {place}; looked for {sorted(IMAGE_SUFFIXES)}'
    )
  images = [_read_image(file) for file in files]
  for file, image in zip(files, images):
    if image.shape != images[0].shape:
      raise UserError(
        f'config.data.path: images differ in size: {files[0]} is '
        f'{images[0].shape[1]}x{images[0].shape[0]}, {file} is '
        f'{image.shape[1]}x{image.shape[0]}; resize them first'
      )
  if not conditional:
    return np.stack(images), None
  names = [file.relative_to(place).parts[0] for file in files]
  if any(file.parent == place for file in files):
    raise UserError(
      f'config.data.path: {place} has images outside a class folder, and the model is '
      'conditional; sort them into folders, or set config.data.conditional=False'
    )
  return np.stack(images), np.unique(names, return_inverse=True)[1]


def _read_image(file: Path) -> np.ndarray:
  try:
    with Image.open(file) as image:
      if image.mode[0] in 'IF' or 'A' in image.mode:  # convert() would cut silently
        raise OSError(f'mode {image.mode}; store 8 bits a channel, no transparency')
      return np.asarray(image.convert('RGB'))
  except (UnidentifiedImageError, OSError) as error:
    raise UserError(f'config.data.path: cannot read {file} ({error})') from error
