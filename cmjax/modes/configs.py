"""`--mode=configs`: the configs that ship."""

import argparse

from cmjax import config


def run(flags: argparse.Namespace) -> None:
  """Prints every config with the first line of its file."""
  for name, line in config.shipped().items():
    print(f'{name:15}{line}')
  print(
    '\nEach is for toy2d, digits and cifar10, as in --config=ect:digits; what a recipe '
    'is, where it comes from and what it reaches is in its file'
  )
