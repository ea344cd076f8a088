"""`--mode=configs`: the configs that ship."""

import argparse

from cmjax.runtime.config_files import shipped


def run(flags: argparse.Namespace) -> None:
  """Prints every config with the first line of its file."""
  for name, line in shipped().items():
    print(f'{name:15}{line}')
  print(
    '\nEach is for toy2d, digits and cifar10, as in --config=ect:digits; its file has '
    'the sources, the expected results and the measured ones'
  )
