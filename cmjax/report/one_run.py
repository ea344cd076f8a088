"""The report of a run: one page of HTML, from what its work directory holds."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np

from cmjax.report import html, measured, sections
from cmjax.report.contents import Contents, opened
from cmjax.report.figures import Album, has_values, last_value
from cmjax.report.html import Markup, element, together
from cmjax.report.measured import newest_rows
from cmjax.report.sections import last_start, safely, whole_number

NAME = 'report.html'


def write(folder: Path, path: Path | None = None) -> Path:
  """Writes the report of a run, by default into its folder; returns its path.

  Raises: OSError if it cannot be written.
  """
  with opened(folder) as contents:
    return html.write(path or folder / NAME, page(contents))


def page(run: Contents) -> str:
  """The report of a run."""
  album, name = Album(), run.folder.resolve().name
  parts = {
    'run': ('What was run', sections.what_was_run),
    'training': ('How it went', sections.how_it_went),
    'pictures': ('What it makes', lambda run: sections.what_it_makes(run, album)),
    'evaluation': ('How good it is', measured.how_good),
    'searches': ('Searches', measured.searches),
    'studies': ('Studies', lambda run: measured.studies(run, album)),
    'bench': ('Speed', measured.benches),
  }
  optional = {'searches': run.searches, 'studies': run.studies, 'bench': run.benches}
  parts = {k: v for k, v in parts.items() if optional.get(k, True)}
  bodies = {key: safely(build, run) for key, (_, build) in parts.items()}
  links = (element('a', parts[key][0], href=f'#{key}') for key in parts)
  body = together(
    (
      element('header', element('h1', name), _summary(run), safely(_tiles, run)),
      element('nav', *links),
      *(
        element('section', element('h2', parts[key][0], id=key), content)
        for key, content in bodies.items()
      ),
      footer(run.damaged),
    )
  )
  return html.page(f'{name} · cmjax', album.fill(body))


def footer(damaged: list[str]) -> Markup:
  """When and by what the page was written, and what could not be read."""
  now = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC')
  parts = [element('p', f'Written by cmjax {html.cmjax.__version__}, {now}.')]
  if damaged:
    parts.append(element('p', f'Left out: {"; ".join(damaged[:20])}.'))
  return element('footer', *parts)


# The head of the page ----------------------------------------------------------------


def state_of(run: Contents) -> tuple[str, str, str]:
  """A word, its class, and a sentence on how far the run is."""
  total, at = run.total_steps, f'{run.step:,}'
  of = f'{at} of {total:,} steps' if total else f'step {at}'
  if run.trained_by:
    return 'training', 'busy', f'{of} so far, by {run.trained_by}'
  if run.error:
    return 'failed', 'bad', f'at {of}'
  if run.ended is not None and run.ended >= (total or 0):
    return 'finished', 'good', of
  resume = 'the same command resumes it'
  if run.saved:
    what = f'saved at step {run.saved:,}, not finished'
    return 'stopped', 'busy', f'{of}; {what}; {resume}'
  return 'stopped', 'busy', f'{of}; not finished; {resume}'


def _summary(run: Contents) -> Markup:
  word, kind, sentence = state_of(run)
  state = element('span', word, class_=f'state {kind}')
  parts = [element('p', state, f' · {sentence}')]
  if run.error:
    parts.append(element('p', run.error, class_='error'))
  return together(parts)


def _tiles(run: Contents) -> Markup:
  """The numbers that one looks for first."""
  series = run.metrics.series
  tiles: dict[str, Any] = {}
  for row in newest_rows(run)[:3]:
    metrics = [k for k in row if k not in ('step', 'sampler', 'evaluations', 'samples')]
    if metrics:
      tiles[f'{metrics[0]}, {row["sampler"]}'] = html.number(row[metrics[0]])
  loss = last_value(series.get('loss'))
  tiles['loss, last row'] = None if loss is None else html.number(loss)
  if 'images_per_s' in series and has_values(series['images_per_s']):
    speed = float(np.nanmedian(series['images_per_s'].values))
    tiles['images/s, median'] = f'{speed:,.0f}' if speed >= 10 else f'{speed:.3g}'
  skipped = last_value(series.get('skipped_steps'))
  tiles['skipped steps'] = None if skipped is None else html.number(skipped)
  start = last_start(run)
  tiles['parameters'] = whole_number(start.get('parameters'))
  tiles['time in training'] = _duration(run)
  boxes = (
    element('div', element('b', value), element('span', name))
    for name, value in tiles.items()
    if value is not None
  )
  return element('div', *boxes, class_='tiles')


def _duration(run: Contents) -> str | None:
  """The time between starts and ends; None if an end is missing."""
  total, since = 0.0, None
  for row in run.starts:
    try:
      at = datetime.datetime.fromisoformat(str(row.get('started') or row.get('ended')))
    except ValueError:
      return None
    if 'started' in row:
      if since:
        return None
      since = at
    elif since:
      total, since = total + (at - since).total_seconds(), None
  if since or not total:
    return None
  minutes, seconds = divmod(round(total), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours:,} h {minutes} min'
  return f'{minutes} min {seconds} s' if minutes else f'{seconds} s'
