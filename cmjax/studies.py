"""What a model does by noise level: error, defect, variance, precision, limits.

Each study is a pure function of a `Subject`, any model with any objective, and returns
a table that can be printed, kept and drawn. Tangents are taken along the ODE of the
data, whose posterior is known: that of a finite data set is a softmax.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks, distances, fields, oracles, process, solvers, times
from cmjax.core import Array, Batch, Key, Loss, Model, Nets, streams
from cmjax.objectives import continuous, discrete


class Subject(NamedTuple):
  """What is studied, and the data it was trained on."""

  f: Model
  nets: Nets  # `online` holds the weights
  x0: Array  # f32[N, ...] examples
  cond: Array | None  # f32[N, K] their labels
  batch: Callable[[int], Batch] | None = None  # step -> a batch of the training data
  loss: Loss | None = None
  teacher: Model | None = None
  in_dtype: Callable[[str], Model] | None = None  # the same model in another dtype
  step: int = 0  # of training, whose schedules the loss follows


class Study(NamedTuple):
  """A table, what its columns mean, and which of them are worth a picture."""

  title: str
  rows: list[dict[str, float]]
  x: str
  ys: tuple[str, ...]
  columns: dict[str, str]  # what each means, in one line, in the order of the rows


def _levels(lowest: float, highest: float, count: int) -> np.ndarray:
  checks.positive(lowest=lowest, highest=highest)
  checks.whole(1, 10_000, count=count)
  if lowest > highest:
    raise ValueError(f'needs lowest <= highest, got {lowest=}, {highest=}')
  return np.geomspace(lowest, highest, count)


_T = 'noise level, in units of the data'


def _rms(x: Array) -> Array:
  return jnp.sqrt(jnp.mean(x**2))


def _by_level(measure, levels) -> list[dict[str, float]]:
  """One row a noise level, of a function of (t f32[], key) -> dict of f32[]."""
  measure = jax.jit(measure)  # which returns its dict sorted
  rows = []
  for i, t in enumerate(levels):
    found = measure(jnp.float32(t), jax.random.fold_in(jax.random.key(0), i))
    rows.append({'t': float(t)} | {k: float(v) for k, v in found.items()})
  return rows


def map_error(
  subject: Subject,
  *,
  oracle: oracles.Mixture,
  lowest: float = 0.01,
  highest: float = 80.0,
  count: int = 14,
  samples: int = 1024,
  s: float = 0.002,
  steps: int = 512,
) -> Study:
  """Root mean square of f(x_t, t) minus the exact consistency map, by t.

  `oracle` is the distribution of the data, and s the map's end; beside it the same for
  the data's mean, which is what a model that knows nothing should say at large t.

  Raises: ValueError for levels that do not ascend from above zero, or an empty count.
  """
  checks.positive(s=s)
  checks.whole(1, samples=samples)
  checks.whole(1, 100_000, steps=steps)

  def measure(t, key):
    which, noise = jax.random.split(key)
    x0 = oracles.sample(oracle, which, samples).astype(jnp.float32)
    z = jax.random.normal(noise, x0.shape)
    ts = jnp.full(samples, t)
    x_t = process.point(process.VE, x0, z, ts)
    exact = oracles.consistency(oracle, x_t, ts, s, steps)
    y = subject.f(subject.nets.online, x_t, ts, None)
    mean = jnp.asarray(oracle.weights @ oracle.means, jnp.float32)
    return {'rms_error': _rms(y - exact), 'rms_error_of_mean': _rms(exact - mean[None])}

  rows = _by_level(measure, _levels(lowest, highest, count))
  return _study(
    'Error against the exact consistency map',
    rows,
    't',
    ('rms_error', 'rms_error_of_mean'),
    {
      't': _T,
      'rms_error': 'root mean square of f minus the exact map, in units of the data',
      'rms_error_of_mean': "the same with the data's mean in the place of f",
    },
  )


def _study(title, rows, x, ys, columns) -> Study:
  """The study, its rows in the order of the columns that explain them."""
  ordered = [{name: row[name] for name in columns if name in row} for row in rows]
  known = {name: text for name, text in columns.items() if name in ordered[0]}
  return Study(title, ordered, x, tuple(y for y in ys if y in known), known)


def _posterior(subject: Subject, x: Array, cond: Array | None, t: Array) -> Array:
  """log p(x_i | x_t) of every example, up to a constant: f32[B, N]."""
  flat = jnp.reshape(subject.x0, (len(subject.x0), -1))
  rows = jnp.reshape(x, (len(x), -1))
  inner = jnp.matmul(rows, flat.T, precision='highest')
  logits = (inner - jnp.sum(flat**2, axis=1)[None, :] / 2) / t**2
  if cond is None:
    return logits
  same = jnp.matmul(cond, subject.cond.T) > 0
  return jnp.where(same, logits, -jnp.inf)


class _Tangents(NamedTuple):
  """Tangents df/dt f32[B, ...] at one noise level, all at the same points."""

  exact: Array  # along the posterior mean over all of the data
  drawn: Array  # f32[K, B, ...] along single examples of the posterior
  stable: Array  # f32[K, B, ...] along means over subsets, with one of the posterior
  teacher: Array | None


def _tangents(
  subject: Subject, t: Array, key: Key, samples: int, draws: int, subset: int
) -> _Tangents:
  picks, noise, again, subsets = jax.random.split(key, 4)
  index = jax.random.randint(picks, (samples,), 0, len(subject.x0))
  cond = None if subject.cond is None else subject.cond[index]
  x0, ts = subject.x0[index], jnp.full(samples, t)
  z = jax.random.normal(noise, x0.shape)
  x_t = process.point(process.VE, x0, z, ts)
  logits = _posterior(subject, x_t, cond, t)
  data = jnp.reshape(subject.x0, (len(subject.x0), -1))

  def mean(logits):
    weights = jax.nn.softmax(logits, axis=1)
    return jnp.reshape(jnp.matmul(weights, data, precision='highest'), x_t.shape)

  # One linearisation for all directions: the points are the same.
  f = subject.f
  _, along = jax.linearize(lambda x, t: f(subject.nets.online, x, t, cond), x_t, ts)

  def tangent(x0):
    return along(process.velocity(process.VE, x_t, x0, ts), jnp.ones_like(ts))

  cumulative = jnp.cumsum(jax.nn.softmax(logits, axis=1), axis=1)

  def posterior_index(key):
    u = jax.random.uniform(key, (samples,)) * cumulative[:, -1]
    found = jax.vmap(jnp.searchsorted)(cumulative, u)
    return jnp.minimum(found, len(data) - 1)

  def of_one(key):
    return tangent(subject.x0[posterior_index(key)])

  def of_subset(key):
    own_key, subset_key = jax.random.split(key)
    own = posterior_index(own_key)
    kept = jax.random.bernoulli(subset_key, min(subset / len(data), 1.0), (len(data),))
    kept = kept[None, :] | (jnp.arange(len(data))[None, :] == own[:, None])
    return tangent(mean(jnp.where(kept, logits, -jnp.inf)))

  teacher = None
  if subject.teacher is not None:
    teacher = tangent(subject.teacher(subject.nets.teacher, x_t, ts, cond))
  return _Tangents(
    exact=tangent(mean(logits)),
    drawn=jax.lax.map(of_one, jax.random.split(again, draws)),
    stable=jax.lax.map(of_subset, jax.random.split(subsets, draws)),
    teacher=teacher,
  )


def tangents(
  subject: Subject,
  *,
  lowest: float = 0.01,
  highest: float = 80.0,
  count: int = 12,
  samples: int = 64,
  draws: int = 32,
  subset: int = 256,
) -> Study:
  """The defect df/dt along the data's ODE, and how far its estimates scatter, by t.

  All are t df/dt, a change of f per change of ln t, as the root mean square over
  features. `defect` follows the posterior mean over all of the data; `conditional`
  scatters single examples of the posterior about it, `stable` averages over about
  `subset` random examples and one of the posterior; `teacher` is the difference that
  the teacher's field makes, which does not scatter.

  Raises: ValueError for levels that do not ascend from above zero, or an empty count.
  """
  checks.whole(1, samples=samples, draws=draws, subset=subset)

  def measure(t, key):
    found = _tangents(subject, t, key, samples, draws, subset)
    scaled = {
      'defect': t * _rms(found.exact),
      'conditional': t * _rms(found.drawn - found.exact[None]),
      'stable': t * _rms(found.stable - found.exact[None]),
    }
    if found.teacher is not None:
      scaled['teacher'] = t * _rms(found.teacher - found.exact)
    return scaled

  rows = _by_level(measure, _levels(lowest, highest, count))
  return _study(
    'Defect and scatter of tangents, times t',
    rows,
    't',
    ('defect', 'conditional', 'stable', 'teacher'),
    {
      't': _T,
      'defect': 't df/dt along the ODE of all the data, root mean square; 0 is exact',
      'conditional': 'how far t df/dt along single examples scatters about it',
      'stable': f'the same along means over about {subset} examples, as stable_ct',
      'teacher': "how far t df/dt along the teacher's field is from it",
    },
  )


def normalised_bias(
  subject: Subject,
  *,
  c: float = 0.0,
  lowest: float = 0.01,
  highest: float = 80.0,
  count: int = 12,
  samples: int = 64,
  draws: int = 64,
) -> Study:
  """How far the mean of normalised tangents is from the normalised mean, by t.

  `length` is |E[g / (|g| + c)]|, with g = t df/dt along single examples of the
  posterior: at the optimum E[g] = 0, and what is left is bias. `cosine` is its
  direction against the true tangent's, and `floor` the length that the mean of as many
  random unit vectors has.

  Raises: ValueError for a negative c, levels that do not ascend from above zero, or an
    empty count.
  """
  checks.not_negative(c=c)
  checks.whole(1, samples=samples, draws=draws)

  def measure(t, key):
    found = _tangents(subject, t, key, samples, draws, 1)
    g = t * found.drawn

    def unit(g):
      flat = jnp.reshape(g, (*g.shape[: g.ndim - found.exact.ndim + 1], -1))
      length = jnp.linalg.norm(flat, axis=-1, keepdims=True)
      return flat / jnp.maximum(length + c, 1e-20)

    mean, exact = jnp.mean(unit(g), axis=0), unit(found.exact)
    length = jnp.linalg.norm(mean, axis=1)
    cosine = jnp.sum(mean * exact, axis=1) / jnp.maximum(length, 1e-20)
    return {
      'length': jnp.mean(length),
      'cosine': jnp.mean(cosine),
      'floor': jnp.float32(draws**-0.5),
    }

  rows = _by_level(measure, _levels(lowest, highest, count))
  return _study(
    'Bias of normalised tangents',
    rows,
    't',
    ('length', 'floor'),
    {
      't': _T,
      'length': 'of the mean of g / (|g| + c) over the posterior, at most 1',
      'cosine': "of that mean and the true tangent's direction",
      'floor': f'the length that the mean of {draws} random unit vectors has',
    },
  )


def gradient_noise(subject: Subject, *, bins: int = 8, batches: int = 16) -> Study:
  """Signal and noise of the objective's own gradient, by the logarithm of t.

  For each bin of t, at the mean t in it: the length of the mean gradient over
  `batches` batches, the root mean square distance of one batch from it, and their ratio
  `snr`; `share` is how much of the batch lies in the bin. The signal is unbiased for
  the batches' own noise, and zero where that hides it. The loss is that of
  `subject.step`, for every batch.

  Raises: ValueError for fewer than two batches, or a subject without an objective.
  """
  checks.whole(1, 1_000, bins=bins)
  checks.whole(2, batches=batches)
  if subject.loss is None or subject.batch is None:
    raise ValueError('gradient_noise needs an objective and its batches')
  edges = jnp.asarray(np.geomspace(2e-3, 80.0, bins + 1)[1:-1], jnp.float32)

  @jax.jit
  def by_bin(params, i, batch):
    def value(params, inside_of):
      nets = subject.nets._replace(online=params)
      step, keys = jnp.int32(subject.step), streams(jax.random.key(1), i)
      out = subject.loss(nets, batch, step, keys)
      t = out.aux['t']
      inside = jnp.sum(t[:, None] > edges[None, :], axis=1) == inside_of
      total = jnp.sum(jnp.where(inside, out.loss, 0.0)) / len(t)
      return total, (jnp.sum(inside), jnp.sum(jnp.where(inside, jnp.log(t), 0.0)))

    return jax.lax.map(
      lambda b: jax.grad(value, has_aux=True)(params, b), jnp.arange(bins)
    )

  def squared(gradient):
    return sum(jnp.sum(g**2, axis=range(1, g.ndim)) for g in jax.tree.leaves(gradient))

  total, squares, seen, log_t, size = None, 0.0, 0.0, 0.0, 0
  for i in range(batches):
    batch = subject.batch(subject.step + i)
    gradient, (count, log_sum) = by_bin(subject.nets.online, jnp.int32(i), batch)
    total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
    squares, seen, log_t = squares + squared(gradient), seen + count, log_t + log_sum
    size += len(batch.x0)
  mean_squared = squared(total) / batches**2
  noise = jnp.maximum(squares / batches - mean_squared, 0.0) * batches / (batches - 1)
  signal = jnp.sqrt(jnp.maximum(mean_squared - noise / batches, 0.0))
  noise = jnp.sqrt(noise)
  rows = [
    {
      't': float(np.exp(log_t[b] / seen[b])),
      'signal': float(signal[b]),
      'noise': float(noise[b]),
      'snr': float(signal[b] / noise[b]) if noise[b] else 0.0,
      'share': float(seen[b]) / size,
    }
    for b in range(bins)
    if seen[b]
  ]
  return _study(
    'Gradient of the objective: signal and noise',
    rows,
    't',
    ('snr',),
    {
      't': f'{_T}: the geometric mean in the bin',
      'signal': f'length of the mean gradient of the bin over {batches} batches',
      'noise': 'root mean square distance of one batch from it',
      'snr': 'signal / noise; 0 where the noise hides the signal',
      'share': 'of the batch that lies in the bin',
    },
  )


def jvp_precision(
  subject: Subject, *, samples: int = 32, steps: Sequence[float] = (1e-1, 1e-2, 1e-3)
) -> Study:
  """Relative error of df/dt, by `jax.jvp` and by central differences of width h t.

  The truth is the jvp in float64; lognormal t, along single examples. Each row is one
  h; the error of the jvp, which has none, is the same in all.

  Raises: ValueError for a subject that cannot be had in another dtype, or steps outside
    (0, 1).
  """
  checks.whole(1, samples=samples)
  if not steps or not all(0 < h < 1 for h in steps):
    raise ValueError(f'steps must be in (0, 1), and at least one, got {tuple(steps)}')
  if subject.in_dtype is None:
    raise ValueError('jvp_precision needs a network with a `dtype`')
  keys = jax.random.split(jax.random.key(2), 3)
  index = jax.random.randint(keys[0], (samples,), 0, len(subject.x0))
  cond = None if subject.cond is None else subject.cond[index]
  t = times.lognormal(mean=-1.1, std=1.5)(keys[1], samples)
  x0, z = subject.x0[index], jax.random.normal(keys[2], subject.x0[index].shape)

  def derivative(dtype, carried, h):
    f = subject.in_dtype(dtype)
    data = [jnp.asarray(np.asarray(v), carried) for v in (x0, z, t)]
    params = jax.tree.map(
      lambda p: jnp.asarray(np.asarray(p), carried), (subject.nets.online)
    )

    @jax.jit
    def run(params, x0, z, t):
      def along(s):
        u = t * (1 + s)
        return f(params, process.point(process.VE, x0, z, u), u, cond)

      if h is None:
        return jax.jvp(along, (jnp.zeros((), carried),), (jnp.ones((), carried),))[1]
      return (along(h) - along(-h)) / (2 * h)

    return np.asarray(run(params, *data), np.float64)

  with jax.enable_x64(True):
    truth = derivative('float64', np.float64, None)

  def error(dtype, h):
    off = derivative(dtype, np.float32, h) - truth
    return float(np.linalg.norm(off) / np.linalg.norm(truth))

  dtypes = ('float32', 'bfloat16')
  jvp = {f'{dtype}_jvp': error(dtype, None) for dtype in dtypes}
  rows = [
    {'h': float(h)} | {dtype: error(dtype, h) for dtype in dtypes} | jvp for h in steps
  ]
  columns = {'h': 'width of the differences, relative to t'}
  columns |= {dtype: f'relative error of differences in {dtype}' for dtype in dtypes}
  columns |= {
    f'{dtype}_jvp': f'relative error of jax.jvp in {dtype}' for dtype in dtypes
  }
  ys = tuple(name for name in columns if name != 'h')
  return _study('Relative error of df/dt', rows, 'h', ys, columns)


def discrete_limit(
  subject: Subject,
  *,
  points: Sequence[int] = (64, 256, 1024, 4096, 16384),
  samples: int = 64,
  sigma_min: float = 0.01,
  sigma_max: float = 10.0,
) -> Study:
  """Relative distance of the discrete gradient to its limit, by the grid's points N.

  The pairs of consistency training on a Karras grid and squared l2, times N - 1,
  against Theorem 6 at the lower point, for the same draws; with the unsquared norm,
  against the normalised tangent. In float32 rounding takes over at some N.

  Raises: ValueError for points below 2, or unless 0 < sigma_min < sigma_max.
  """
  checks.whole(1, samples=samples)
  if not points:
    raise ValueError('points must be at least one')
  for n in points:
    checks.whole(2, points=n)
  times.check_grid(sigma_min, sigma_max, rho=7.0)
  keys = jax.random.split(jax.random.key(3), 3)
  index = jax.random.randint(keys[0], (samples,), 0, len(subject.x0))
  cond = None if subject.cond is None else subject.cond[index]
  x0, z = subject.x0[index], jax.random.normal(keys[2], subject.x0[index].shape)
  u = jax.random.uniform(keys[1], (samples,), maxval=0.99)
  field = fields.conditional(process.VE, x0, z)

  def clock(u):
    return times.karras_clock(u, sigma_min=sigma_min, sigma_max=sigma_max)

  def kernel_gradient(kernel, t, *rest, **choices):
    def value(params):
      nets = subject.nets._replace(online=params, target=None)
      x_t = process.point(process.VE, x0, z, t)
      out = kernel(subject.f, nets, field, x_t, t, *rest, cond, None, **choices)
      return jnp.mean(out.loss)

    return jax.jit(jax.grad(value))(subject.nets.online)

  r, speed = jax.jvp(clock, (u,), (jnp.ones_like(u),))
  # Name, metric, the limit's weighting, and the factor that makes the limit finite.
  cases = (
    ('squared_l2', distances.squared_l2(), lambda t, r: speed, lambda n: n - 1),
    ('l2', distances.pseudo_huber(), distances.uniform(), lambda n: 1),
  )
  rows = [{'N': int(n)} for n in points]
  for name, metric, weighting, factor in cases:
    limit = kernel_gradient(
      continuous.pseudo_loss, r, distance=metric, weighting=weighting
    )
    for n, row in zip(points, rows):
      found = kernel_gradient(
        discrete.pair,
        clock(u + 1 / (n - 1)),
        r,
        solver=solvers.euler,
        distance=metric,
        weighting=distances.uniform(),
      )
      row[name] = _distance(found, limit, factor(n))
  return _study(
    'Discrete gradient against its limit',
    rows,
    'N',
    ('squared_l2', 'l2'),
    {
      'N': 'points of the Karras grid',
      'squared_l2': 'relative distance of (N - 1) times the gradient to Theorem 6',
      'l2': "the same of the unsquared norm's to the normalised tangent",
    },
  )


def _distance(found, limit, scale) -> float:
  off = jax.tree.map(lambda a, b: jnp.sum((scale * a - b) ** 2), found, limit)
  size = jax.tree.map(lambda b: jnp.sum(b**2), limit)
  total = (sum(jax.tree.leaves(tree)) for tree in (off, size))
  return float(jnp.sqrt(next(total) / next(total)))
