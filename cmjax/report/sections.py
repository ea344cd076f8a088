"""The sections of a report: each from what a work directory holds."""

from collections.abc import Callable, Mapping
import json
import shlex
from typing import Any

import numpy as np

from cmjax.core import first_line
from cmjax.report import html
from cmjax.report.contents import Contents, Document
from cmjax.report.figures import Album, training_figures
from cmjax.report.html import Markup, element, together
from cmjax.runtime import config
from cmjax.runtime.config_json import to_json
from cmjax.runtime.config_record import flat

MAX_PICTURES = 6  # of a sampler over training
MAX_SAMPLERS = 12


def safely(section: Callable[..., Markup], *arguments: Any) -> Markup:
  """What `section` returns; a sentence instead if a file cannot be shown."""
  try:
    return section(*arguments)
  except Exception as error:  # of any kind, as a file may hold anything
    files = [str(a.path) for a in arguments if isinstance(a, Document)]
    what = ', '.join(files) or 'a file of it'
    text = f'Not shown, as {what} is damaged ({first_line(error)}).'
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
    'Started': date(start['started']),
  }
  parts = [element('pre', _wrapped(start['command'])), html.facts(facts)]
  rows: list[dict[str, Any]] = []
  for row in run.starts:
    if 'started' in row:
      rows.append(
        {'started': date(row['started']), 'first step': row.get('first_step')}
      )
    elif rows:
      rows[-1] |= {'ended': date(row['ended']), 'error': row.get('error') or 'none'}
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


def date(time: Any) -> str:
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
