"""`--mode=report`: the page of a run, or of several runs side by side."""

import argparse
from pathlib import Path

from cmjax.core import UserError, unused
from cmjax.report import one_run, several_runs
from cmjax.report.contents import check_run
from cmjax.runtime import paths


def run(flags: argparse.Namespace) -> None:
  """Writes RUN/report.html; for several runs one page, by default in this folder."""
  names = list(filter(None, [flags.workdir, *flags.runs]))
  if not names:
    raise UserError('--mode=report: give --workdir=RUN, or --mode=report RUN RUN ...')
  folders = list(map(paths.path, names))
  for folder in folders:
    check_run(folder)
  if flags.to and Path(flags.to).suffix != '.html':
    raise UserError(f'--to={flags.to}: the name of a report ends with .html')
  if len(folders) == 1:
    path = paths.path(flags.to or folders[0] / one_run.NAME)
  else:
    path = paths.path(flags.to or unused(Path('report'), '.html'))
  try:
    if len(folders) == 1:
      written = one_run.write(folders[0], path)
    else:
      written = several_runs.write(folders, path)
  except OSError as error:
    raise UserError(
      f'{path}: cannot be written ({error.strerror or error}); give --to=FILE.html'
    ) from error
  if written != path:
    print(f'{path} is not a report of cmjax, and was left as it is')
  print(written)
