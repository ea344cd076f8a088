"""Pages of HTML in one file, in which every text of a file is escaped.

A page has no script and loads nothing. Elements are `Markup`; whatever else becomes
part of one is escaped, as names, configs and metrics may be those of a stranger.
"""

from collections.abc import Iterable, Mapping, Sequence
import html
import os
from pathlib import Path
import re
from typing import Any

import cmjax
from cmjax.runtime import paths

GENERATOR = '<meta name="generator" content="cmjax '  # then the version
MAX_TEXT = 2_000  # characters of a text that is not markup
_VOID = ('img', 'br', 'meta')


class Markup(str):
  """Text that is HTML."""


def text(value: Any, most: int = MAX_TEXT) -> Markup:
  """Escapes what is not `Markup`; without control characters, and shortened."""
  if isinstance(value, Markup):
    return value
  string = str(value)
  if len(string) > most:
    string = f'{string[:most]} [... {len(string) - most:,} characters]'
  string = re.sub(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]', '\ufffd', string)
  return Markup(html.escape(string))


def element(name: str, *children: Any, **attributes: Any) -> Markup:
  """An element; `class_` is the attribute `class`, True is one without a value."""
  parts = [name]
  for key, value in attributes.items():
    key = key.rstrip('_').replace('_', '-')
    if value is True:
      parts.append(key)
    elif value not in (None, False):
      parts.append(f'{key}="{text(value, 10**8)}"')
  start = f'<{" ".join(parts)}>'
  if name in _VOID:
    return Markup(start)
  return Markup(f'{start}{"".join(map(text, children))}</{name}>')


def together(parts: Iterable[Any], between: str = '\n') -> Markup:
  """Elements one after the other."""
  return Markup(between.join(map(text, parts)))


_NUMBER = re.compile(r'[-+]?\d[\d.,]*(e[-+]?\d+)?( ± .*)?|nan|-?inf')


def table(rows: Sequence[Mapping[str, Any]], most: int = 200) -> Markup:
  """A table, in a box of its own that scrolls; columns of numbers are aligned right.

  Args:
    rows: cells by column; one that is missing or None is left empty, and so is no
      whole column.
    most: how many rows are shown.
  """
  columns = dict.fromkeys(key for row in rows for key in row)
  columns = [key for key in columns if any(_cell(row.get(key)) for row in rows)]
  cells = [[_cell(row.get(key)) for key in columns] for row in rows[:most]]
  numbers = [
    all(not cell or _NUMBER.fullmatch(cell) for cell in column)
    for column in zip(*cells)
  ]

  def line(name: str, values: Iterable[Any]) -> Markup:
    return element(
      'tr',
      *(element(name, v, class_=n and 'n') for v, n in zip(values, numbers)),
    )

  head = element('thead', line('th', columns))
  body = element('tbody', together(line('td', row) for row in cells))
  more = f'{len(rows) - most:,} more rows' if len(rows) > most else None
  parts = [element('table', head, body), more and element('p', more, class_='dim')]
  return element('div', *filter(None, parts), class_='box')


def _cell(value: Any) -> str:
  return '' if value is None else number(value)


def number(value: Any) -> str:
  """Text of a number in a table, to four digits; other values as they are."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return value if isinstance(value, str) else str(value)
  if isinstance(value, int) or (value.is_integer() and abs(value) < 1e9):
    return f'{int(value):,}' if abs(value) < 1e15 else f'{value:.4g}'
  return f'{value:,.0f}' if 1e3 <= abs(value) < 1e9 else f'{value:.4g}'


def facts(pairs: Mapping[str, Any]) -> Markup:
  """A list of facts by name; those that are None or empty are left out."""
  items = (
    element('div', element('dt', key), element('dd', value))
    for key, value in pairs.items()
    if value not in (None, '')
  )
  return element('dl', *items)


def page(title: str, body: Markup) -> str:
  """The whole page."""
  return '\n'.join(
    (
      '<!DOCTYPE html>',
      '<html lang="en"><head><meta charset="utf-8">',
      f'{GENERATOR}{text(cmjax.__version__)}">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      '<meta name="color-scheme" content="light dark">',
      '<link rel="icon" href="data:,">',
      element('title', title),
      f'<style>{STYLE}</style></head>',
      element('body', element('main', body)),
      '</html>\n',
    )
  )


def is_ours(path: Path) -> bool:
  """Whether a file is a page that `page` wrote."""
  try:
    with path.open('rb') as file:
      return GENERATOR.encode() in file.read(1_000)
  except OSError:
    return False


def write(path: Path, content: str) -> Path:
  """Writes a page in one stroke, and returns where.

  An older page of ours is replaced. Another file of that name is left as it is, and the
  page becomes `NAME_2.html`, or the first of these that is free or ours.
  """
  name, number = path, 2
  while path.exists() and not is_ours(path):
    path = name.with_stem(f'{name.stem}_{number}')
    number += 1
  if paths.remote(path):
    paths.write_text(path, content)
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_name(f'.{path.name}.{os.getpid()}.new')
  new.unlink(missing_ok=True)  # it may be a link
  try:
    new.write_text(content, encoding='utf-8')
    new.replace(path)
  finally:
    new.unlink(missing_ok=True)
  return path


STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c2025; --dim: #5d6672;
  --line: #e2e5ea; --card: #f7f8fa; --accent: #2460b9; --good: #217a43;
  --bad: #b92c46; --busy: #9a5b00 }
@media (prefers-color-scheme: dark) { :root { --bg: #121519; --fg: #e3e6ea;
  --dim: #99a3af; --line: #2b3139; --card: #191d23; --accent: #82b1ff;
  --good: #6cc98d; --bad: #ff8a9d; --busy: #e7ad52 } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "DejaVu Sans", sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 56px }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em;
  overflow-wrap: anywhere }
h2 { font-size: 19px; margin: 40px 0 12px; padding-top: 14px;
  border-top: 1px solid var(--line); letter-spacing: -.005em }
h3 { font-size: 15px; margin: 22px 0 8px; overflow-wrap: anywhere }
p { margin: 8px 0; max-width: 78ch; overflow-wrap: anywhere }
a { color: var(--accent); text-decoration: none }
a:hover { text-decoration: underline }
code, pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas,
  "DejaVu Sans Mono", monospace }
code { overflow-wrap: anywhere }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 10px 12px; margin: 8px 0; overflow-x: auto }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere }
nav { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 14px 0 0 }
.dim { color: var(--dim) }
.good { color: var(--good) } .bad { color: var(--bad) } .busy { color: var(--busy) }
.state { font-weight: 600 }
.error { border-left: 3px solid var(--bad); padding: 2px 0 2px 12px }
.tiles { display: grid; gap: 1px; margin: 20px 0 0; background: var(--line);
  border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)) }
.tiles > div { background: var(--bg); padding: 10px 14px }
.tiles b { display: block; font-size: 18px; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.tiles span { color: var(--dim); font-size: 12.5px; line-height: 1.3;
  display: block; overflow-wrap: anywhere }
dl { margin: 0; display: grid; gap: 0 32px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)) }
dl > div { display: grid; grid-template-columns: 116px 1fr; gap: 12px;
  padding: 5px 0; border-bottom: 1px solid var(--line) }
dt { color: var(--dim) }
dd { margin: 0; overflow-wrap: anywhere }
.box { overflow-x: auto; margin: 10px 0 }
table { border-collapse: collapse; font-size: 13.5px;
  font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; color: var(--dim); white-space: nowrap }
th, td { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top }
td { max-width: 32em; overflow-wrap: break-word }
td code { overflow-wrap: break-word }
th.n, td.n { white-space: nowrap; text-align: right }
details { margin: 10px 0 }
summary { cursor: pointer; color: var(--accent) }
.plots, .pictures { display: grid; gap: 22px 24px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)) }
.pictures { gap: 16px }
.pictures.wide {
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)) }
.pictures.small {
  grid-template-columns: repeat(auto-fill, minmax(min(46%, 180px), 1fr)) }
h4 { font-size: 14px; margin: 18px 0 6px }
ul { margin: 4px 0; padding-left: 18px; font-size: 13.5px }
.study { display: flex; flex-wrap: wrap; gap: 8px 32px }
.study > figure { flex: 0 1 400px }
.study > div { flex: 1 1 300px; min-width: 0 }
figure { margin: 0; min-width: 0 }
figcaption { font-size: 13px; margin-bottom: 2px; display: flex; gap: 0 12px;
  justify-content: space-between; overflow-wrap: anywhere }
figcaption b { font-weight: 600 }
figcaption i { font-style: normal; color: var(--dim); white-space: nowrap;
  font-variant-numeric: tabular-nums }
.legend { font-size: 12px; color: var(--dim); min-height: 18px; margin-bottom: 2px;
  display: flex; flex-wrap: wrap; gap: 0 12px; overflow-wrap: anywhere }
.legend i { font-style: normal }
.legend u { text-decoration: none; display: inline-block; width: 14px; height: 3px;
  border-radius: 2px; margin-right: 5px; vertical-align: middle }
svg, img { display: block; width: 100%; height: auto }
svg { overflow: visible; stroke-linejoin: round }
img { border-radius: 4px; border: 1px solid var(--line) }
footer { margin-top: 44px; padding-top: 12px; border-top: 1px solid var(--line);
  color: var(--dim); font-size: 13px }
@media (max-width: 600px) { main { padding: 18px 16px 40px } h1 { font-size: 22px }
  dl > div { grid-template-columns: 96px 1fr } .tiles b { font-size: 16px }
  .tiles { grid-template-columns: repeat(2, 1fr) } }
@media print { h2 { break-after: avoid } figure { break-inside: avoid } }
"""
