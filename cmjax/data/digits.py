"""The handwritten digits of scikit-learn."""

import numpy as np
from sklearn import datasets

from cmjax.data.source import Source


def digits(*, conditional: bool = True) -> Source:
  """1,797 scans f32[8, 8, 1] of handwritten digits, which ship with scikit-learn.

  x0 has mean 0 and standard deviation 0.5, inside [-0.41, 0.93].

  Source: Alpaydin & Kaynak 1998, test part (UCI "Optical Recognition of Handwritten
  Digits").
  """
  images, labels = datasets.load_digits(return_X_y=True)
  examples = np.reshape(images, (-1, 8, 8, 1)).astype(np.float32)
  return Source(
    name='digits (scikit-learn, 8x8)',
    examples=examples,
    labels=labels if conditional else None,
    classes=10 if conditional else 0,
    low=0.0,
    high=16.0,
    offset=float(examples.mean()),
    scale=float(0.5 / examples.std()),
    flip=False,
  )
