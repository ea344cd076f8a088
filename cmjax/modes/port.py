"""`--mode=port`: any weights that open -> a checkpoint, or one safetensors file."""

import argparse

from cmjax import checkpoint, logs, pretrained
from cmjax.core import UserError


def run(flags: argparse.Namespace) -> None:
  """Converts --from to --to, and prints what it was."""
  source, target = getattr(flags, 'from'), flags.to
  if not source or not target:
    raise UserError('--mode=port needs --from=PATH and --to=FOLDER or FILE.safetensors')
  known = pretrained.convert(
    source,
    checkpoint.local(target),
    form=flags.form,
    trust=flags.trust,
    say=logs.say,
  )
  classes = f'{known.classes} classes' if known.classes else 'no classes'
  logs.say(
    f'{target}: a {known.config.precond.fn} of {known.config.network.fn} on '
    f'{known.shape} with {classes}, from {source} ({known.origin})'
  )
