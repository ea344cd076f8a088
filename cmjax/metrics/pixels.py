"""Metrics of raw pixels; none of them is an FID."""

import numpy as np

from cmjax.metrics.drawn import Drawn, Metric
from cmjax.metrics.frechet import frechet_distance


def pixel_frechet(*, real: np.ndarray) -> Metric:
  """Frechet distance between the pixels of the samples and of all data f32[N, ...].

  Both are scaled so that the data has standard deviation 0.5 over all pixels.
  """
  pixels = _pixels(real)
  scale = 0.5 / pixels.std()

  def metric(drawn: Drawn) -> dict[str, float]:
    samples = scale * _pixels(drawn.x)
    return {'pixel_frechet': frechet_distance(samples, scale * pixels)}

  return metric


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
  classifier.fit(_pixels(real), labels)

  def metric(drawn: Drawn) -> dict[str, float]:
    samples = _pixels(drawn.x)
    finite = np.all(np.isfinite(samples), axis=1)
    agrees = classifier.predict(np.where(finite[:, None], samples, 0.0)) == drawn.labels
    return {'label_agreement': float(np.mean(agrees & finite))}

  return metric


def _pixels(x: np.ndarray) -> np.ndarray:
  return x.reshape(len(x), -1)
