"""`--mode=evaluate`: every sampler measured by every metric."""

import argparse

from cmjax import evaluate, logs
from cmjax import run as runs
from cmjax.core import unused


def run(flags: argparse.Namespace) -> None:
  """Prints the table, and writes it as Markdown and JSON into the run."""
  opened = runs.reopen_for(flags.workdir, flags.config, flags.overrides, flags.trust)
  rows = evaluate.table(opened, opened.params, evaluate.build_metrics(opened))
  text = (
    f'{opened.source.name}, step {opened.step:,}, '
    f'weights {opened.config.sample_weights}, '
    f'seed {opened.config.evaluation.seed}\n\n{logs.markdown_table(rows)}\n'
  )
  path = unused(runs.beside(opened) / f'evaluation_{opened.step:08d}', '.json')
  logs.write_json(path, runs.facts(opened, rows=rows))
  path.with_suffix('.md').write_text(text, encoding='utf-8')
  logs.say(f'{text}\n{path} and .md')
