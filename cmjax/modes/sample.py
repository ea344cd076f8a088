"""`--mode=sample`: pictures and arrays of samples, of a run or of a file of weights."""

import argparse

import numpy as np

from cmjax import data, evaluate, logs
from cmjax import run as runs
from cmjax.core import UserError, unused


def run(flags: argparse.Namespace) -> None:
  """Draws with every sampler: a PNG and an .npz each, and one picture of all."""
  opened = runs.reopen_for(
    flags.workdir, flags.config, flags.overrides, flags.trust, needs_data=False
  )
  source = opened.source
  if flags.labels:
    source = _only_labels(source, flags.labels)
    opened = opened._replace(source=source)
  folder = unused(runs.beside(opened) / 'samples' / f'step_{opened.step:08d}')
  wanted, panels = opened.config.evaluation, {}
  if len(source.examples):
    real = data.as_x0(source, source.examples[: wanted.pictured])
    panels[source.name] = evaluate.picture(source, real)
  for name, sampler in opened.samplers.items():
    logs.say(f'{name} ...')
    drawn = evaluate.draw(
      opened, opened.params, sampler, samples=wanted.pictured, seed=wanted.seed
    )
    image = evaluate.picture(source, drawn.x)
    panels[f'{name}, evaluations of the network a sample: {drawn.evaluations}'] = image
    logs.write_png(folder / f'{name}.png', image)
    arrays = {'images': drawn.x, 'evaluations': drawn.evaluations}
    if drawn.labels is not None:
      arrays['labels'] = drawn.labels
    np.savez(folder / f'{name}.npz', **arrays)
  logs.write_png(folder / 'all.png', logs.sheet(panels))
  logs.say(f'{folder / "all.png"}; each sampler has a .png and a .npz beside it')


def _only_labels(source: data.Source, text: str) -> data.Source:
  """The source with those labels to draw, in turn."""
  labels = text.split(',')
  if not source.classes:
    raise UserError('--labels: this model has no classes')
  if not all(n.isdecimal() and int(n) < source.classes for n in labels):
    raise UserError(
      f'--labels={text}: must be numbers from 0 to {source.classes - 1}, as 0,3,7'
    )
  return source._replace(labels=np.array(labels, int))
