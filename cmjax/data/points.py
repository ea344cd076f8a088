"""Samples of a distribution whose consistency map is known."""

import jax
import numpy as np

from cmjax import oracles
from cmjax.data.source import MAX_EXAMPLES, Source
from cmjax.runtime import sharding


def points(
  *, oracle: oracles.Mixture, num_samples: int = 50_000, seed: int = 0
) -> Source:
  """Samples f32[num_samples, D] of a mixture of Gaussians, drawn once from `seed`.

  Raises: ValueError if num_samples is below 1, or they do not fit into memory.
  """
  if not 1 <= num_samples <= MAX_EXAMPLES:
    raise ValueError(f'needs 1 <= {num_samples=} <= {MAX_EXAMPLES}')
  # In float32; drawing a sample takes one number per mode, noise and the sample.
  size = 4 * num_samples * (oracle.weights.size + 2 * oracle.means.shape[1])
  if size > sharding.host_memory():
    raise ValueError(f'{num_samples=} do not fit into memory')
  samples = oracles.sample(oracle, jax.random.key(seed), num_samples)
  return Source(
    name=f'{len(oracle.weights)}-mode mixture',
    examples=np.asarray(samples, np.float32),
    labels=None,
    classes=0,
    low=-np.inf,
    high=np.inf,
    offset=0.0,
    scale=1.0,
    flip=False,
  )
