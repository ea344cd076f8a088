"""Compiles the recipes of papers for TPU slices, and writes their table.

Usage: python launch/recipes.py [NAME ...] [--write] [--list]

Compiles the training step of each recipe of configs/papers.py that has changed since it
was last compiled, or of the recipes NAME alone, each in a process of its own at the
lowest priority; libtpu must be installed, and no TPU or data set is needed. The facts
are kept in configs/compiled.json after each, so that a command that is killed continues
where it was; without the file, all are compiled again, such as for another JAX. --write
makes the table in configs/README.md from them; --list compiles nothing and prints which
recipes are to be compiled.
"""

import argparse
from collections.abc import Mapping
import hashlib
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FACTS = ROOT / 'configs' / 'compiled.json'
README = ROOT / 'configs' / 'README.md'
BEGIN, END = '<!-- python launch/recipes.py --write -->\n', '<!-- end -->'
LIMIT_S = 3600
PROGRAM = 2  # raise it when cmjax compiles another step from the same config
# The keys of a config that the compiled step depends on.
KEYS = (
  *('batch_size', 'accumulate', 'grad_clip_norm', 'mesh', 'network', 'precond'),
  *('objective', 'optimizer', 'target_decay', 'reference', 'perceptual', 'ema'),
)
GIB = 2**30
sys.path.insert(0, str(ROOT))


def recipes() -> dict[str, Any]:
  """The list of recipes, from the configs of this checkout."""
  from cmjax.configs import papers

  return papers.RECIPES


def config_of(name: str) -> Any:
  """The config of a recipe."""
  from cmjax.runtime.config import load

  return load(name)


def blank_of(name: str) -> str:
  """The images that replace the data of a recipe, as the flag --blank takes them."""
  from cmjax.configs import papers

  size, classes = papers.images_of(name.partition(':')[2])
  return f'{size},3,{classes}'


def digest(name: str) -> str:
  """A hash of what the compiled step of a recipe depends on."""
  whole = config_of(name).to_dict()
  whole = {key: whole[key] for key in KEYS} | {'teacher': bool(whole['teacher'])}
  parts = PROGRAM, recipes()[name].topology, blank_of(name), whole
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read() -> dict[str, Any]:
  """The facts of compiled recipes, by name."""
  return json.loads(FACTS.read_text(encoding='utf-8')) if FACTS.exists() else {}


def write(facts: Mapping[str, Any]) -> None:
  """Replaces the file of facts, in the order of the recipes."""
  ordered = {name: facts[name] for name in recipes() if name in facts}
  new = FACTS.with_suffix('.new')
  new.write_text(json.dumps(ordered, indent=1) + '\n', encoding='utf-8')
  new.replace(FACTS)


def changed(facts: Mapping[str, Any]) -> list[str]:
  """The recipes without facts, or whose config has changed since."""
  return [
    name
    for name in recipes()
    if name not in facts or facts[name]['digest'] != digest(name)
  ]


def current(facts: Mapping[str, Any]) -> dict[str, Any]:
  """The facts of recipes whose config has not changed since."""
  stale = set(changed(facts))
  return {name: fact for name, fact in facts.items() if name not in stale}


def compiled(name: str) -> dict[str, Any]:
  """Compiles the step of a recipe in another process; its facts.

  Raises: RuntimeError if it fails or takes longer than `LIMIT_S`.
  """
  with tempfile.TemporaryDirectory() as folder:
    command = [
      *('nice', '-n', '19', sys.executable, '-m', 'cmjax.main', '--mode=compile'),
      *(f'--config={name}', f'--topology={recipes()[name].topology}'),
      *(f'--blank={blank_of(name)}', f'--workdir={folder}', '--compilation_cache='),
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    environment = os.environ | {'PYTHONPATH': path}
    try:
      done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=LIMIT_S
      )
    except subprocess.TimeoutExpired as error:
      raise RuntimeError(f'took longer than {LIMIT_S} s') from error
    files = list(Path(folder).glob('*.json'))
    if not files:
      raise RuntimeError(done.stderr.strip()[-2000:])
    full = json.loads(files[0].read_text(encoding='utf-8'))
  kept = ('topology', 'chips', 'parameters', 'fits', 'refusal', 'usable')
  kept += ('flops_per_chip', 'least_step_s', 'least_memory_s')
  facts = {'digest': digest(name)} | {key: full[key] for key in kept}
  memory = full['memory'] or {}
  facts |= {'memory': memory.get('total'), 'temporaries': memory.get('temporaries')}
  return facts | {key: full[key] for key in ('compile_s', 'jax', 'libtpu')}


def table(facts: Mapping[str, Any]) -> str:
  """The table of all recipes, in Markdown."""
  lines = [
    '| recipe | images, M | steps | batch | parameters, M | chips | GiB of a chip '
    '| least step, ms | hours | chip-hours | published FID |',
    '|---|---|---|---|---|---|---|---|---|---|---|',
  ]
  return '\n'.join([*lines, *(_row(name, facts.get(name)) for name in recipes())])


def _row(name: str, fact: Mapping[str, Any] | None) -> str:
  recipe, config = recipes()[name], config_of(name)
  cells = [
    f'`{name}`',
    f'{config.total_images / 1e6:,.0f}',
    f'{config.total_steps:,}',
    f'{config.batch_size:,}',
  ]
  if fact is None or fact['memory'] is None:
    cells += ['', recipe.topology, '', '', '', '']
  else:
    step_s = max(fact['least_step_s'], fact['least_memory_s'])
    hours = step_s * config.total_steps / 3600
    cells += [
      f'{fact["parameters"] / 1e6:,.1f}',
      recipe.topology,
      f'{fact["memory"] / GIB:.1f} of {fact["usable"] / GIB:.1f}',
      f'{step_s * 1e3:,.3g}',
      *(f'{x:,.0f}' if x >= 10 else f'{x:.2g}' for x in (hours, hours * fact['chips'])),
    ]
  return f'| {" | ".join([*cells, recipe.fid])} |'


def placed(text: str, content: str) -> str:
  """A text with a table between its two markers."""
  before, begin, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not begin or not end:
    raise SystemExit(f'{README}: needs the line {BEGIN.strip()} and its end')
  return f'{before}{begin}{content}\n{end}{after}'


def _compile_all(names: list[str]) -> list[str]:
  """Compiles each recipe, or takes the facts of one with the same step; failures."""
  failed = []
  for i, name in enumerate(names, 1):
    facts, start = read(), time.monotonic()
    same = [f for f in facts.values() if f['digest'] == digest(name)]
    try:
      fact = same[0] if same else compiled(name)
    except RuntimeError as error:
      failed.append(name)
      print(f'{i}/{len(names)} {name}: {error}', flush=True)
      continue
    write(read() | {name: fact})
    used = fact['memory'] or 0
    print(
      f'{i}/{len(names)} {name}: {time.monotonic() - start:.0f} s, '
      f'{"fits" if fact["fits"] else "DOES NOT FIT"} {used / GIB:.2f} GiB '
      f'{fact["refusal"]}',
      flush=True,
    )
  return failed


def main() -> int:
  """Compiles what has changed, and writes the table; returns 1 if a recipe failed."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('names', nargs='*', metavar='NAME')
  parser.add_argument('--write', action='store_true', help='the table into the README')
  parser.add_argument('--list', action='store_true', help='what is to be compiled')
  flags = parser.parse_args()
  unknown = set(flags.names) - recipes().keys()
  if unknown:
    parser.error(f'no recipe {min(unknown)}; they are in configs/papers.py')
  todo = [n for n in changed(read()) if not flags.names or n in flags.names]
  todo.sort(key=lambda name: flags.names.index(name) if flags.names else 0)
  if flags.list:
    print(*todo, sep='\n')
    return 0
  failed = _compile_all(todo)
  if flags.write:
    text = README.read_text(encoding='utf-8')
    README.write_text(placed(text, table(current(read()))), encoding='utf-8')
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
