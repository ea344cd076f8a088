"""Signal and noise of the objective's gradient, by noise level."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cmjax import checks
from cmjax.core import streams
from cmjax.studies.study import SIGMA_COLUMN, Study, Subject, study


def gradient_noise(
  subject: Subject, *, num_bins: int = 8, num_batches: int = 16
) -> Study:
  """Signal and noise of the gradient of the objective, by noise level.

  The loss is split by the noise level of its examples into bins of equal
  width in ln sigma. Over `num_batches` batches, `signal` is the norm of the mean
  gradient of a bin and `noise` the root mean square distance of one batch's gradient
  from it. The signal is corrected for the noise of the mean, and is 0 where that noise
  is larger. The schedules of the loss are evaluated at `subject.step`.

  Raises: ValueError if num_bins < 1 or num_batches < 2, or there is no objective.
  """
  checks.whole(1, 1_000, num_bins=num_bins)
  checks.whole(2, num_batches=num_batches)
  loss = subject.loss
  if loss is None or subject.batch is None:
    raise ValueError('gradient_noise needs an objective and its batches')
  edges = jnp.asarray(np.geomspace(2e-3, 80.0, num_bins + 1)[1:-1], jnp.float32)

  @jax.jit
  def of_bin(params, bin_index, i, batch):
    def value(params):
      nets = subject.nets._replace(online=params)
      step, keys = jnp.int32(subject.step), streams(jax.random.key(1), i)
      out = loss(nets, batch, step, keys)
      sigma = out.aux['sigma']
      inside = jnp.sum(sigma[:, None] > edges[None, :], axis=1) == bin_index
      total = jnp.sum(jnp.where(inside, out.loss, 0.0)) / len(sigma)
      log_sum = jnp.sum(jnp.where(inside, jnp.log(sigma), 0.0))
      return total, (jnp.sum(inside), log_sum)

    return jax.grad(value, has_aux=True)(params)

  def by_bin(*arguments):  # in a compiled loop, CPUs run convolutions slowly
    bins = [of_bin(subject.nets.online, b, *arguments) for b in jnp.arange(num_bins)]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *bins)

  squared_norm = jax.vmap(lambda gradient: optax.tree.norm(gradient, squared=True))
  total = jax.tree.map(
    lambda a: jnp.zeros((num_bins, *a.shape), a.dtype), subject.nets.online
  )
  squares = count = log_sum = jnp.zeros(num_bins)
  num_examples = 0
  for i in range(num_batches):
    batch = subject.batch(subject.step + i)
    gradient, (inside, logs) = by_bin(jnp.int32(i), batch)
    total = jax.tree.map(jnp.add, total, gradient)
    squares = squares + squared_norm(gradient)
    count, log_sum = count + inside, log_sum + logs
    num_examples += len(batch.x0)
  mean_squared = squared_norm(total) / num_batches**2
  unbiased = num_batches / (num_batches - 1)
  variance = jnp.maximum(squares / num_batches - mean_squared, 0.0) * unbiased
  signal = jnp.sqrt(jnp.maximum(mean_squared - variance / num_batches, 0.0))
  noise = jnp.sqrt(variance)
  rows = [
    {
      'sigma': float(np.exp(log_sum[b] / count[b])),
      'signal': float(signal[b]),
      'noise': float(noise[b]),
      'snr': float(signal[b] / noise[b]) if noise[b] else 0.0,
      'fraction': float(count[b]) / num_examples,
    }
    for b in range(num_bins)
    if count[b]
  ]
  return study(
    'Signal and noise of the gradient of the objective',
    rows,
    'sigma',
    ('snr',),
    {
      'sigma': f'{SIGMA_COLUMN}: geometric mean over the bin',
      'signal': f'norm of the mean gradient of the bin over {num_batches} batches',
      'noise': "root mean square distance of one batch's gradient from the mean",
      'snr': 'signal / noise; 0 where the signal is not resolved',
      'fraction': 'fraction of the examples that fall in the bin',
    },
  )
