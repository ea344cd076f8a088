"""Metrics of raw pixels; none of them is an FID."""

import functools

import jax.numpy as jnp
import numpy as np

from cmjax.core import Array, Params
from cmjax.metrics.frechet import Moments, frechet, merge, moments
from cmjax.metrics.metric import Batches, Metric


def pixel_frechet() -> Metric:
  """Frechet distance between the pixels of the samples and of all data.

  Both are scaled so that the data has standard deviation 0.5 over all pixels.
  """

  def features(params: Params, x: Array, labels: Array | None) -> dict[str, Array]:
    return {'pixels': jnp.reshape(x, (len(x), -1))}

  last: list[tuple[Batches, Moments]] = []  # of the data, computed once

  def of_data(data: Batches) -> tuple[Moments, float]:
    if not last or last[0][0] is not data:
      last[:] = [(data, _moments(data))]
    found = last[0][1]
    mean, variance = found.mean, np.diag(found.covariance('biased'))
    return found, 0.25 / np.mean(variance + (mean - mean.mean()) ** 2)

  def values(samples: Batches, data: Batches) -> dict[str, float]:
    drawn, (real, scale) = _moments(samples), of_data(data)
    a, b = ((m.mean, m.covariance()) for m in (drawn, real))
    return {'pixel_frechet': scale * frechet(*a, *b)}

  return Metric((), features, values)


def _moments(batches: Batches) -> Moments:
  return functools.reduce(merge, (moments(batch['pixels']) for batch in batches))


def label_agreement(*, real: np.ndarray, labels: np.ndarray | None) -> Metric:
  """Fraction of samples that a classifier assigns the label they were conditioned on.

  The classifier is a logistic regression on pixels, fitted to all data f32[N, ...] with
  its labels i[N]. A sample that is not finite counts as a disagreement.

  Raises: ValueError if the data has no labels.
  """
  if labels is None:
    raise ValueError('label_agreement needs labels; use conditional data')
  # No other metric needs it, and it is slow to import.
  from sklearn import linear_model

  classifier = linear_model.LogisticRegression(max_iter=1000)
  classifier.fit(np.reshape(real, (len(real), -1)), labels)
  coefficients = {'kernel': classifier.coef_.T, 'bias': classifier.intercept_}
  params = {name: np.float32(value) for name, value in coefficients.items()}
  classes = classifier.classes_

  def features(params: Params, x: Array, labels: Array | None) -> dict[str, Array]:
    pixels = jnp.reshape(x, (len(x), -1))
    finite = jnp.all(jnp.isfinite(pixels), axis=1)
    logits = jnp.where(finite[:, None], pixels, 0.0) @ params['kernel']
    logits += params['bias'][None]
    if len(classes) == 2:
      logits = jnp.concatenate([jnp.zeros_like(logits), logits], axis=1)
    predicted = jnp.asarray(classes)[jnp.argmax(logits, axis=1)]
    return {'agrees': (predicted == labels) & finite}

  def values(samples: Batches, data: Batches) -> dict[str, float]:
    agrees = np.concatenate([batch['agrees'] for batch in samples])
    return {'label_agreement': float(np.mean(agrees))}

  return Metric(params, features, values, needs_data=False)
