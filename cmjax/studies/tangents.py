"""The defect df/dt and the scatter of its estimates, by noise level."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Array, Key
from cmjax.process import VE, marginal_velocity, perturb
from cmjax.studies.study import (
  SIGMA_COLUMN,
  Study,
  Subject,
  by_sigma,
  rms,
  sigmas,
  study,
)


def _posterior(subject: Subject, x: Array, cond: Array | None, sigma: Array) -> Array:
  """log p(x0 = x_i | x_t) of every example i, up to a constant: f32[B, N]."""
  data = jnp.reshape(subject.x0, (len(subject.x0), -1))
  rows = jnp.reshape(x, (len(x), -1))
  inner = jnp.matmul(rows, data.T, precision='highest')
  logits = (inner - jnp.sum(data**2, axis=1)[None, :] / 2) / sigma**2
  if cond is None or subject.cond is None:
    return logits
  same_class = jnp.matmul(cond, subject.cond.T) > 0
  return jnp.where(same_class, logits, -jnp.inf)


class _Tangents(NamedTuple):
  """Tangents df/dt f32[B, ...] at one noise level, all at the same points."""

  exact: Array  # along the posterior mean over all data
  conditional: Array  # f32[K, B, ...] along examples drawn from the posterior
  stable: Array  # f32[K, B, ...] along posterior means over random subsets
  teacher: Array | None  # along the field of the teacher


def _tangents(
  subject: Subject,
  sigma: Array,
  key: Key,
  *,
  num_samples: int,
  num_draws: int,
  subset_size: int,
) -> _Tangents:
  data_key, noise_key, draw_key, subset_key = jax.random.split(key, 4)
  index = jax.random.randint(data_key, (num_samples,), 0, len(subject.x0))
  cond = None if subject.cond is None else subject.cond[index]
  x0, t = subject.x0[index], jnp.full(num_samples, sigma)
  x_t = perturb(VE, x0, jax.random.normal(noise_key, x0.shape), t)
  logits = _posterior(subject, x_t, cond, sigma)
  data = jnp.reshape(subject.x0, (len(subject.x0), -1))

  def posterior_mean(logits):
    weights = jax.nn.softmax(logits, axis=1)
    return jnp.reshape(jnp.matmul(weights, data, precision='highest'), x_t.shape)

  # One linearisation serves all directions, because they share their point.
  f = subject.f
  _, jvp = jax.linearize(lambda x, t: f(subject.nets.online, x, t, cond), x_t, t)

  def tangent(x0):
    return jvp(marginal_velocity(VE, x_t, x0, t), jnp.ones_like(t))

  cumulative = jnp.cumsum(jax.nn.softmax(logits, axis=1), axis=1)

  def posterior_index(key):
    u = jax.random.uniform(key, (num_samples,)) * cumulative[:, -1]
    return jnp.minimum(jax.vmap(jnp.searchsorted)(cumulative, u), len(data) - 1)

  def conditional(key):
    return tangent(subject.x0[posterior_index(key)])

  def stable(key):
    index_key, subset_key = jax.random.split(key)
    drawn = posterior_index(index_key)
    fraction = min(subset_size / len(data), 1.0)
    subset = jax.random.bernoulli(subset_key, fraction, (len(data),))
    subset = subset[None, :] | (jnp.arange(len(data))[None, :] == drawn[:, None])
    return tangent(posterior_mean(jnp.where(subset, logits, -jnp.inf)))

  teacher = None
  if subject.teacher is not None:
    teacher = tangent(subject.teacher(subject.nets.teacher, x_t, t, cond))
  return _Tangents(
    exact=tangent(posterior_mean(logits)),
    conditional=jax.lax.map(conditional, jax.random.split(draw_key, num_draws)),
    stable=jax.lax.map(stable, jax.random.split(subset_key, num_draws)),
    teacher=teacher,
  )


def tangents(
  subject: Subject,
  *,
  sigma_min: float = 0.01,
  sigma_max: float = 80.0,
  num_sigmas: int = 12,
  num_samples: int = 64,
  num_draws: int = 32,
  subset_size: int = 256,
) -> Study:
  """The defect df/dt along the ODE of the data, and the scatter of its estimates.

  All columns are root mean squares of t df/dt, the change of f per unit of ln t.
  `defect` is along the posterior mean over all data. The others are differences from
  it: `conditional` along single examples drawn from the posterior, as in consistency
  training; `stable` along means over about `subset_size` random examples and one drawn
  from the posterior, as in Stable Consistency Tuning; `teacher` along the field of the
  teacher.

  Raises: ValueError unless 0 < sigma_min <= sigma_max and all counts are positive.
  """
  checks.whole(1, num_samples=num_samples, num_draws=num_draws, subset_size=subset_size)

  def measure(sigma, key):
    result = _tangents(
      subject,
      sigma,
      key,
      num_samples=num_samples,
      num_draws=num_draws,
      subset_size=subset_size,
    )
    columns = {
      'defect': sigma * rms(result.exact),
      'conditional': sigma * rms(result.conditional - result.exact[None]),
      'stable': sigma * rms(result.stable - result.exact[None]),
    }
    if result.teacher is not None:
      columns['teacher'] = sigma * rms(result.teacher - result.exact)
    return columns

  rows = by_sigma(measure, sigmas(sigma_min, sigma_max, num_sigmas))
  return study(
    'Defect t df/dt, and the scatter of its estimates',
    rows,
    'sigma',
    ('defect', 'conditional', 'stable', 'teacher'),
    {
      'sigma': SIGMA_COLUMN,
      'defect': 'root mean square of t df/dt along the ODE of all data; the exact map '
      'has 0',
      'conditional': 'root mean square difference from it along single examples',
      'stable': f'the same along means over about {subset_size} examples',
      'teacher': 'the same along the field of the teacher',
    },
  )


def normalised_bias(
  subject: Subject,
  *,
  c: float = 0.0,
  sigma_min: float = 0.01,
  sigma_max: float = 80.0,
  num_sigmas: int = 12,
  num_samples: int = 64,
  num_draws: int = 64,
) -> Study:
  """The bias of normalised tangents: |E[g / (|g| + c)]|, also where E[g] = 0.

  g is t df/dt along single examples drawn from the posterior. `length` is the norm of
  this mean, `cosine` the cosine between the mean and the exact tangent, and `floor` the
  norm of the mean of `num_draws` random unit vectors.

  Raises: ValueError unless c >= 0, 0 < sigma_min <= sigma_max and all counts are
    positive.
  """
  checks.not_negative(c=c)
  checks.whole(1, num_samples=num_samples, num_draws=num_draws)

  def measure(sigma, key):
    result = _tangents(
      subject,
      sigma,
      key,
      num_samples=num_samples,
      num_draws=num_draws,
      subset_size=1,
    )
    g = sigma * result.conditional

    def unit(g):
      flat = jnp.reshape(g, (*g.shape[: g.ndim - result.exact.ndim + 1], -1))
      norm = jnp.linalg.norm(flat, axis=-1, keepdims=True)
      return flat / jnp.maximum(norm + c, 1e-20)

    mean, exact = jnp.mean(unit(g), axis=0), unit(result.exact)
    length = jnp.linalg.norm(mean, axis=1)
    cosine = jnp.sum(mean * exact, axis=1) / jnp.maximum(length, 1e-20)
    return {
      'length': jnp.mean(length),
      'cosine': jnp.mean(cosine),
      'floor': jnp.float32(num_draws**-0.5),
    }

  rows = by_sigma(measure, sigmas(sigma_min, sigma_max, num_sigmas))
  return study(
    'Bias of normalised tangents',
    rows,
    'sigma',
    ('length', 'floor'),
    {
      'sigma': SIGMA_COLUMN,
      'length': 'norm of the mean of g / (|g| + c) over the posterior, at most 1',
      'cosine': 'between that mean and the exact tangent',
      'floor': f'norm of the mean of {num_draws} random unit vectors',
    },
  )
