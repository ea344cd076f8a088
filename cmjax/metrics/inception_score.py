"""The Inception Score: exp E KL(p(y | x) || p(y)), from the logits of a classifier."""

from collections.abc import Iterable

import numpy as np

from cmjax import checks


def inception_score(
  batches: Iterable[np.ndarray], *, split_size: int = 5000
) -> tuple[float, float]:
  """Mean and standard deviation of the scores of consecutive splits.

  Logits f[B, K] by batch; computed in float64. The last split may be smaller. It lies
  in [1, K], and is an Inception Score only if the logits are those of the 2015
  Inception network: OpenAI and torch-fidelity take them without the bias.

  Raises: ValueError if there are no logits, or split_size < 1.

  Source: Salimans et al. 2016, section 4; openai/guided-diffusion `evaluator.py`.
  Differs: torch-fidelity shuffles the samples, and takes ten splits of any size.
  """
  checks.whole(1, split_size=split_size)
  scores, parts, count = [], [], 0
  for batch in batches:
    while len(batch):
      part, batch = np.split(batch, [split_size - count])
      parts.append(_sums(part))
      count += len(part)
      if count == split_size:
        scores.append(_score(parts, count))
        parts, count = [], 0
  if count:
    scores.append(_score(parts, count))
  if not scores:
    raise ValueError('an inception score of no samples')
  return float(np.mean(scores)), float(np.std(scores))


def _sums(logits: np.ndarray) -> tuple[np.ndarray, float]:
  """The sum of p f64[K], and that of p log p."""
  shifted = np.asarray(logits, np.float64)
  shifted = shifted - shifted.max(axis=1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
  p = np.exp(log_p)
  # A logit of -inf is a probability of zero, of which p log p is 0.
  return p.sum(axis=0), float(np.sum(p * np.where(p > 0, log_p, 0.0)))


def _score(parts: list[tuple[np.ndarray, float]], count: int) -> float:
  mean = sum(p for p, _ in parts) / count
  entropy = -np.sum(mean * np.log(np.where(mean > 0, mean, 1.0)))
  return float(np.exp(sum(s for _, s in parts) / count + entropy))
