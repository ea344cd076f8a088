"""A classifier fitted to the labels of the data, as a feature network; cached."""

from collections.abc import Callable
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cmjax import checks
from cmjax.core import Array, Params
from cmjax.data.source import Source, batch_at, bounds, contents
from cmjax.metrics.feature_network import FeatureNetwork, quantised
from cmjax.networks import classifier as network
from cmjax.runtime import logs
from cmjax.runtime.feature_store import cache_folder, digest

_VERSION = '1'  # of the network and of the code below; another one fits again


def classifier(
  *,
  source: Source,
  num_steps: int = 300,
  batch_size: int = 128,
  learning_rate: float = 2e-3,
  seed: int = 0,
) -> FeatureNetwork:
  """A small convolutional network fitted to the images and labels of the data.

  Its features `pool` f32[B, 128] and `logits` f32[B, classes] are those of this data
  set only: numbers are comparable between samples of one data set and one version of
  cmjax. Adam with a cosine schedule, mirrored as in training (cmjax choice).

  The parameters are cached in CMJAX_CACHE_DIR, or ~/.cache/cmjax, by the contents of
  the data and the settings. A file that is damaged, or cannot be written, is ignored.

  Raises: ValueError if the data has no labels, or no images of at least 8 x 8 in a
    bounded range, or a value is out of range.
  """
  checks.whole(1, num_steps=num_steps)
  checks.whole(1, 2**16, batch_size=batch_size)
  checks.positive(learning_rate=learning_rate)
  checks.whole(0, 2**32 - 1, seed=seed)
  if source.labels is None:
    raise ValueError('classifier: needs labels; use conditional data')
  least = network.MIN_SIZE
  if len(source.shape) != 3 or min(source.shape[:2]) < least:
    raise ValueError(
      f'classifier: needs images of at least {least} x {least}, got examples '
      f'{source.shape}'
    )
  low, high = bounds(source)
  if not (np.isfinite(low) and np.isfinite(high)):
    raise ValueError('classifier: needs data in a bounded range')
  size = min(batch_size, len(source.examples))
  settings = (num_steps, size, learning_rate, seed)
  like = jax.eval_shape(
    lambda: network.init(jax.random.key(0), _shape(source), source.classes)
  )
  folder = cache_folder().parent / 'classifiers'
  path = folder / f'{_identity(source, settings)}.npz'
  params = _cached(path, like)
  if params is None:
    logs.say(f'fitting a classifier to {source.name} ...')
    params = _fit(source, (low, high), settings)
    _cache(path, params)
  return FeatureNetwork(
    'classifier',
    params,
    network.classifier,
    _shape(source),
    limits=(low, high),
    conventions={'weights': f'fitted to {source.name}'},
  )


def _shape(source: Source) -> tuple[int, int, int]:
  height, width, channels = source.shape
  return height, width, channels


def _fit(
  source: Source, limits: tuple[float, float], settings: tuple[int, int, float, int]
) -> Params:
  num_steps, batch_size, learning_rate, seed = settings
  init, step = _compiled(
    _shape(source), source.classes, limits, num_steps, learning_rate
  )
  params, state = init(jax.random.key(seed))
  # Steps are separate calls: in a compiled loop, gradients of convolutions are slow on
  # CPUs.
  for i in range(num_steps):
    batch = batch_at(source, seed, i, batch_size)
    params, state = step(params, state, batch.x0, batch.cond)
  return jax.tree.map(np.asarray, params)


@functools.lru_cache(maxsize=2)
def _compiled(
  shape: tuple[int, int, int],
  classes: int,
  limits: tuple[float, float],
  num_steps: int,
  learning_rate: float,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """The initialisation of parameters and optimiser, and a step of both."""
  tx = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

  def init(key):
    params = network.init(key, shape, classes)
    return params, tx.init(params)

  def loss(params: Params, images: Array, labels: Array) -> Array:
    logits = network.classifier(params, images)['logits']
    return jnp.mean(optax.softmax_cross_entropy(logits, labels))

  def step(params, state, x, labels):
    gradient = jax.grad(loss)(params, quantised(x, limits, 'float'), labels)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(init), jax.jit(step)


def _identity(source: Source, settings: tuple) -> str:
  """A hash of all that the parameters depend on."""
  facts = (_VERSION, settings, *bounds(source), source.scale, source.flip)
  facts += (source.classes, source.shape)
  return digest(repr(facts), *contents(source))


def _cached(path: Path, like: Params) -> Params | None:
  """The parameters in a file; None if it is missing, damaged or of another network."""
  leaves, structure = jax.tree.flatten(like)
  try:
    with np.load(path, allow_pickle=False) as file:
      found = [file[str(i)] for i in range(len(leaves))]
  except Exception:  # damaged bytes raise errors of many types
    return None
  for array, leaf in zip(found, leaves):
    if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
      return None
    if not np.all(np.isfinite(array)):
      return None
  return jax.tree.unflatten(structure, found)


def _cache(path: Path, params: Params) -> None:
  # `np.savez` names positional arrays itself; these names are read above.
  arrays: dict[str, Any] = {str(i): a for i, a in enumerate(jax.tree.leaves(params))}
  unfinished = path.with_suffix(f'.{os.getpid()}.unfinished')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(unfinished, 'wb') as file:
      np.savez(file, **arrays)
    os.replace(unfinished, path)
  except OSError as error:
    logs.say(f'{path}: cannot cache the classifier ({error.strerror})')
