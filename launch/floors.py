"""Draws the floors of the package from its imports, for cmjax/README.md.

Usage: python launch/floors.py [--write]   (--write: into the README, else to stdout)

The floors are `FLOORS` of tests/test_house.py, which checks that imports point down.
"""

import argparse
from collections.abc import Mapping, Sequence
import fnmatch
import graphlib
from pathlib import Path
import sys
import textwrap

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / 'cmjax' / 'README.md'
WIDTH = 100
BEGIN, END = '<!-- python launch/floors.py --write -->\n```\n', '\n```\n<!-- end -->'


def drawing(floors: Mapping[str, Sequence[str]], imports: Mapping[str, set]) -> str:
  """The floors from top to bottom, with their folders and modules.

  Modules stand in the order of their imports, those that import nothing first.

  Args:
    floors: patterns of the modules by the name of the floor, from bottom to top.
    imports: for every module, the modules that it imports.
  """
  graph = {name: sorted(imports[name] & imports.keys()) for name in sorted(imports)}
  order = list(graphlib.TopologicalSorter(graph).static_order())

  def floor_of(name: str) -> int:
    for floor, patterns in enumerate(floors.values(), 1):
      if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
        return floor
    raise ValueError(f'{name}: has no floor; add it to FLOORS in tests/test_house.py')

  lines = []
  for floor, title in reversed(list(enumerate(floors, 1))):
    rows: dict[str, list[str]] = {}
    for name in order:
      if floor_of(name) == floor:
        folder, _, stem = name.rpartition('.')
        rows.setdefault(f'{folder}/' if folder else '', []).append(stem)
    first = f'{floor} {title}'
    for folder, stems in sorted(rows.items()):
      text = ' '.join([folder, *stems] if folder else stems)
      indents = dict(initial_indent=f'{first:11}', subsequent_indent=' ' * 13)
      lines += textwrap.wrap(text, WIDTH, **indents)
      first = ''
  return '\n'.join(lines)


def current() -> str:
  """The drawing of this checkout."""
  sys.path.insert(0, str(ROOT))
  from tests import test_house as house

  imports = {house.name_of(path): house.rooms_imported(path) for path in house.FILES}
  return drawing(house.FLOORS, imports)


def placed(text: str, picture: str) -> str:
  """A text with the drawing between its two markers."""
  before, begin, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not begin or not end:
    raise SystemExit(f'{README}: needs the line {BEGIN.splitlines()[0]} and its end')
  return f'{before}{begin}{picture}{end}{after}'


def main() -> None:
  """Prints the drawing, or writes it into cmjax/README.md."""
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--write', action='store_true', help='into cmjax/README.md')
  if not flags.parse_args().write:
    print(current())
    return
  text = README.read_text(encoding='utf-8')
  README.write_text(placed(text, current()), encoding='utf-8')


if __name__ == '__main__':
  main()
