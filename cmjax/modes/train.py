"""`--mode=train`: a run from its first step, or from where it is, to its end."""

import argparse

from cmjax import config as configs
from cmjax import evaluate, train, workdir
from cmjax import run as runs


def run(flags: argparse.Namespace) -> None:
  """Trains; with a --workdir alone, goes on with the run in it."""
  folder = workdir.folder(flags.workdir)
  config = workdir.config_for(flags.config, folder, flags.overrides, flags.trust)
  configs.require(config)
  workdir.check_claim(folder, config)
  prepared = runs.prepare(config, trust=flags.trust)
  hooks = {'picture': evaluate.log_pictures}
  if config.every.evaluate_steps:
    hooks['evaluate'] = evaluate.table_logger(evaluate.build_metrics(prepared))
  train.train(prepared, folder, hooks)
