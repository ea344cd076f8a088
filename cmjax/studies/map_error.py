"""Error against the exact consistency map."""

import jax
import jax.numpy as jnp

from cmjax import checks, oracles
from cmjax.process import VE, perturb
from cmjax.studies.study import (
  SIGMA_COLUMN,
  Study,
  Subject,
  by_sigma,
  rms,
  sigmas,
  study,
)


def map_error(
  subject: Subject,
  *,
  oracle: oracles.Mixture,
  sigma_min: float = 0.01,
  sigma_max: float = 80.0,
  num_sigmas: int = 14,
  num_samples: int = 1024,
  s: float = 0.002,
  num_steps: int = 512,
) -> Study:
  """Root mean square of f minus the exact consistency map, by noise level.

  For comparison, the same error of the constant prediction E[x0], the limit of the
  exact map for large sigma.

  Args:
    subject: the model.
    oracle: the distribution of its data.
    sigma_min: lowest noise level.
    sigma_max: highest noise level.
    num_sigmas: number of noise levels, evenly spaced in ln sigma.
    num_samples: number of samples at each noise level.
    s: noise level at which the exact map ends.
    num_steps: number of steps of the ODE solver of the exact map.

  Raises: ValueError unless 0 < sigma_min <= sigma_max, s > 0 and all counts are
    positive.
  """
  checks.positive(s=s)
  checks.whole(1, num_samples=num_samples)
  checks.whole(1, 100_000, num_steps=num_steps)

  def measure(sigma, key):
    data_key, noise_key = jax.random.split(key)
    x0 = oracles.sample(oracle, data_key, num_samples).astype(jnp.float32)
    t = jnp.full(num_samples, sigma)
    x_t = perturb(VE, x0, jax.random.normal(noise_key, x0.shape), t)
    exact = oracles.consistency(oracle, x_t, t, s, num_steps)
    y = subject.f(subject.nets.online, x_t, t, None)
    mean = jnp.asarray(oracle.weights @ oracle.means, jnp.float32)
    return {'rms_error': rms(y - exact), 'rms_error_of_mean': rms(exact - mean[None])}

  rows = by_sigma(measure, sigmas(sigma_min, sigma_max, num_sigmas))
  return study(
    'Error against the exact consistency map',
    rows,
    'sigma',
    ('rms_error', 'rms_error_of_mean'),
    {
      'sigma': SIGMA_COLUMN,
      'rms_error': 'root mean square of f minus the exact map, in units of the data',
      'rms_error_of_mean': 'the same for the constant prediction E[x0]',
    },
  )
