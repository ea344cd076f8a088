"""`--mode=evaluate`: measures every sampler by every metric."""

import argparse
from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import numpy as np

from cmjax.core import Model, Params, UserError, unused
from cmjax.data.source import Source, as_uint8, as_x0, clip, one_hot
from cmjax.metrics.drawn import Drawn, Metric
from cmjax.runtime import build, logs, sharding
from cmjax.runtime.reopen import Opened, beside, facts, reopen_for
from cmjax.runtime.run import Run
from cmjax.samplers import Sampler


def draw(
  subject: Run | Opened,
  params: Params,
  sampler: Sampler,
  *,
  num_samples: int,
  seed: int,
  check: Callable[[], None] = lambda: None,
) -> Drawn:
  """Draws samples, conditioned on the labels of the data in order, repeated as needed.

  Up to rounding, sample i depends only on `seed` and i: neither on the batch size nor
  on the number of devices. `check` is called before each batch, and may raise to stop.
  """
  source, mesh = subject.source, subject.mesh
  batch_size = min(subject.config.evaluation.batch_size, num_samples)
  batch_size = -(-batch_size // mesh.size) * mesh.size
  num_batches = -(-num_samples // batch_size)
  sample_batch = _compiled(subject.f, sampler, source.shape, mesh)
  by_example = sharding.by_example(mesh)

  batches, evaluations, cond = [], 0, None
  indices = np.split(np.arange(num_batches * batch_size), num_batches)
  for index in logs.counted(indices, batch_size, 'samples'):
    check()
    if source.labels is not None:
      cond = one_hot(source, index % len(source.labels))
      cond = sharding.place(cond, by_example)
    index = sharding.place(index.astype(np.uint32), by_example)
    x, evaluations = sample_batch(params, jax.random.key(seed), index, cond)
    batches.append(np.asarray(x))
  labels = None
  if source.labels is not None:
    labels = source.labels[np.arange(num_samples) % len(source.labels)]
  x = clip(source, np.concatenate(batches)[:num_samples])
  return Drawn(x, labels, int(evaluations))


@functools.lru_cache(maxsize=16)
def _compiled(
  f: Model, sampler: Sampler, shape: tuple[int, ...], mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
  logs.say('compiling a sampler ...')

  def sample_batch(params, root, index, cond):
    keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(index)
    return sampler(f, params, keys, cond, shape)

  return jax.jit(sample_batch, out_shardings=sharding.replicated(mesh))


def table(
  subject: Run | Opened,
  params: Params,
  metrics: Mapping[str, Metric],
  check: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
  """One row per sampler: network evaluations per sample, and the values of all metrics.

  Raises: UserError if two metrics return a value of the same name.
  """
  evaluation = subject.config.evaluation
  rows = []
  for name, sampler in subject.samplers.items():
    drawn = draw(
      subject,
      params,
      sampler,
      num_samples=evaluation.num_samples,
      seed=evaluation.seed,
      check=check,
    )
    row: dict[str, Any] = {
      'sampler': name,
      'evaluations': drawn.evaluations,
      'samples': len(drawn.x),
    }
    for key, metric in metrics.items():
      values = metric(drawn)
      if duplicates := row.keys() & values.keys():
        raise UserError(
          f'config.metrics.{key}: returns {", ".join(sorted(duplicates))}, which the '
          'table has already; remove one of the two metrics, or rename its value'
        )
      row |= values
    rows.append(row)
  return rows


def picture(source: Source, x: np.ndarray, columns: int = 20) -> np.ndarray:
  """A picture u8[H, W, 3] of samples f32[N, ...]: a grid, or points over the data."""
  if len(source.shape) == 1:
    return logs.scatter(x[:, :2], as_x0(source, source.examples[:2000, :2]))
  return logs.grid(as_uint8(source, x), columns)


def log_pictures(
  run: Run, params: Params, step: int, log: logs.RunLog, check: Callable[[], None]
) -> None:
  """A training hook: one picture per sampler, always of the same noise and labels."""
  evaluation = run.config.evaluation
  for name, sampler in run.samplers.items():
    drawn = draw(
      run,
      params,
      sampler,
      num_samples=evaluation.num_pictured,
      seed=evaluation.seed,
      check=check,
    )
    log.picture(step, name, picture(run.source, drawn.x))


def table_logger(metrics: Mapping[str, Metric]) -> Callable[..., None]:
  """A training hook that logs the metrics of every sampler, as SAMPLER/METRIC."""

  def log_table(run, params, step, log, check):
    for row in table(run, params, metrics, check):
      name = row.pop('sampler')
      log.scalars(step, {f'{name}/{key}': float(value) for key, value in row.items()})
      text = ' '.join(f'{key}={value:.4g}' for key, value in row.items())
      logs.say(f'step {step} {name}: {text}')

  return log_table


def build_metrics(subject: Run | Opened) -> dict[str, Metric]:
  """The metrics of a config, on its data.

  A metric receives those of `real`, `labels` and `source` that its signature names.

  Raises: UserError if a metric does not fit the data.
  """
  metrics, source = subject.config.metrics, subject.source
  if not metrics:
    return {}  # avoids a copy of all data as floats
  return build.build_each(
    metrics,
    'config.metrics',
    Metric,
    real=as_x0(source, source.examples),
    labels=source.labels,
    source=source,
  )


def run(flags: argparse.Namespace) -> None:
  """Prints the table, and writes it as Markdown and JSON into the run."""
  opened = reopen_for(flags.workdir, flags.config, flags.overrides, flags.trust)
  rows = table(opened, opened.params, build_metrics(opened))
  text = (
    f'{opened.source.name}, step {opened.step:,}, '
    f'weights {opened.config.sample_weights}, '
    f'seed {opened.config.evaluation.seed}\n\n{logs.markdown_table(rows)}\n'
  )
  path = unused(beside(opened) / f'evaluation_{opened.step:08d}', '.json')
  logs.write_json(path, facts(opened, rows=rows))
  path.with_suffix('.md').write_text(text, encoding='utf-8')
  logs.say(f'{text}\n{path} and .md')
