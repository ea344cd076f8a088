"""`--mode=port`: converts weights to a checkpoint or to a safetensors file."""

import argparse

from cmjax.core import UserError
from cmjax.runtime import logs, pretrained


def run(flags: argparse.Namespace) -> None:
  """Converts --from to --to, and prints a summary of the model."""
  source, target = getattr(flags, 'from'), flags.to
  if not source or not target:
    raise UserError(
      '--mode=port needs --from=PATH and --to=FOLDER or --to=FILE.safetensors'
    )
  model = pretrained.convert(
    source,
    target,
    form=flags.form,
    trust=flags.trust,
    say=logs.say,
  )
  classes = f'{model.classes} classes' if model.classes else 'no classes'
  logs.say(
    f'{target}: a {model.kind}, trained on examples of shape {model.shape} with '
    f'{classes}, from {source} ({model.origin})'
  )
