"""Sources of examples, and (seed, step, process) -> host batch: the only door for tfds.

The batch of a step is a pure function of its arguments: resuming needs no saved cursor.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import json
import os
from pathlib import Path
import re
from typing import Any, NamedTuple
import warnings
import zipfile

import jax
import numpy as np
from PIL import Image
from sklearn import datasets
import tensorflow_datasets

from cmjax import oracles, sharding
from cmjax.core import Batch, UserError, first_line
from cmjax.fields import Reference

IMAGE_SUFFIXES = {'.png', '.jpg', '.jpeg', '.bmp', '.webp'}
DATA_DIR_VARIABLE = 'CMJAX_DATA_DIR'
MOST_CLASSES = 10**6  # a one-hot label of more is no longer a small part of a batch
MOST_EXAMPLES = 2**31 - 1  # indices are int32


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


def check_batch(source: Source, batch_size: int) -> None:
  """Refuses a batch that would hold an example twice.

  Raises: UserError with both numbers.
  """
  n = len(source.examples)
  if batch_size > n:
    raise UserError(
      f'config.batch_size: a batch of {batch_size} needs as many examples, and '
      f'{source.name} has {n}; give at most {n}'
    )


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
  needed = len(members) * size * source.examples[:1].nbytes
  _check_memory(needed, f'{len(members)} classes of up to {size} examples')
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
  rows = np.zeros((len(index), source.classes), np.float32)
  rows[np.arange(len(index)), source.labels[index]] = 1
  return rows


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

  Raises: UserError if the data set is missing or damaged, needs code that is not part
    of TFDS, or has no image, or no label where the model is conditional.
  """
  if not re.fullmatch(
    r'[a-z][a-z0-9_]*(/\w[\w.-]*)?(:[\d*]+(\.[\d*]+)*)?', name, re.ASCII
  ):
    raise UserError(
      f'config.data.name: {name!r} is no TFDS name; give DATA_SET, DATA_SET/CONFIG or '
      'either with :VERSION'
    )
  place = data_dir or os.environ.get(DATA_DIR_VARIABLE, '')
  place = place or tensorflow_datasets.core.constants.DATA_DIR
  if '://' in place:
    raise UserError(
      f'config.data.data_dir: {place} is not in a local or mounted folder; copy it to '
      'one, or mount the bucket'
    )
  folder = Path(place).expanduser()
  _check_features(folder / re.split('[/:]', name)[0])
  try:
    builder = tensorflow_datasets.builder(name, data_dir=str(folder))
    records = builder.as_data_source(split=split)
    features = builder.info.features
  except Exception as error:  # TFDS raises many kinds; all mean that it is not there
    raise UserError(
      f'config.data: no data set {name!r} split {split!r} in array_record format under '
      f'{folder} ({first_line(error)}); prepare it with '
      f'TFDS, or point config.data.data_dir or {DATA_DIR_VARIABLE} at it'
    ) from error
  if 'image' not in features:
    raise UserError(f'config.data: {name!r} has no image; it has {", ".join(features)}')
  label = dict(features.items()).get('label')
  if conditional and not getattr(label, 'num_classes', None):
    raise UserError(
      f'config.data: {name!r} has no class label, and the model is conditional; '
      'set config.data.conditional=False'
    )
  where = f'config.data: the images of {name!r} split {split!r}'
  images, labels = None, np.zeros(len(records), np.int64)
  for i in range(len(records)):
    with _reading(f'config.data: cannot read example {i} of {name!r} split {split!r}'):
      row = records[i]
    image = row['image']
    if images is None:
      images = _room_for(len(records), image, where)
    if image.shape != images.shape[1:]:
      raise UserError(
        f'{where} differ in size: example 0 is {images.shape[1:]}, example {i} is '
        f'{image.shape}'
      )
    images[i] = image
    labels[i] = row['label'] if conditional else 0
  if images is None:
    raise UserError(f'config.data: {name!r} split {split!r} has no examples')
  images = _checked_images(images, where)
  if conditional and not (0 <= labels.min() <= labels.max() < label.num_classes):
    raise UserError(
      f'config.data: labels of {name!r} split {split!r} leave 0 to '
      f'{label.num_classes - 1}: some examples have none; set '
      'config.data.conditional=False, or give another split'
    )
  return _images(
    quoted_as or name,
    images,
    labels if conditional else None,
    label.num_classes if conditional else 0,
    flip,
  )


def _check_features(folder: Path) -> None:
  """Refuses a TFDS folder whose features name code that is not part of TFDS.

  TFDS imports the module of a feature that it does not know, which runs it.
  """
  for depth in ('', '*/', '*/*/'):  # DATA_SET/CONFIG/VERSION
    for path in folder.glob(f'{depth}features.json'):
      with _reading(f'config.data.data_dir: cannot read {path}'):
        if not path.is_file():
          raise OSError('not a file')
        names = _feature_classes(json.loads(path.read_text(encoding='utf-8')))
      for name in names:
        if not str(name).startswith('tensorflow_datasets.'):
          raise UserError(
            f'config.data.data_dir: {path} needs code that is not part of TFDS '
            f'({str(name)[:80]!r}), and is not opened; prepare it with features of TFDS'
          )


def _feature_classes(value: Any) -> list[Any]:
  """Everything that JSON gives as the class of a feature, in new and old spelling."""
  if isinstance(value, str):  # the old spelling has JSON inside of JSON
    try:
      value = json.loads(value)
    except ValueError:
      return []
  if isinstance(value, list):
    return [name for part in value for name in _feature_classes(part)]
  if not isinstance(value, dict):
    return []
  found = [value[k] for k in ('pythonClassName', 'python_class_name') if k in value]
  if 'type' in value and 'content' in value:
    found.append(value['type'])
  # A feature may itself be called like that: then it is a dict of its own.
  found = [name for name in found if not isinstance(name, dict)]
  return found + _feature_classes(list(value.values()))


def array(*, path: str, conditional: bool = False, flip: bool = False) -> Source:
  """Your own data: an `.npz`, or a folder of images.

  An `.npz` holds `images` uint8[N, H, W, C], or f32 in [-1, 1] as that or [N, D],
  and, for a conditional model, `labels` i[N] from 0. In a folder, images lie at any
  depth, also behind links, all of one size, and are read as RGB, grey ones too; the
  name of the first sub-folder is the label.

  Raises: UserError if there is nothing there, images differ in size, values leave
    [-1, 1], labels are missing where the model is conditional, or there are more than
    fit into memory.
  """
  if not path.strip():
    raise UserError('config.data.path: is empty; give a folder or an .npz file')
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
  """Samples f32[samples, D] of an oracle, drawn once from `seed`.

  Raises: ValueError for samples below 1, or more than fit into memory.
  """
  if not 1 <= samples <= MOST_EXAMPLES:
    raise ValueError(f'needs 1 <= {samples=} <= {MOST_EXAMPLES}')
  # A number a mode to draw the mode by, then the point and its noise.
  size = 4 * samples * (oracle.weights.size + 2 * oracle.means.shape[1])
  if size > sharding.host_memory():
    raise ValueError(f'{samples=} do not fit into memory')
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

  Raises: ValueError for a size, channels or examples below 1, negative classes, or
    numbers too large for a batch of one.
  """
  if min(size, channels, examples) < 1 or classes < 0:
    raise ValueError(
      f'needs {size=}, {channels=}, {examples=} >= 1 and {classes=} >= 0'
    )
  if examples > MOST_EXAMPLES or classes > MOST_CLASSES:
    raise ValueError(
      f'needs {examples=} <= {MOST_EXAMPLES} and {classes=} <= {MOST_CLASSES}'
    )
  if 4 * size**2 * channels > sharding.host_memory():
    raise ValueError(f'an image of {size=}, {channels=} does not fit into memory')
  black = np.broadcast_to(np.uint8(0), (examples, size, size, channels))
  labels = np.broadcast_to(0, examples) if classes else None
  return _images('blank images', black, labels, classes, False)


def described(source: Source) -> dict[str, Any]:
  """What samples need to know of their data, for JSON: null where there is no bound."""

  def bound(value):
    return float(value) if np.isfinite(value) else None

  return {
    'name': source.name,
    'low': bound(source.low),
    'high': bound(source.high),
    'offset': float(source.offset),
    'scale': float(source.scale),
  }


def unseen(
  shape: tuple[int, ...], classes: int, known: Mapping[str, Any] | None = None
) -> Source:
  """A stand-in for the data of a model that is sampled without it: no examples.

  `known` is what `described` tells of the data; without it, images [H, W, C] are taken
  to have been uint8, and points to have no range.
  """
  labels = np.arange(classes) if classes else None
  if known is None and len(shape) == 3:
    return _images('', np.zeros((0, *shape), np.uint8), labels, classes, False)
  known = known or dict(name='', low=None, high=None, offset=0.0, scale=1.0)
  return Source(
    name=known['name'],
    examples=np.zeros((0, *shape), np.float32),
    labels=labels,
    classes=classes,
    low=-np.inf if known['low'] is None else known['low'],
    high=np.inf if known['high'] is None else known['high'],
    offset=known['offset'],
    scale=known['scale'],
    flip=False,
  )


def _images(name, examples, labels, classes, flip) -> Source:
  if examples.dtype == np.uint8:
    low, high, offset, scale = 0.0, 255.0, 127.5, 1 / 127.5
  else:
    low, high, offset, scale = -1.0, 1.0, 0.0, 1.0
  return Source(name, examples, labels, classes, low, high, offset, scale, flip)


def _check_memory(size: int, what: str) -> None:
  if size > sharding.host_memory():
    raise UserError(
      f'{what} take {size / 2**30:.3g} GiB, and this machine has '
      f'{sharding.host_memory() / 2**30:.3g}; give fewer or smaller ones'
    )


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
  """Makes one line of the many kinds of error that a damaged file surfaces as."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    raise UserError(f'{what} ({first_line(error)})') from error


def _room_for(n: int, image: np.ndarray, where: str) -> np.ndarray:
  """An array for n images like that one."""
  _check_memory(n * image.nbytes, where)
  return np.empty((n, *image.shape), image.dtype)


def _checked_images(images: np.ndarray, where: str) -> np.ndarray:
  """uint8 or f32 images or points, of a shape and range that models take."""
  if images.dtype.kind not in 'fiu':
    raise UserError(f'{where} are {images.dtype}; store uint8 or float32')
  of_bytes = images.dtype == np.uint8
  if not images.size or images.ndim not in ((4,) if of_bytes else (2, 4)):
    hint = '; one image is images[None], grey ones are images[..., None]'
    raise UserError(
      f'{where} have shape {images.shape}; store uint8 as [N, H, W, C], float32 as '
      f'that or [N, D]{hint if images.ndim == 3 else ""}'
    )
  if images.ndim == 4 and images.shape[3] not in (1, 3):
    hint = 'store one or three, such as images[..., :3]'
    if images.shape[1] in (1, 3):
      hint = 'move them last: np.moveaxis(images, 1, -1)'
    raise UserError(
      f'{where} have shape {images.shape}, which is {images.shape[3]} channels; {hint}'
    )
  if not of_bytes:
    with np.errstate(over='ignore'):  # infinity is refused below
      images = images.astype(np.float32)
    # NaN is neither.
    if not (images.min() >= -1 and images.max() <= 1):
      raise UserError(
        f'{where} leave [-1, 1] or are not numbers; store uint8, or scale them'
      )
  return images


def _read_npz(place: Path, conditional: bool):
  wanted = ['images', 'labels'] if conditional else ['images']
  with _reading(f'config.data.path: cannot read {place}'):
    with zipfile.ZipFile(place) as file:
      sizes = [(i.filename.removesuffix('.npy'), i.file_size) for i in file.infolist()]
    names = [name for name, _ in sizes]
    if 'images' not in names:
      raise UserError(f"config.data.path: {place} has no 'images'; it has {names}")
    size = sum(size for name, size in sizes if name in wanted)
    _check_memory(size, f'config.data.path: the arrays of {place}')
    with np.load(place, allow_pickle=False) as file:
      arrays = {name: np.asarray(file[name]) for name in wanted if name in names}
  images = _checked_images(arrays['images'], f"config.data.path: 'images' of {place}")
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
  if labels.max() >= min(len(labels), MOST_CLASSES):
    raise UserError(
      f"config.data.path: the largest of 'labels' of {place} is {labels.max()}, which "
      f'is too large for {len(labels)} examples; number the classes from 0, up to '
      f'{MOST_CLASSES} of them'
    )
  return images, labels.astype(np.int64)


def _read_folder(place: Path, conditional: bool):
  with _reading(f'config.data.path: cannot read {place}'):
    files = sorted(_image_files(place, ()))
  if not files:
    raise UserError(
      f'config.data.path: no image in {place}; looked for {sorted(IMAGE_SUFFIXES)}'
    )
  if conditional and any(file.parent == place for file in files):
    raise UserError(
      f'config.data.path: {place} has images outside a class folder, and the model is '
      'conditional; sort them into folders, or set config.data.conditional=False'
    )
  images = None
  for i, file in enumerate(files):
    image = _read_image(file)
    if images is None:
      images = _room_for(len(files), image, f'config.data.path: the images of {place}')
    if image.shape != images.shape[1:]:
      raise UserError(
        f'config.data.path: images differ in size: {files[0]} is '
        f'{images.shape[2]}x{images.shape[1]}, {file} is '
        f'{image.shape[1]}x{image.shape[0]}; resize them first'
      )
    images[i] = image
  if not conditional:
    return images, None
  names = [file.relative_to(place).parts[0] for file in files]
  return images, np.unique(names, return_inverse=True)[1]


def _image_files(folder: Path, above: Sequence[Path]) -> Iterator[Path]:
  """Paths of images at any depth, also behind links."""
  here = folder.resolve()
  if here in above:
    raise UserError(f'config.data.path: {folder} links to a folder that holds it')
  for path in folder.iterdir():
    if path.is_dir():
      yield from _image_files(path, (*above, here))
    elif path.suffix.lower() in IMAGE_SUFFIXES:
      yield path


def _read_image(file: Path) -> np.ndarray:
  with _reading(f'config.data.path: cannot read {file}'), warnings.catch_warnings():
    warnings.simplefilter('error', Image.DecompressionBombWarning)
    if not file.is_file():  # opening a pipe would wait for ever
      raise OSError('not a file')
    with Image.open(file) as image:
      # convert() would drop these without a warning
      if image.mode[0] in 'IF' or image.has_transparency_data:
        raise OSError(f'mode {image.mode}; store 8 bits a channel, no transparency')
      return np.asarray(image.convert('RGB'))
