"""`--mode=study`: the weights of a run by noise level, in tables and pictures."""

import argparse

from cmjax import build, logs
from cmjax import run as runs
from cmjax.core import UserError, unused
from cmjax.studies import Study


def run(flags: argparse.Namespace) -> None:
  """Makes every study of the config: one page, its numbers as JSON, and a PNG each."""
  opened = runs.reopen_for(flags.workdir, flags.config, flags.overrides, flags.trust)
  if not opened.config.studies:
    raise UserError('config.studies is empty; configs/parts.py:studies() has some')
  for name, part in opened.config.studies.items():
    build.function(part.fn, f'config.studies.{name}.fn', Study)
  folder = unused(runs.beside(opened) / 'studies' / f'step_{opened.step:08d}')
  subject = runs.subject_of(opened)
  pages, found = [f'# {opened.source.name}, step {opened.step:,}'], {}
  for name, part in opened.config.studies.items():
    logs.say(f'{name} ...')
    study = build.build(part, f'config.studies.{name}', Study, subject=subject)
    logs.write_png(folder / f'{name}.png', logs.curves(study.rows, study.x, study.ys))
    pages.append(_page(name, study))
    found[name] = study.rows
  text = '\n\n'.join(pages) + '\n'
  (folder / 'study.md').write_text(text, encoding='utf-8')
  logs.write_json(folder / 'study.json', runs.facts(opened, studies=found))
  logs.say(f'{text}\n{folder}/study.md, study.json and a picture a table')


def _page(name: str, study: Study) -> str:
  """Its title, table and picture, and what each column means."""
  rows = [{key: logs.number(value) for key, value in row.items()} for row in study.rows]
  meanings = '\n'.join(f'- `{key}`: {text}' for key, text in study.columns.items())
  table = logs.markdown_table(rows)
  return f'## {study.title}\n\n{table}\n\n{meanings}\n\n![]({name}.png)'
