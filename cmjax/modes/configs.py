"""`--mode=configs`: lists the configs that ship with cmjax."""

import argparse

from cmjax.runtime.config import shipped


def run(flags: argparse.Namespace) -> None:
  """Prints every config with the first line of its file."""
  for name, line in shipped().items():
    print(f'{name:15}{line}')
  print(
    '\nEach takes toy2d, digits or cifar10, as in --config=ect:digits; its file lists '
    'the sources, and the expected and measured results'
  )
