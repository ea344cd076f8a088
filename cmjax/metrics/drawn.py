"""The samples that a metric measures, and the type of a metric."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Metric = Callable[['Drawn'], dict[str, float]]


class Drawn(NamedTuple):
  """Samples of one sampler."""

  x: np.ndarray  # f32[N, ...], clipped to the range of the data
  labels: np.ndarray | None  # i[N], labels that the samples were conditioned on
  evaluations: int  # of the network, per sample
