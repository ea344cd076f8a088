"""`--mode=configs`: lists the configs that ship with cmjax, and their recipes."""

import argparse

from cmjax.runtime.config import shipped
from cmjax.runtime.config_record import recipes_of


def run(flags: argparse.Namespace) -> None:
  """Prints every config with the first line of its file, and below it its recipes."""
  for name, line in shipped().items():
    print(f'{name:15}{line}')
    for recipe, fid in recipes_of(name).items():
      print(f'  {recipe:28}{f"FID {fid}" if fid else ""}'.rstrip())
  print(
    '\nEach takes toy2d, digits or cifar10, as in --config=ect:digits; its file lists '
    'the sources, and the expected and measured results. Below are the recipes of '
    'papers, with the published FID at one / two evaluations, or of a diffusion model '
    '(at so many)'
  )
