"""Log-likelihood of the data, by the probability-flow ODE."""

from collections.abc import Sequence
import math

import jax
import numpy as np

from cmjax import checks
from cmjax.likelihood import (
  bin_width,
  bits_per_dim,
  dequantise,
  log_likelihood,
)
from cmjax.studies.study import Study, Subject, study
from cmjax.times import check_grid


def likelihood(
  subject: Subject,
  *,
  num_levels: int = 0,
  num_steps: Sequence[int] = (8, 16, 32),
  num_samples: int = 128,
  num_probes: int = 4,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
) -> Study:
  """Mean log-likelihood of training examples, by the number of solver steps.

  The model must be a denoiser, as trained by `edm` or `trigflow`: the result has no
  meaning for a consistency function, which is not E[x0 | x].

  Args:
    subject: the model.
    num_levels: how many evenly spaced values the data takes: 256 of uint8 images. The
      examples are then dequantised, and the unit is bits per dimension. 0: continuous
      data, and the unit is nats per example.
    num_steps: numbers of steps of the solver, one row each.
    num_samples: number of examples, drawn at random.
    num_probes: probes per example of the divergence; 0: its exact trace.
    sigma_min: noise level of the density.
    sigma_max: noise level of the prior.

  Raises: ValueError unless 0 < sigma_min < sigma_max, counts are positive and the data
    takes values of num_levels levels only.
  """
  check_grid(sigma_min, sigma_max, 1.0)
  checks.whole(2, num_samples=num_samples)
  checks.whole(0, num_probes=num_probes)
  checks.wholes(100, 1, 100_000, num_steps=num_steps)
  if not num_steps:
    raise ValueError('num_steps must not be empty')
  width = _width(np.asarray(subject.x0), num_levels) if num_levels else 0.0
  chosen = np.random.default_rng(0).permutation(len(subject.x0))[:num_samples]
  x0 = subject.x0[chosen]
  cond = None if subject.cond is None else subject.cond[chosen]
  dim = math.prod(x0.shape[1:])
  if width:
    x0 = dequantise(x0, jax.random.split(jax.random.key(0), len(x0)), width)

  def measured(steps):
    def nats(params, x, cond):
      keys = jax.random.split(jax.random.key(1), len(x)) if num_probes else None

      def denoiser(x, sigma):
        return subject.f(params, x, sigma, cond)

      found = log_likelihood(
        denoiser,
        x,
        keys,
        num_probes=num_probes,
        num_steps=steps,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
      )
      return found.nats

    found = jax.jit(nats)(subject.nets.online, x0, cond)
    return np.asarray(bits_per_dim(found, dim, width) if width else found, np.float64)

  rows = []
  for steps in num_steps:
    values = measured(steps)
    value = 'bits_per_dim' if width else 'nats'
    row = {'num_steps': steps, 'evaluations': 4 * steps, value: float(np.mean(values))}
    row['standard_error'] = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    rows.append(row)
  return study(
    'Log-likelihood of the data',
    rows,
    'num_steps',
    ('bits_per_dim', 'nats'),
    {
      'num_steps': 'steps of the Runge-Kutta method',
      'evaluations': 'of the denoiser, per example',
      'bits_per_dim': 'mean bits per dimension of dequantised data (lower is better)',
      'nats': f'mean log density at sigma = {sigma_min:g} (higher is better)',
      'standard_error': f'of that mean, over {len(x0)} examples and their probes',
    },
  )


def _width(x0: np.ndarray, num_levels: int) -> float:
  """The distance of the values of data that takes `num_levels` of them."""
  low, high = float(x0.min()), float(x0.max())
  width = bin_width(low, high, num_levels)
  level = (x0 - low) / width
  if np.max(np.abs(level - np.rint(level))) > 0.01:  # float32 rounds to 1e-4 of 2^16
    raise ValueError(f'{num_levels=} evenly spaced values do not include all data')
  return width
