"""`--mode=train`: trains from the first step, or the last checkpoint, to the end."""

import argparse
from pathlib import Path

import jax

from cmjax import train
from cmjax.core import UserError, first_line
from cmjax.evaluation import build_metrics
from cmjax.modes import evaluate
from cmjax.report import one_run
from cmjax.runtime import logs, paths, provenance, workdir
from cmjax.runtime.config_record import require
from cmjax.runtime.profile import Span
from cmjax.runtime.run import prepare


def run(flags: argparse.Namespace) -> None:
  """Trains; with a --workdir alone, continues the run in it."""
  folder = workdir.folder(flags.workdir)
  config = workdir.config_for(flags.config, folder, flags.overrides, flags.trust)
  require(config)
  workdir.check_claim(folder, config)
  prepared = prepare(config, trust=flags.trust)
  hooks = {'picture': evaluate.log_pictures}
  if config.every.evaluate_steps:
    hooks['evaluate'] = evaluate.table_logger(build_metrics(prepared), folder)
  try:
    train.train(prepared, folder, hooks, flags.profile and Span(*flags.profile))
  except UserError:
    raise  # a refusal, possibly of a folder in which another process trains
  except Exception:
    write_report(folder)
    raise
  write_report(folder)


def write_report(folder: Path) -> None:
  """Writes the report of a run from the first process; a failure is only reported."""
  if jax.process_index() != 0 or not paths.answers(folder):
    return
  try:
    if not (folder / provenance.NAME).exists():
      return  # an error before the run began leaves no folder
    path = one_run.write(folder)
  except Exception as error:  # of any kind: the run itself is complete
    logs.say(f'no report: {first_line(error)} ({type(error).__name__})')
    return
  if path.name != one_run.NAME:
    logs.say(f'{folder / one_run.NAME} is not a report of cmjax, and was left as it is')
  logs.say(f'report: {path}')
