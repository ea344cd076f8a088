"""Prints the oldest versions that setup.cfg allows, as constraints for pip.

Usage: python launch/lower_bounds.py > constraints.txt
"""

import configparser
from pathlib import Path


def pins(text: str) -> list[str]:
  """`name==version` for every `name>=version` of install_requires."""
  config = configparser.ConfigParser()
  config.read_string(text)
  lines = config['options']['install_requires'].split()
  return [line.replace('>=', '==') for line in lines]


if __name__ == '__main__':
  setup = Path(__file__).resolve().parent.parent / 'setup.cfg'
  print('\n'.join(pins(setup.read_text(encoding='utf-8'))))
