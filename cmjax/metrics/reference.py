"""What samples are compared with: statistics or images from a file, or the data."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.metrics import frechet
from cmjax.metrics.feature_network import FeatureNetwork
from cmjax.metrics.metric import Batches

OUTPUTS = {'frechet': 'pool', 'spatial_frechet': 'spatial'}
_BATCH = 64  # images


class Statistics(NamedTuple):
  """Reference statistics from a file, in place of the data."""

  name: str  # of the file and its entry, shown with the numbers
  mean: np.ndarray  # f64[D] of pool
  covariance: np.ndarray  # f64[D, D], symmetric
  spatial_mean: np.ndarray | None = None
  spatial_covariance: np.ndarray | None = None
  images: np.ndarray | None = None  # u8[N, H, W, C]

  def gaussian(self, output: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of an output of the network.

    Raises: ValueError if the file has none of it.
    """
    mean, covariance = self.mean, self.covariance
    if output == 'spatial':
      mean, covariance = self.spatial_mean, self.spatial_covariance
    if mean is None or covariance is None:
      raise ValueError(f'reference: {self.name} has no spatial statistics')
    return mean, covariance


class Gaussians:
  """Means and covariances of samples and of the data; the latter are computed once."""

  def __init__(self, reference: Statistics | None, covariance: str):
    self._reference, self._covariance = reference, covariance
    self._data: Batches | None = None
    self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}

  def of(self, batches: Batches, output: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean f64[D] and covariance f64[D, D] of an output of the network.

    Raises: ValueError if there are too few examples.
    """
    total = None
    for batch in batches:
      part = frechet.moments(batch[output])
      total = part if total is None else frechet.merge(total, part)
    if total is None:
      raise ValueError('a Frechet distance of no examples')
    return total.mean, total.covariance(self._covariance)

  def of_data(self, data: Batches, output: str) -> tuple[np.ndarray, np.ndarray]:
    """Those of the reference, if there is one, else of the data."""
    if self._reference is not None:
      return self._reference.gaussian(output)
    if data is not self._data:
      self._data, self._known = data, {}
    if output not in self._known:
      self._known[output] = self.of(data, output)
    return self._known[output]


class ImageFeatures:
  """The output `pool` of images u8[N, H, W, C] of a reference, computed once."""

  def __init__(self, network: FeatureNetwork, images: np.ndarray):
    self._network, self._images = network, images
    self._batches: list[dict[str, np.ndarray]] = []

  def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
    """Yields the features of each batch."""
    if not self._batches:
      params = jax.device_put(self._network.params)
      for start in range(0, len(self._images), _BATCH):
        images = jnp.asarray(self._images[start : start + _BATCH], jnp.float32)
        pool = self._network.apply(params, images)['pool']
        self._batches.append({'pool': np.asarray(pool)})
    return iter(self._batches)


def check(
  reference: Statistics, network: FeatureNetwork, sizes: Mapping[str, int]
) -> None:
  """Raises: ValueError if statistics or images are not those of a network.

  `sizes` are the numbers of features by measure.
  """
  for measure, output in OUTPUTS.items():
    if measure in sizes:
      size = len(reference.gaussian(output)[0])
      if size != sizes[measure]:
        raise ValueError(
          f'reference: {reference.name} has {size} features, and {network.name} has '
          f'{sizes[measure]} for {measure}; it belongs to another network'
        )
  images = reference.images
  if images is not None and images.shape[3] != network.shape[2]:
    raise ValueError(
      f'reference: {reference.name} has images with {images.shape[3]} channels, and '
      f'{network.name} takes {network.shape[2]}'
    )
