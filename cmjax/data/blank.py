"""Black images, for compiling or timing a step without its data set."""

import numpy as np

from cmjax.data.reading import MAX_CLASSES
from cmjax.data.source import MAX_EXAMPLES, Source, image_source
from cmjax.runtime import sharding


def blank(
  *, size: int, channels: int = 3, classes: int = 0, examples: int = 50_000
) -> Source:
  """Black images uint8[examples, size, size, channels] that take no memory.

  All labels are 0, of `classes` classes; with `classes=0` there are none.

  Raises: ValueError if size, channels or examples are below 1, classes are negative, or
    a batch of one does not fit into memory.
  """
  if min(size, channels, examples) < 1 or classes < 0:
    raise ValueError(
      f'needs {size=}, {channels=}, {examples=} >= 1 and {classes=} >= 0'
    )
  if examples > MAX_EXAMPLES or classes > MAX_CLASSES:
    raise ValueError(
      f'needs {examples=} <= {MAX_EXAMPLES} and {classes=} <= {MAX_CLASSES}'
    )
  if 4 * size**2 * channels > sharding.host_memory():
    raise ValueError(f'an image of {size=}, {channels=} does not fit into memory')
  black = np.broadcast_to(np.uint8(0), (examples, size, size, channels))
  labels = np.broadcast_to(0, examples) if classes else None
  return image_source('blank images', black, labels, classes, False)
