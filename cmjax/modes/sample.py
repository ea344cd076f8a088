"""`--mode=sample`: draws samples from a run or a file of weights."""

import argparse
import dataclasses
from typing import Any

import numpy as np

from cmjax import pictures
from cmjax.core import UserError, unused
from cmjax.data.source import Source, as_x0
from cmjax.runtime import logs, results
from cmjax.runtime.reopen import beside, for_sampling, reopen_for
from cmjax.sampling import draw


def run(flags: argparse.Namespace) -> None:
  """Writes one PNG and one .npz per sampler, and a PNG of all of them."""
  opened = reopen_for(
    flags.workdir, flags.config, flags.overrides, flags.trust, needs_data=False
  )
  source = opened.source
  if flags.labels:
    source = with_labels(source, flags.labels)
    in_order = dataclasses.replace(opened.config.evaluation, labels='data')
    config = dataclasses.replace(opened.config, evaluation=in_order)
    opened = opened._replace(source=source, config=config)
  opened = for_sampling(opened, flags.samplers)
  folder = unused(beside(opened) / 'samples' / f'step_{opened.step:08d}')
  evaluation, panels = opened.config.evaluation, {}
  if len(source.examples):
    real = as_x0(source, source.examples[: evaluation.num_pictured])
    panels[source.name] = pictures.samples(source, real)
  for name, sampler in opened.samplers.items():
    logs.say(f'{name} ...')
    drawn = draw(
      opened,
      opened.params,
      sampler,
      num_samples=evaluation.num_pictured,
      seed=evaluation.seed,
    )
    image = pictures.samples(source, drawn.x)
    panels[f'{name}, network evaluations per sample: {drawn.evaluations}'] = image
    results.write_png(folder / f'{name}.png', image)
    arrays: dict[str, Any] = {'images': drawn.x, 'evaluations': drawn.evaluations}
    if drawn.labels is not None:
      arrays['labels'] = drawn.labels
    results.write_arrays(folder / f'{name}.npz', arrays)
  path = unused(folder / 'all', '.png')  # a sampler may have the name `all`
  results.write_png(path, pictures.sheet(panels))
  logs.say(f'{path}; each sampler also has a .png and an .npz')


def with_labels(source: Source, text: str) -> Source:
  """The source with the labels of --labels, to condition on."""
  labels = text.split(',')
  if not source.classes:
    raise UserError('--labels: this model has no classes; leave it out')
  if not all(n.isdecimal() and int(n) < source.classes for n in labels):
    raise UserError(
      f'--labels={text}: must be numbers from 0 to {source.classes - 1}, such as 0,3,7'
    )
  return source._replace(labels=np.array(labels, int))
