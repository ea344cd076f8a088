"""The sections of a report: each from what a work directory holds."""

from collections.abc import Callable, Mapping, Sequence
import json
import shlex
from typing import Any

import numpy as np

from cmjax.core import first_line
from cmjax.figures import Album, Curve, evaluation_figures, figure, training_figures
from cmjax.runtime import config, html
from cmjax.runtime.config_json import to_json
from cmjax.runtime.config_record import flat
from cmjax.runtime.contents import Contents, Document
from cmjax.runtime.html import Markup, element, together
from cmjax.runtime.metric_rows import Series

MAX_PICTURES = 6  # of a sampler over training
MAX_SAMPLERS, MAX_TABLES = 12, 12


def safely(section: Callable[..., Markup], *arguments: Any) -> Markup:
  """What `section` returns; a sentence instead if a file holds what nobody expects."""
  try:
    return section(*arguments)
  except Exception as error:  # of any kind, as a file may hold anything
    text = f'Not shown, as a file of it is damaged ({first_line(error)}).'
    return element('p', text, class_='dim')


def last_start(run: Contents) -> dict[str, Any]:
  """The row of the newest start; empty if there is none."""
  return next((row for row in reversed(run.starts) if 'started' in row), {})


def whole_number(value: Any) -> str | None:
  """An integer with separators of thousands; None for anything else."""
  return f'{value:,}' if isinstance(value, int) else None


def what_was_run(run: Contents) -> Markup:
  """Command, versions, devices, revision and config."""
  return together((safely(_starts, run), element('h3', 'Config'), safely(_config, run)))


def _starts(run: Contents) -> Markup:
  start = last_start(run)
  if not start:
    return element('p', 'The command is not known: no starts.jsonl.', class_='dim')
  versions = ', '.join(f'{k} {v}' for k, v in dict(start['versions']).items())
  git, processes = start.get('git'), start.get('processes', 1)
  several = f', {processes} processes' if processes != 1 else ''
  facts = {
    'Data': f'{start.get("data", "")}, {whole_number(start.get("examples"))} examples',
    'Parameters': whole_number(start.get('parameters')),
    'Devices': f'{start["devices"]} x {start["device_kind"]} ({start["platform"]})'
    + several,
    'Versions': versions,
    'Revision': git
    and element(
      'span',
      element('code', str(git['revision'])[:12]),
      ' with uncommitted changes' * bool(git['uncommitted_changes']),
    ),
    'Started': _date(start['started']),
  }
  parts = [element('pre', _wrapped(start['command'])), html.facts(facts)]
  rows: list[dict[str, Any]] = []
  for row in run.starts:
    if 'started' in row:
      rows.append(
        {'started': _date(row['started']), 'first step': row.get('first_step')}
      )
    elif rows:
      rows[-1] |= {'ended': _date(row['ended']), 'error': row.get('error') or 'none'}
  if len(rows) > 1:
    parts += [element('h3', 'Starts'), html.table(rows[::-1], most=20)]
  return together(parts)


def _wrapped(command: str, width: int = 96) -> str:
  """A shell command over several lines."""
  lines: list[list[str]] = [[]]
  for word in map(shlex.quote, shlex.split(command)):
    if len(' '.join([*lines[-1], word])) > width:
      lines.append([])
    lines[-1].append(word)
  return ' \\\n  '.join(map(' '.join, filter(None, lines)))


def _date(time: Any) -> str:
  """A time in UTC, for people."""
  return str(time).replace('T', ' ').replace('+00:00', ' UTC')


def _config(run: Contents) -> Markup:
  if run.config is None:
    return element('p', 'The config is not known: no config.json.', class_='dim')
  name, shipped = config.closest(run.config)
  here, there = flat(run.config), flat(shipped)
  changed = [key for key in sorted({*here, *there}) if here.get(key) != there.get(key)]
  rows = [
    {
      'key': element('code', key.removeprefix('config.')),
      name: element('code', _value(there, key)),
      'this run': element('code', _value(here, key)),
    }
    for key in changed
  ]
  closest = element('code', name)
  if not rows:
    text = element('p', 'The config is ', closest, ', which ships with cmjax.')
  else:
    differ = f', from which {len(rows)} {"value" if len(rows) == 1 else "values"}'
    differ += ' differs:' if len(rows) == 1 else ' differ:'
    text = element('p', 'Closest to ', closest, differ)
  whole = html.text(to_json(run.config), 200_000)
  folded = element('details', element('summary', 'All values'), element('pre', whole))
  return together((text, html.table(rows) if rows else '', folded))


def _value(values: Mapping[str, Any], key: str) -> str:
  return json.dumps(values[key]) if key in values else '(absent)'


def how_it_went(run: Contents) -> Markup:
  """The curves of training."""
  if not run.metrics.num_rows:
    return element('p', 'Nothing is logged: metrics.jsonl has no row.', class_='dim')
  return together(training_figures(run.metrics.series))


def what_it_makes(run: Contents, album: Album) -> Markup:
  """Pictures of the same noise over training, beside the data; samples and edits."""
  parts: list[Markup] = []
  newest = {}
  if run.data_picture:
    newest['data'] = run.data_picture
  samplers = dict(list(run.pictures.items())[:MAX_SAMPLERS])
  for name, by_step in samplers.items():
    newest[f'{name}, step {max(by_step):,}'] = by_step[max(by_step)]
  if samplers:
    parts.append(album.grid(newest))
    if not run.data_picture:
      text = 'No picture of the data: pictures/data.png is missing.'
      parts.append(element('p', text, class_='dim'))
  else:
    text = 'No pictures were made during training (config.every.picture_steps).'
    parts.append(element('p', text, class_='dim'))
  for name, by_step in samplers.items():
    steps = spread(sorted(by_step), min(MAX_PICTURES, 60 // len(samplers)))
    if len(steps) > 1:
      parts.append(element('h3', f'{name}: the same noise over training'))
      pictures = {f'step {step:,}': by_step[step] for step in steps}
      parts.append(album.grid(pictures, f'{name}, '))
  for title, paths in (('Samples', run.samples[:1]), ('Edits', run.edits[:4])):
    if paths:
      parts.append(element('h3', title))
      sheets = {path.parent.name: path for path in paths}
      parts.append(album.grid(sheets, f'{title} ', large=True))
  return together(parts)


def spread(steps: list[int], most: int) -> list[int]:
  """At most `most` of the steps, evenly, with the first and the last."""
  if len(steps) <= most:
    return steps
  index = np.linspace(0, len(steps) - 1, max(2, most)).round().astype(int)
  return [steps[i] for i in index]


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
    for row in evaluation_rows(document):
      rows.setdefault(str(row['sampler']), {'step': document.value['step']} | row)
  for row in in_training(run):
    rows.setdefault(row['sampler'], row)
  return sorted(rows.values(), key=lambda row: row['evaluations'])


def in_training(run: Contents) -> list[dict[str, Any]]:
  """The last evaluation of each sampler during training, from `SAMPLER/METRIC`."""
  rows: dict[str, dict[str, Any]] = {}
  for key, series in run.metrics.series.items():
    sampler, slash, metric = key.partition('/')
    if slash:
      first = {'step': int(series.steps[-1]), 'sampler': sampler, 'evaluations': 0}
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
    if about:
      curves = [
        Curve(y, _column(rows, about['x'], y), i) for i, y in enumerate(about['ys'])
      ]
      title = f'{name} against {about["x"]}'
      drawn = figure(title, curves, place='study', x_label='', log=(True, True))
      parts.append(element('div', drawn, class_='plots'))
    elif picture.is_file():
      parts.append(album.grid({name: picture}, 'study '))
    meanings = about.get('columns', {}).items()
    text = together(
      (element('li', element('code', key), f': {text}') for key, text in meanings), ''
    )
    parts.append(element('ul', text, class_='dim') if meanings else '')
    summary = element('summary', f'Table, {len(rows)} rows')
    parts.append(element('details', summary, html.table(rows, most=60)))
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
