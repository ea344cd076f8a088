"""`--mode=study`: measures trained weights at each sigma, in tables and plots."""

import argparse
from typing import Any

from cmjax import pictures
from cmjax.core import UserError, unused
from cmjax.runtime import build, logs, results
from cmjax.runtime.functions import function
from cmjax.runtime.reopen import beside, facts, reopen_for, subject_of
from cmjax.studies.study import Study


def run(flags: argparse.Namespace) -> None:
  """Runs every study of the config, and writes one page, a JSON file and the plots."""
  opened = reopen_for(flags.workdir, flags.config, flags.overrides, flags.trust)
  parts: dict[str, Any] = dict(opened.config.studies)
  if not parts:
    raise UserError(
      'config.studies: is empty; add some, as configs/parts.py:studies() does'
    )
  for name in parts:  # all are checked before the first, slow one
    function(parts[name].fn, f'config.studies.{name}.fn', Study)
  folder = unused(beside(opened) / 'studies' / f'step_{opened.step:08d}')
  subject = subject_of(opened)
  pages, tables, about = [f'# {opened.source.name}, step {opened.step:,}'], {}, {}
  for name in parts:
    logs.say(f'{name} ...')
    study = build.build(parts[name], f'config.studies.{name}', Study, subject=subject)
    plot = pictures.curves(study.rows, study.x, study.ys)
    results.write_png(folder / f'{name}.png', plot)
    pages.append(_page(name, study))
    tables[name] = study.rows
    about[name] = {k: v for k, v in study._asdict().items() if k != 'rows'}
  text = '\n\n'.join(pages) + '\n'
  results.write_text(folder / 'study.md', text)
  results.write_json(folder / 'study.json', facts(opened, studies=tables, about=about))
  logs.say(f'{text}\n{folder}/study.md, study.json and one plot per table')


def _page(name: str, study: Study) -> str:
  """Markdown of a study: title, table, the meaning of the columns, and the plot."""
  rows = [{key: logs.number(value) for key, value in row.items()} for row in study.rows]
  meanings = '\n'.join(f'- `{key}`: {text}' for key, text in study.columns.items())
  table = logs.markdown_table(rows)
  return f'## {study.title}\n\n{table}\n\n{meanings}\n\n![]({name}.png)'
