"""Several runs side by side: one page of tables, curves and pictures."""

from collections.abc import Sequence
import contextlib
import os
from pathlib import Path
from typing import Any
import urllib.parse

import numpy as np

from cmjax.report import html
from cmjax.report.contents import Contents, opened
from cmjax.report.figures import Album, Curve, figure, has_values, last_value
from cmjax.report.html import Markup, element, together
from cmjax.report.measured import newest_rows
from cmjax.report.metric_rows import Series, smoothed
from cmjax.report.one_run import NAME, footer, state_of
from cmjax.report.sections import date, last_start, safely, whole_number
from cmjax.runtime import config, paths
from cmjax.runtime.config_record import flat

MAX_FIGURES = 24
Runs = dict[str, Contents]  # by the name that the page calls them


def write(folders: Sequence[Path], path: Path) -> Path:
  """Writes a page of several runs; returns its path.

  Raises: OSError if it cannot be written.
  """
  with contextlib.ExitStack() as stack:
    contents = [stack.enter_context(opened(folder)) for folder in folders]
    return html.write(path, page(contents, path.parent))


def page(contents: Sequence[Contents], folder: Path) -> str:
  """The page, with links to the runs' own reports that are relative to a folder."""
  runs, album = _named(contents), Album()
  parts = {
    'runs': ('The runs', safely(_facts, runs, folder)),
    'evaluation': ('How good they are', safely(_evaluations, runs)),
    'pictures': ('What they make', safely(_pictures, runs, album)),
    'training': ('How they went', safely(_curves, runs)),
    'config': ('Where their configs differ', safely(_differences, runs)),
  }
  title = f'{len(runs)} runs: {", ".join(runs)}'
  body = together(
    (
      element('header', element('h1', title)),
      element('nav', *(element('a', t, href=f'#{k}') for k, (t, _) in parts.items())),
      *(
        element('section', element('h2', title, id=key), content)
        for key, (title, content) in parts.items()
      ),
      footer([f'{n}: {line}' for n, run in runs.items() for line in run.damaged]),
    )
  )
  return html.page(f'{title[:120]} · cmjax', album.fill(body))


def _named(contents: Sequence[Contents]) -> Runs:
  """The runs by the name of their folder, or by the path where two names agree."""
  names = [run.folder.resolve().name for run in contents]
  if len(set(names)) < len(names):
    names = [str(run.folder) for run in contents]
  runs: Runs = {}
  for name, run in zip(names, contents):
    while name in runs:  # the same run twice
      name += "'"
    runs[name] = run
  return runs


def _facts(runs: Runs, folder: Path) -> Markup:
  rows = []
  for name, run in runs.items():
    own = run.folder / NAME
    title: Any = name
    if own.is_file() and not paths.remote(folder):
      link = os.path.relpath(own.resolve(), folder.resolve())
      title = element('a', name, href='./' + urllib.parse.quote(link))
    start, (word, kind, _) = last_start(run), state_of(run)
    speed = run.metrics.series.get('images_per_s')
    closest = run.config and config.closest(run.config)[0]
    rows.append(
      {
        'run': title,
        'state': element('span', word, class_=kind),
        'step': run.step,
        'closest config': closest or '',
        'data': start.get('data', ''),
        'parameters': whole_number(start.get('parameters')),
        'devices': f'{start["devices"]} x {start["device_kind"]}' if start else '',
        'images/s': float(f'{np.nanmedian(speed.values):.3g}')
        if speed and has_values(speed)
        else None,
        'loss, last row': last_value(run.metrics.series.get('loss')),
        'started': date(start.get('started', '')),
      }
    )
  errors = (
    element('p', element('b', name), f': {run.error}', class_='error')
    for name, run in runs.items()
    if run.error
  )
  return together((html.table(rows), *errors))


def _differences(runs: Runs) -> Markup:
  values = {name: flat(run.config) for name, run in runs.items() if run.config}
  keys = sorted({key for of_run in values.values() for key in of_run})
  rows = []
  for key in keys:
    cells = {name: repr(of_run.get(key)) for name, of_run in values.items()}
    if len(set(cells.values())) > 1:
      codes = {
        name: element('code', text if key in values[name] else '(absent)')
        for name, text in cells.items()
      }
      rows.append({'key': element('code', key.removeprefix('config.'))} | codes)
  parts = [html.table(rows) if rows else element('p', 'Nowhere.', class_='dim')]
  if missing := [name for name in runs if name not in values]:
    text = f'Without a config: {", ".join(missing)}.'
    parts.append(element('p', text, class_='dim'))
  return together(parts)


def _evaluations(runs: Runs) -> Markup:
  rows, without = [], []
  for name, run in runs.items():
    of_run = newest_rows(run)
    rows += [{'run': name} | row for row in of_run]
    without += [] if of_run else [name]
  parts = [html.table(rows)] if rows else []
  if rows:
    parts.append(element('p', 'The newest measurement of each sampler.', class_='dim'))
  if without:
    text = f'Not evaluated: {", ".join(without)}.'
    parts.append(element('p', text, class_='dim'))
  return together(parts)


def _pictures(runs: Runs, album: Album) -> Markup:
  parts = []
  if data := next(
    (run.data_picture for run in runs.values() if run.data_picture), None
  ):
    parts.append(album.grid({'data': data}))
  samplers = dict.fromkeys(name for run in runs.values() for name in run.pictures)
  for sampler in list(samplers)[:12]:
    pictures = {}
    for name, run in runs.items():
      if by_step := run.pictures.get(sampler):
        pictures[f'{name}, step {max(by_step):,}'] = by_step[max(by_step)]
    parts += [element('h3', sampler), album.grid(pictures, f'{sampler}, ')]
  if not samplers:
    parts.append(element('p', 'No pictures were made in training.', class_='dim'))
  return together(parts)


def _curves(runs: Runs) -> Markup:
  """Every metric that at least one run has, all runs on one axis."""
  metrics = dict.fromkeys(
    key
    for run in runs.values()
    for key, s in run.metrics.series.items()
    if has_values(s)
  )
  first = [key for key in ('loss', 'images_per_s') if key in metrics]
  evaluated = [key for key in metrics if '/' in key]
  rest = [key for key in metrics if key not in first and key not in evaluated]
  figures = []
  evaluated = [
    key for key in evaluated if not key.endswith(('/evaluations', '/samples'))
  ]
  names = [*first, *evaluated, *rest]
  for key in names[:MAX_FIGURES]:
    curves = []
    for i, (name, run) in enumerate(runs.items()):
      series = run.metrics.series.get(key)
      if series and has_values(series):
        curves.append(Curve(name, _smooth(series), i))
    figures.append(figure(key, curves, place='comparison'))
  parts = [element('div', *figures, class_='plots')]
  text = 'Running means over a fortieth of the rows of each run, if it has 20.'
  parts.append(element('p', text, class_='dim'))
  if len(names) > MAX_FIGURES:
    text = f'Not drawn: {", ".join(names[MAX_FIGURES:])}.'
    parts.append(element('p', text, class_='dim'))
  return together(parts)


def _smooth(series: Series) -> Series:
  mean = smoothed(series)
  return mean.series if mean else series
