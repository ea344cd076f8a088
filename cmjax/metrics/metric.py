"""The type of a metric: features of each batch, and values of all of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from cmjax.core import Array, Params

# Features of a set of examples, batch by batch: name -> f[B, ...]. It can be iterated
# over several times; only one batch is in memory at once.
Batches = Iterable[Mapping[str, np.ndarray]]


class Metric(NamedTuple):
  """A measure of samples against data, which sees one batch at a time.

  `features` is pure: (params, x f32[B, ...], labels i32[B] or None) to arrays f[B, ...]
  by name, with x in the units and the range of the data. It is compiled, and applied to
  samples and, if `needs_data`, to all data.
  """

  params: Params  # of the feature network; () if there is none
  features: Callable[[Params, Array, Array | None], dict[str, Array]]
  values: Callable[[Batches, Batches], dict[str, float]]  # (samples, data) -> numbers
  needs_data: bool = True  # if not, `values` receives no batches of data
  min_samples: int = 2  # and examples of the data, if it needs them
  conventions: Mapping[str, str] = {}  # what the numbers depend on, shown with them
