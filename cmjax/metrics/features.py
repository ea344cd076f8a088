"""Distances between samples and data in the features of a network.

Only the 2015 Inception network gives numbers called FID, sFID, KID or Inception Score;
numbers of any other network begin with its name.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks
from cmjax.core import Array, Params
from cmjax.metrics import frechet, kernel, manifold
from cmjax.metrics.feature_network import (
  QUANTISATION,
  FeatureNetwork,
  quantised,
  value_name,
)
from cmjax.metrics.inception_score import inception_score
from cmjax.metrics.metric import Batches, Metric
from cmjax.metrics.reference import Gaussians, ImageFeatures, Statistics, check

# The output of a network that each measure compares.
MEASURES = {
  'frechet': 'pool',
  'spatial_frechet': 'spatial',
  'kernel': 'pool',
  'score': 'logits',
  'precision_recall': 'pool',
  'density_coverage': 'pool',
}


def distances(
  *,
  network: FeatureNetwork,
  measures: tuple[str, ...] = ('frechet',),
  quantisation: str = 'round',
  covariance: str = 'unbiased',
  reference: Statistics | None = None,
  num_subsets: int = 100,
  subset_size: int = 1000,
  split_size: int = 5000,
  num_neighbours: int = 3,
  num_neighbours_density: int = 5,
) -> Metric:
  """Measures of samples against data, in the features of a network.

  `kernel`, `precision_recall` and `density_coverage` keep the features of samples and
  data in memory as float32: 8 KiB an example for Inception. Others keep sums only.

  Args:
    network: the feature network, applied once for all measures.
    measures: some of `MEASURES`.
    quantisation: of samples x in [-1, 1] to images in [0, 255]. 'round': rint(127.5 x +
      127.5); 'edm': floor(127.5 x + 128); 'truncate': floor(127.5 (x + 1)), as OpenAI;
      'float': none. All are clipped. The first three restore data that was uint8.
    covariance: 'unbiased' (over N - 1) or 'biased' (over N).
    reference: statistics of the data from a file, for `frechet` and `spatial_frechet`;
      if it has images, they replace the data in all other measures.
    num_subsets: random subsets of `kernel`.
    subset_size: samples, and examples of the data, in each.
    split_size: samples in each split of `score`.
    num_neighbours: k of `precision_recall`.
    num_neighbours_density: k of `density_coverage`.

  Raises: ValueError if a value is out of range, the network lacks an output that a
    measure needs, or the reference has features of another size or too few images.
  """
  checks.choice(QUANTISATION, quantisation=quantisation)
  checks.choice(frechet.COVARIANCE, covariance=covariance)
  kernel.check_subsets(num_subsets, subset_size)
  checks.whole(1, split_size=split_size)
  manifold.check_neighbours(
    num_neighbours=num_neighbours, num_neighbours_density=num_neighbours_density
  )
  sizes = _sizes(network, measures)
  if reference is not None:
    check(reference, network, sizes)
  outputs = tuple(dict.fromkeys(MEASURES[measure] for measure in measures))
  needed = {
    'kernel': subset_size,
    'precision_recall': num_neighbours + 1,
    'density_coverage': num_neighbours_density + 1,
  }
  least = max(2, *(needed.get(measure, 2) for measure in measures))
  gaussians, images = Gaussians(reference, covariance), None
  if reference is not None and reference.images is not None:
    images = ImageFeatures(network, reference.images)
    if needed.keys() & set(measures) and len(reference.images) < least:
      raise ValueError(
        f'reference: {reference.name} has {len(reference.images)} images, and '
        f'{", ".join(measures)} need at least {least}'
      )

  def features(params: Params, x: Array, labels: Array | None) -> dict[str, Array]:
    if x.ndim != 4 or x.shape[3] != network.shape[2]:
      raise ValueError(
        f'{network.name} takes images [B, H, W, {network.shape[2]}], got {x.shape}'
      )
    found = network.apply(params, quantised(x, network.limits, quantisation))
    return {name: jnp.reshape(found[name], (len(x), -1)) for name in outputs}

  def values(samples: Batches, data: Batches) -> dict[str, float]:
    found: dict[str, float] = {}
    for measure in measures:
      if measure in ('frechet', 'spatial_frechet'):
        of_samples = gaussians.of(samples, MEASURES[measure])
        of_data = gaussians.of_data(data, MEASURES[measure])
        found[measure] = frechet.frechet(*of_samples, *of_data)
      elif measure == 'score':
        logits = (batch['logits'] for batch in samples)
        score = inception_score(logits, split_size=split_size)
        found['score'], found['score_std'] = score
    if needed.keys() & set(measures):
      found |= by_rows(_rows(samples), _rows(data if images is None else images))
    return {value_name(network.name, key): value for key, value in found.items()}

  def by_rows(samples: np.ndarray, data: np.ndarray) -> dict[str, float]:
    found: dict[str, float] = {}
    if 'kernel' in measures:
      found['kernel'], found['kernel_std'] = kernel.kernel_distance(
        samples, data, num_subsets=num_subsets, subset_size=subset_size
      )
    if 'precision_recall' in measures:
      fractions = manifold.precision_recall(
        samples, data, num_neighbours=num_neighbours
      )
      found |= fractions._asdict()
    if 'density_coverage' in measures:
      fractions = manifold.density_coverage(
        samples, data, num_neighbours=num_neighbours_density
      )
      found |= fractions._asdict()
    return found

  by_reference = {'score'}
  if reference is not None:
    by_reference |= {'frechet', 'spatial_frechet'}
  conventions = {
    'features': network.name,
    **network.conventions,
    'quantisation': quantisation,
    'covariance': covariance,
    'reference': 'all data' if reference is None else reference.name,
  }
  return Metric(
    network.params,
    features,
    values,
    needs_data=images is None and not set(measures) <= by_reference,
    min_samples=least,
    conventions=conventions,
  )


def _sizes(network: FeatureNetwork, measures: tuple[str, ...]) -> dict[str, int]:
  """The number of features that each measure compares.

  Raises: ValueError if a measure is unknown, or the network lacks its output.
  """
  if not measures:
    raise ValueError(f'measures is empty; known: {", ".join(MEASURES)}')
  if len(set(measures)) < len(measures):
    raise ValueError(f'measures has one twice: {", ".join(measures)}')
  for measure in measures:
    checks.choice(tuple(MEASURES), measures=measure)
  images = jax.ShapeDtypeStruct((1, *network.shape), jnp.float32)
  found = jax.eval_shape(network.apply, network.params, images)
  sizes = {}
  for measure in measures:
    output = MEASURES[measure]
    if output not in found:
      raise ValueError(
        f'measures: {measure} needs the output {output}, and {network.name} has '
        f'{", ".join(found)}'
      )
    sizes[measure] = math.prod(found[output].shape[1:])
  return sizes


def _rows(batches: Batches) -> np.ndarray:
  rows = [np.asarray(batch['pool'], np.float32) for batch in batches]
  if not rows:
    raise ValueError('a distance of no examples')
  return np.concatenate(rows)
