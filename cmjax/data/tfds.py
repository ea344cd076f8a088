"""Data sets prepared by TensorFlow Datasets (TFDS)."""

import json
import os
from pathlib import Path
import re
from typing import Any

import numpy as np
import tensorflow_datasets
from tensorflow_datasets.core import constants

from cmjax.core import UserError, first_line
from cmjax.data.reading import checked_images, empty_images, reading
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
) -> Source:
  """A data set prepared by TFDS in `array_record` format, read without TensorFlow.

  Args:
    name: DATA_SET or DATA_SET/CONFIG, either with :VERSION.
    split: in the notation of TFDS, such as 'train' or 'test[:64]'.
    data_dir: the folder of TFDS; if empty, the environment variable CMJAX_DATA_DIR, or
      else the default of TFDS.
    conditional: whether to read the labels.
    flip: whether to mirror each image left to right with probability 1/2.
    display_name: printed next to results; if empty, `name`.

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
  data_dir = data_dir or os.environ.get(DATA_DIR_VARIABLE, '') or constants.DATA_DIR
  if '://' in data_dir:
    raise UserError(
      f'config.data.data_dir: {data_dir} is not a local or mounted folder; copy it '
      'to one, or mount the bucket'
    )
  folder = Path(data_dir).expanduser()
  _check_features(folder / re.split('[/:]', name)[0])
  try:
    # The annotations of TFDS do not fit its decorators and feature dicts.
    builder: Any = tensorflow_datasets.builder(name, data_dir=str(folder))
    records = builder.as_data_source(split=split)
    features = dict(builder.info.features.items())
  except Exception as error:  # of any type: the data set cannot be read
    raise UserError(
      f'config.data: no data set {name!r} split {split!r} in array_record format under '
      f'{folder} ({first_line(error)}); prepare it with '
      f'TFDS, or point config.data.data_dir or {DATA_DIR_VARIABLE} at it'
    ) from error
  if 'image' not in features:
    raise UserError(f'config.data: {name!r} has no image; it has {", ".join(features)}')
  classes = getattr(features.get('label'), 'num_classes', None) or 0
  if conditional and not classes:
    raise UserError(
      f'config.data: {name!r} has no class label, and the model is conditional; '
      'set config.data.conditional=False'
    )
  where = f'config.data: the images of {name!r} split {split!r}'
  images, labels = None, np.zeros(len(records), np.int64)
  for i in range(len(records)):
    with reading(f'config.data: cannot read example {i} of {name!r} split {split!r}'):
      row = records[i]
    image = row['image']
    if images is None:
      images = empty_images(len(records), image, where)
    if image.shape != images.shape[1:]:
      raise UserError(
        f'{where} differ in size: example 0 is {images.shape[1:]}, example {i} is '
        f'{image.shape}'
      )
    images[i] = image
    labels[i] = row['label'] if conditional else 0
  if images is None:
    raise UserError(f'config.data: {name!r} split {split!r} has no examples')
  images = checked_images(images, where)
  if conditional and not (0 <= labels.min() <= labels.max() < classes):
    raise UserError(
      f'config.data: labels of {name!r} split {split!r} leave [0, {classes - 1}], so '
      'some examples have no class; set config.data.conditional=False, or use another '
      'split'
    )
  return image_source(
    display_name or name,
    images,
    labels if conditional else None,
    classes if conditional else 0,
    flip,
  )


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
