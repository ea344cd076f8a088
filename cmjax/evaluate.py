"""params -> samples -> statistics and pictures, in batches over all devices."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from sklearn import linear_model

from cmjax import build, data, logs, sharding, statistics
from cmjax.core import Model, Params, UserError
from cmjax.run import Opened, Run
from cmjax.samplers import Sampler

Metric = Callable[['Drawn'], dict[str, float]]


class Drawn(NamedTuple):
  """Samples as a user would keep them, with what made them."""

  x: np.ndarray  # f32[N, ...], clipped to the range of the data
  labels: np.ndarray | None  # i[N], as asked for
  evaluations: int  # network evaluations a sample


def draw(
  subject: Run | Opened,
  params: Params,
  sampler: Sampler,
  *,
  samples: int,
  seed: int,
  check: Callable[[], None] = lambda: None,
) -> Drawn:
  """Samples with the labels of the data, in its order, as often round as needed.

  Sample i depends on `seed` and i alone, not on the batch size or the devices, up to
  rounding. `check` is called before each batch, and may raise to end it all.
  """
  source, mesh = subject.source, subject.mesh
  batch = min(subject.config.evaluation.batch_size, samples)
  batch = -(-batch // mesh.size) * mesh.size
  index = np.arange(-(-samples // batch) * batch)
  run_batch = _compiled(subject.f, sampler, source.shape, mesh)

  made, evaluations, cond = [], 0, None
  batches = np.split(index, len(index) // batch)
  for rows in logs.counted(batches, batch, 'samples'):
    check()
    if source.labels is not None:
      asked = data.one_hot(source, rows % len(source.labels))
      cond = sharding.place(asked, sharding.by_example(mesh))
    rows = sharding.place(rows.astype(np.uint32), sharding.by_example(mesh))
    x, evaluations = run_batch(params, jax.random.key(seed), rows, cond)
    made.append(np.asarray(x))
  labels = None
  if source.labels is not None:
    labels = source.labels[np.arange(samples) % len(source.labels)]
  x = data.clip(source, np.concatenate(made)[:samples])
  return Drawn(x, labels, int(evaluations))


@functools.lru_cache(maxsize=16)
def _compiled(f: Model, sampler: Sampler, shape: tuple[int, ...], mesh: Any):
  logs.say('compiling a sampler ...')

  def run_batch(params, root, rows, cond):
    keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(rows)
    return sampler(f, params, keys, cond, shape)

  return jax.jit(run_batch, out_shardings=sharding.replicated(mesh))


def table(
  subject: Run | Opened,
  params: Params,
  metrics: Mapping[str, Metric],
  check: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
  """One row a sampler: its network evaluations a sample, and every metric."""
  rows = []
  for name, sampler in subject.samplers.items():
    wanted = subject.config.evaluation
    drawn = draw(
      subject,
      params,
      sampler,
      samples=wanted.samples,
      seed=wanted.seed,
      check=check,
    )
    row = {'sampler': name, 'evaluations': drawn.evaluations, 'samples': len(drawn.x)}
    for part, metric in metrics.items():
      found = metric(drawn)
      if row.keys() & found.keys():
        raise UserError(f'config.metrics.{part}: {", ".join(found)} is there already')
      row |= found
    rows.append(row)
  return rows


def picture(source: data.Source, x: np.ndarray, columns: int = 20) -> np.ndarray:
  """Samples f32[N, ...] as uint8[H, W, 3]: a grid, or points over the data."""
  if len(source.shape) == 1:
    return logs.scatter(x[:, :2], data.as_x0(source, source.examples[:2000, :2]))
  return logs.grid(data.as_uint8(source, x), columns)


def log_pictures(
  run: Run, params: Params, step: int, log: logs.RunLog, check: Callable[[], None]
) -> None:
  """A picture a sampler, always of the same noise and labels."""
  wanted = run.config.evaluation
  for name, sampler in run.samplers.items():
    drawn = draw(
      run,
      params,
      sampler,
      samples=wanted.pictured,
      seed=wanted.seed,
      check=check,
    )
    log.picture(step, name, picture(run.source, drawn.x))


def table_logger(metrics: Mapping[str, Metric]) -> Callable[..., None]:
  """A hook of training: the metrics of every sampler, as scalars sampler/metric."""

  def log_table(run, params, step, log, check):
    for row in table(run, params, metrics, check):
      name = row.pop('sampler')
      log.scalars(step, {f'{name}/{key}': float(value) for key, value in row.items()})
      text = ' '.join(f'{key}={value:.4g}' for key, value in row.items())
      logs.say(f'step {step} {name}: {text}')

  return log_table


def build_metrics(subject: Run | Opened) -> dict[str, Metric]:
  """The metrics of a config, on its data.

  Raises: UserError if one does not fit the data.
  """
  return build.build_each(
    subject.config.metrics, 'config.metrics', Metric, source=subject.source
  )


def pixel_frechet(source: data.Source) -> Metric:
  """Frechet distance between pixels of all data and samples: not an FID.

  Both are scaled so that the data has standard deviation 0.5 over all pixels.
  """
  real = _pixels(data.as_x0(source, source.examples))
  scale = 0.5 / real.std()

  def metric(drawn):
    made = scale * _pixels(drawn.x)
    return {'pixel_frechet': statistics.frechet_distance(made, scale * real)}

  return metric


def label_agreement(source: data.Source) -> Metric:
  """Share of samples that a classifier of the real data gives the label asked for.

  The classifier is a logistic regression on pixels, fitted to all of the data.

  Raises: ValueError if the data has no labels.
  """
  if source.labels is None:
    raise ValueError('label_agreement needs labels; set config.data.conditional=True')
  judge = linear_model.LogisticRegression(max_iter=1000)
  judge.fit(_pixels(data.as_x0(source, source.examples)), source.labels)

  def metric(drawn):
    made = _pixels(drawn.x)
    finite = np.all(np.isfinite(made), axis=1)  # else it agrees with nothing
    agreed = judge.predict(np.where(finite[:, None], made, 0.0)) == drawn.labels
    return {'label_agreement': float(np.mean(agreed & finite))}

  return metric


def _pixels(x: np.ndarray) -> np.ndarray:
  return x.reshape(len(x), -1)
