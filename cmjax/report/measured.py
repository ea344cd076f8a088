"""The sections of a report on what has been measured after, or during, training."""

from collections.abc import Mapping, Sequence
import contextlib
from typing import Any

import numpy as np

from cmjax.report import html
from cmjax.report.contents import Contents, Document
from cmjax.report.figures import Album, Curve, evaluation_figures, figure
from cmjax.report.html import Markup, element, together
from cmjax.report.metric_rows import Series
from cmjax.report.sections import safely

MAX_TABLES = 12


def evaluation_rows(document: Document) -> list[dict[str, Any]]:
  """The table of an evaluation: means, with deviations if there are several seeds."""
  rows = []
  for row in document.value['rows']:
    deviations = row.get('deviation', {})
    cells = {k: v for k, v in row.items() if k not in ('deviation', 'least', 'seeds')}
    for name, value in cells.items():
      if name in deviations and value is not None:
        form = '.3g' if 0 < abs(value) < 0.01 else '.3f'
        off = deviations[name]
        cells[name] = f'{value:{form}}' + (
          f' ± {off:{form}}' if off is not None else ''
        )
    rows.append(cells)
  return rows


def newest_rows(run: Contents) -> list[dict[str, Any]]:
  """The newest measurement of each sampler, with its step."""
  rows: dict[str, dict[str, Any]] = {}
  for document in run.evaluations:
    with contextlib.suppress(Exception):  # its own table names what is damaged
      for row in evaluation_rows(document):
        name, step = str(row['sampler']), document.value['step']
        row['evaluations'] = int(row['evaluations'])
        rows.setdefault(name, {'sampler': name, 'step': step} | row)
  for row in in_training(run):
    rows.setdefault(row['sampler'], row)
  return sorted(rows.values(), key=lambda row: row['evaluations'])


def in_training(run: Contents) -> list[dict[str, Any]]:
  """The last evaluation of each sampler during training, from `SAMPLER/METRIC`."""
  rows: dict[str, dict[str, Any]] = {}
  for key, series in run.metrics.series.items():
    sampler, slash, metric = key.partition('/')
    if slash:
      first = {'sampler': sampler, 'step': int(series.steps[-1]), 'evaluations': 0}
      rows.setdefault(sampler, first)[metric] = float(series.values[-1])
  return list(rows.values())


def _evaluation(document: Document) -> Markup:
  value, whole = document.value, document.value.get('config', {})
  settings, width = whole.get('evaluation', {}), whole.get('sample_relative_std')
  weights = f'of relative width {width:g}' if width else whole.get('sample_weights')
  about = [value.get('data'), f'weights {weights}', f'labels {settings.get("labels")}']
  about += [f'{name}: {text}' for name, text in value.get('conventions', {}).items()]
  parts = [
    element('h3', f'Step {value["step"]:,}', ' ', element('code', document.path)),
    element('p', '; '.join(map(str, about)), class_='dim'),
    html.table(evaluation_rows(document)),
  ]
  each = []
  for row in value['rows']:
    each += [{'sampler': row['sampler'], **seed} for seed in row.get('seeds', ())]
    if 'least' in row:
      each.append({'sampler': row['sampler'], 'seed': 'least', **row['least']})
  if each:
    summary = element('summary', 'Each seed, and the least value')
    parts.append(element('details', summary, html.table(each)))
  return together(parts)


def how_good(run: Contents) -> Markup:
  """The tables of evaluations, newest first, and the metrics by step."""
  parts = [safely(_evaluation, document) for document in run.evaluations[:MAX_TABLES]]
  if len(run.evaluations) > MAX_TABLES:
    text = f'{len(run.evaluations) - MAX_TABLES} older evaluations are left out.'
    parts.append(element('p', text, class_='dim'))
  if figures := evaluation_figures(run.metrics.series):
    parts.append(element('h3', 'During training'))
    parts.append(html.table(in_training(run)))
    parts.append(element('div', *figures, class_='plots'))
  if not parts:
    text = 'Not evaluated: --mode=evaluate, or config.every.evaluate_steps.'
    parts.append(element('p', text, class_='dim'))
  return together(parts)


def searches(run: Contents) -> Markup:
  """The searched values, and the metric over what was tried."""
  rows, figures = [], []
  for document in run.searches[:20]:
    found = document.value['searched']
    metrics = [key for key in found if key not in ('key', 'best', 'curve')]
    best = found['best']
    best = ', '.join(map(html.number, best)) if isinstance(best, list) else best
    row = {'name': document.path.stem, 'key': found['key'], 'best': f'({best})'}
    rows.append(row | {name: found[name] for name in metrics})
    points = found['curve']
    x = next(key for key in points[0] if key not in metrics)
    for metric in metrics:
      curve = Curve('', _column(points, x, metric))
      log = points[0][x] > 0, None
      title = f'{document.path.stem}: {metric} against {x}'
      figures.append(figure(title, [curve], place='search', x_label='', log=log))
  grid = element('div', *figures, class_='plots')
  return together((html.table(rows), grid))


def studies(run: Contents, album: Album) -> Markup:
  """The tables of the studies with their plots, newest first."""
  return together(safely(_study, run, document, album) for document in run.studies[:3])


def _study(run: Contents, document: Document, album: Album) -> Markup:
  value = document.value
  where = element('code', document.path)
  parts = [element('h3', f'{value["data"]}, step {value["step"]:,}', ' ', where)]
  for name, rows in list(value['studies'].items())[:16]:
    about = value.get('about', {}).get(name, {})
    picture = run.folder / document.path.parent / f'{name}.png'
    parts.append(element('h4', about.get('title', name)))
    drawn = None
    if about:
      curves = [
        Curve(y, _column(rows, about['x'], y), i) for i, y in enumerate(about['ys'])
      ]
      title = f'{name} against {about["x"]}'
      drawn = figure(title, curves, place='study', x_label='', log=(True, True))
    elif picture.is_file():
      drawn = album.add(picture, name, f'study {name}')
    meanings = about.get('columns', {}).items()
    text = together(
      (element('li', element('code', key), f': {text}') for key, text in meanings), ''
    )
    summary = element('summary', f'Table, {len(rows)} rows')
    table = element('details', summary, html.table(rows, most=60))
    beside = element('div', element('ul', text, class_='dim') if text else '', table)
    parts.append(element('div', drawn or '', beside, class_='study'))
  return together(parts)


def _column(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> Series:
  """Column y against column x, in the order of x; null is NaN."""
  points = np.array([(row[x], row.get(y)) for row in rows], np.float64)
  return Series(*points[np.argsort(points[:, 0], kind='stable')].T)


def benches(run: Contents) -> Markup:
  """What --mode=bench has measured, newest first."""
  parts: list[Any] = []
  for document in run.benches[:4]:
    value = dict(document.value)
    shares = [
      {'part': part, 'ms': 1e3 * seconds, 'of a step': seconds / value['step_s']}
      for part, seconds in value.pop('parts', {}).items()
    ]
    value.pop('config', None)
    parts.append(element('h3', element('code', document.path)))
    rows = [{'quantity': key, 'value': number} for key, number in value.items()]
    parts += [html.table(rows, most=60), html.table(shares, most=60)]
  return together(parts)
