"""Data sets prepared by TensorFlow Datasets (TFDS)."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
import re
from typing import Any

import numpy as np

from cmjax.core import UserError, first_line
from cmjax.data import decoded, images
from cmjax.data.disk import examples_of, facts_of, fits
from cmjax.data.reading import checked_images, local, reading
from cmjax.data.source import Source, image_source

DATA_DIR_VARIABLE = 'CMJAX_DATA_DIR'


def tfds(
  *,
  name: str,
  split: str = 'train',
  data_dir: str = '',
  conditional: bool = False,
  flip: bool = False,
  display_name: str = '',
  size: int = 0,
  crop: str = '',
  memory_gib: float = 4.0,
) -> Source:
  """A data set prepared by TFDS in `array_record` format, read without TensorFlow.

  A set that stays in memory is cached, decoded; its next start does not import TFDS.

  Args:
    name: DATA_SET or DATA_SET/CONFIG, either with :VERSION.
    split: in the notation of TFDS, such as 'train' or 'test[:64]'.
    data_dir: the folder of TFDS; if empty, the environment variable CMJAX_DATA_DIR, or
      else the default of TFDS.
    conditional: whether to read the labels.
    flip: whether to mirror each image left to right with probability 1/2.
    display_name: printed next to results; if empty, `name`.
    size: of the squares that images become, in pixels; 0: all have one size already.
    crop: how they become squares: edm, adm or lsun, as `images.Resize` explains; empty:
      they are squares.
    memory_gib: the images stay in memory if they take at most so many GiB (2**30
      bytes); else they are decoded as they are used. The batches are the same.

  Raises: UserError if the data set is missing or damaged, has no images, or no labels
    and `conditional` is set, or needs code that is not part of TFDS.
  """
  if not re.fullmatch(
    r'[a-z][a-z0-9_]*(/\w[\w.-]*)?(:[\d*]+(\.[\d*]+)*)?', name, re.ASCII
  ):
    raise UserError(
      f'config.data.name: {name!r} is not a TFDS name; use DATA_SET, DATA_SET/CONFIG '
      'or either with :VERSION'
    )
  resize = images.resize_of(size, crop)
  data_dir = data_dir or os.environ.get(DATA_DIR_VARIABLE, '') or _default_folder()
  folder = local(data_dir, 'config.data.data_dir').expanduser()
  _check_features(folder / re.split('[/:]', name)[0])
  identity = _identity(folder, name, split, resize)
  examples, labels, classes = _cached(identity, conditional, memory_gib)
  if examples is None:
    records = _Records(*_open(folder, name, split), resize, identity)
    if conditional:
      labels, classes = records.labels()
    examples = examples_of(records, memory_gib, f'config.data: the images of {records}')
  if isinstance(examples, np.ndarray):
    what = f'config.data: the images of {name!r} split {split!r}'
    examples = checked_images(examples, what)
  return image_source(display_name or name, examples, labels, classes, flip)


def _default_folder() -> str:
  """The default of TFDS, which takes a second to import."""
  return os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')


def _identity(folder: Path, name: str, split: str, resize: images.Resize) -> str:
  root = folder / re.split('[/:]', name)[0]
  files = [p for depth in ('*', '*/*', '*/*/*') for p in root.glob(depth)]
  names = [str(path.relative_to(root)) for path in files if path.is_file()]
  facts = facts_of(root, sorted(names))
  decoders = images.PILLOW, importlib.util.find_spec('cv2') is not None
  return repr((decoders, name, split, *resize, str(root.resolve()), facts))


def _cached(
  identity: str, conditional: bool, memory_gib: float
) -> tuple[np.ndarray | None, np.ndarray | None, int]:
  """Images, labels and number of classes in the cache; images are None if not there."""
  labels, classes = None, 0
  if conditional:
    known = decoded.found(_of_labels(identity))
    if known is None:
      return None, None, 0
    labels, classes = known['labels'], int(known['classes'])
  found = decoded.found(identity, memory_gib * 2**30) or {}
  found = found.get('images')
  if found is None or not fits(found.nbytes, memory_gib, 'config.data: the images'):
    return None, labels, classes
  return found, labels, classes


def _of_labels(identity: str) -> str:
  return f'labels of {identity}'


def _open(folder: Path, name: str, split: str) -> tuple[Any, str]:
  import tensorflow_datasets  # slow to import

  what = f'{name!r} split {split!r}'
  try:
    # The annotations of TFDS do not fit its decorators and feature dicts.
    builder: Any = tensorflow_datasets.builder(name, data_dir=str(folder))
    records = builder.as_data_source(split=split)
    features = dict(builder.info.features.items())
  except Exception as error:  # of any type: the data set cannot be read
    raise UserError(
      f'config.data: no data set {what} in array_record format under '
      f'{folder} ({first_line(error)}); prepare it with '
      f'TFDS, or point config.data.data_dir or {DATA_DIR_VARIABLE} at it'
    ) from error
  if 'image' not in features:
    raise UserError(f'config.data: {name!r} has no image; it has {", ".join(features)}')
  if not len(records):
    raise UserError(f'config.data: {what} has no examples')
  return records, what


@dataclasses.dataclass(frozen=True, eq=False)
class _Records:
  """The images of a data source of TFDS: a `disk.Reader`."""

  records: Any
  what: str  # name and split
  resize: images.Resize
  files: str  # the `identity`

  def __len__(self) -> int:
    return len(self.records)

  def __str__(self) -> str:
    return self.what

  def name(self, i: int) -> str:
    return f'example {i} of {self.what}'

  def read(self, index):
    try:
      rows = self.records.__getitems__(list(index))  # twice as fast as one by one
    except Exception:  # of any type; found again below, with its example
      rows = None
    for n, i in enumerate(index):
      with reading(f'config.data: cannot read {self.name(i)}'):
        image = (self.records[i] if rows is None else rows[n])['image']
        image = images.resized(image, self.resize)
      yield image

  def identity(self) -> str:
    return self.files

  def labels(self) -> tuple[np.ndarray, int]:
    """The labels i64[N], and the number of classes.

    Raises: UserError if there are none, or one is out of range.
    """
    features = dict(self.records.dataset_info.features.items())
    classes = getattr(features.get('label'), 'num_classes', None) or 0
    if not classes:
      raise UserError(
        f'config.data: {self.what} has no class label, and the model is conditional; '
        'set config.data.conditional=False'
      )

    def read() -> decoded.Arrays:
      from tensorflow_datasets import decode

      skip = {'image': decode.SkipDecoding()}
      encoded = dataclasses.replace(self.records, decoders=skip)
      labels = np.empty(len(self), np.int64)
      for i in range(len(self)):
        with reading(f'config.data: cannot read {self.name(i)}'):
          labels[i] = encoded[i]['label']
      if not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(
          f'config.data: labels of {self.what} leave [0, {classes - 1}], so that some '
          'examples have no class; set config.data.conditional=False, or use another '
          'split'
        )
      return {'labels': labels, 'classes': np.array(classes)}

    return decoded.cached(_of_labels(self.files), read)['labels'], classes


def _check_features(folder: Path) -> None:
  """Raises: UserError if the features of a folder need code that is not part of TFDS.

  TFDS would import the modules that they name, and so run code from the data set.
  """
  for depth in ('', '*/', '*/*/'):  # DATA_SET/CONFIG/VERSION
    for path in folder.glob(f'{depth}features.json'):
      with reading(f'config.data.data_dir: cannot read {path}'):
        if not path.is_file():
          raise OSError('not a file')
        names = _feature_classes(json.loads(path.read_text(encoding='utf-8')))
      for name in names:
        if not str(name).startswith('tensorflow_datasets.'):
          raise UserError(
            f'config.data.data_dir: {path} needs code that is not part of TFDS '
            f'({str(name)[:80]!r}); prepare it with features of TFDS'
          )


def _feature_classes(value: Any) -> list[Any]:
  """Every class of a feature that the JSON names, in TFDS's new and old format."""
  if isinstance(value, str):  # the old format nests JSON in strings
    try:
      value = json.loads(value)
    except ValueError:
      return []
  if isinstance(value, list):
    return [name for part in value for name in _feature_classes(part)]
  if not isinstance(value, dict):
    return []
  names = [value[k] for k in ('pythonClassName', 'python_class_name') if k in value]
  if 'type' in value and 'content' in value:
    names.append(value['type'])
  # A dict under such a key is a feature of that name, which is searched below.
  names = [name for name in names if not isinstance(name, dict)]
  return names + _feature_classes(list(value.values()))
