"""The Inception Score against closed forms."""

import numpy as np
import pytest

from cmjax.metrics.inception_score import inception_score


def certain(classes, n):
  """Logits of n one-hot predictions, each class in turn."""
  return np.where(np.arange(n)[:, None] % classes == np.arange(classes), 0.0, -np.inf)


def test_certain_and_balanced_predictions_score_the_number_of_classes():
  assert inception_score([certain(7, 70)]) == pytest.approx((7.0, 0.0), rel=1e-12)


def test_predictions_that_are_all_the_same_score_one():
  logits = np.tile(np.random.default_rng(0).normal(size=(1, 5)), (20, 1))
  assert inception_score([logits])[0] == pytest.approx(1.0, rel=1e-12)


def test_score_is_the_exponential_of_the_mutual_information():
  logits = np.random.default_rng(0).normal(size=(40, 6))
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  divergences = [np.sum(row * np.log(row / p.mean(0))) for row in p]
  exact = np.exp(np.mean(divergences))
  assert inception_score([logits])[0] == pytest.approx(exact, rel=1e-12)
  shifted = inception_score([logits + 1000.0])[0]  # exp of it overflows
  assert shifted == pytest.approx(exact, rel=1e-10)  # 1000 has three digits more


@pytest.mark.parametrize('sizes', [(23,), (1, 22), (10, 10, 3), (9, 14)])
def test_splits_do_not_depend_on_the_batches(sizes):
  logits = np.random.default_rng(0).normal(size=(23, 4))
  batches = np.split(logits, np.cumsum(sizes)[:-1])
  scores = [inception_score([logits[i : i + 10]])[0] for i in (0, 10, 20)]
  found = inception_score(batches, split_size=10)
  assert found == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_nothing_to_score_is_refused_and_nan_is_kept():
  with pytest.raises(ValueError, match='no samples'):
    inception_score([])
  with pytest.raises(ValueError, match='split_size must be'):
    inception_score([np.zeros((2, 2))], split_size=0)
  assert np.isnan(inception_score([np.full((2, 3), np.nan)])[0])
