"""`--mode=train`: trains from the first step, or the last checkpoint, to the end."""

import argparse

from cmjax import train
from cmjax.evaluation import build_metrics
from cmjax.modes import evaluate
from cmjax.runtime import workdir
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
  train.train(prepared, folder, hooks, flags.profile and Span(*flags.profile))
