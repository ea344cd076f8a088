"""Trains one row a recipe, with several seeds, on one data set, and writes one table.

Usage: python launch/compare.py --data=digits --table=objectives --out=runs/compare

Students start from the same diffusion teacher and get the same steps; those that start
from nothing get the teacher's steps too. A run that is there is gone on with or used.
"""

import argparse
from concurrent import futures
import json
import math
from pathlib import Path
import re
import statistics
import subprocess
import sys
from typing import NamedTuple

from cmjax import oracles, run, studies

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3000  # of a student, as of its teacher
# On digits half as wide as in the configs: a table in half an hour on two cores.
COMMON = {
  'toy2d': [],
  'digits': ['--config.network.width=192'],
}
QUIET = ['--config.every.picture_steps=0', '--config.every.checkpoint_steps=100000']


class Row(NamedTuple):
  """A recipe: a config, where it starts, and what differs from the config."""

  config: str
  start: str = ''  # the row whose weights it starts from
  distils: bool = False  # and whether that is also its teacher
  options: tuple[str, ...] = ()


def tuned(config: str, steps: int, *options: str) -> Row:
  """ECT or Stable Consistency Tuning for that many steps on digits."""
  images = steps * 128
  length = (
    f'--config.total_images={images}',
    f'--config.objective.gap.stage_images={images // 8}',
  )
  return Row(config, 'edm', options=(*length, *options))


STARTS = {
  'untrained': Row('edm', options=('--config.total_images=8', '--config.batch_size=8')),
  'edm': Row('edm'),
  'trigflow': Row('trigflow'),
}
OBJECTIVES = {
  'ect': Row('ect', 'edm'),
  'stable_ct': Row('stable_ct', 'edm'),
  'ict': Row('ict'),
  'ct': Row('ct'),
  'cd': Row('cd', 'edm', True),
  'pd': Row('pd', 'edm'),
  'theorem3': Row('theorem3', 'edm', True),
  'theorem4': Row('theorem4', 'edm', True),
  'continuous_cd': Row('continuous_cd', 'edm', True),
  'continuous_ct': Row('continuous_ct', 'edm'),
  'sct': Row('sct', 'trigflow'),
  'scd': Row('scd', 'trigflow', True),
  'meanflow': Row('meanflow'),
  'shortcut': Row('shortcut'),
}
# Two targets, what metric they want, and what the unsquared norm asks of the optimiser.
CONSTANT_RATE = (
  '--config.optimizer.learning_rate.fn=cmjax.schedules:warmup',
  '--config.optimizer.learning_rate.peak=2e-4',
)
METRICS = {name: tuned(name, STEPS) for name in ('ect', 'stable_ct')}
METRICS |= {
  f'{name} c={c}': tuned(name, STEPS, f'--config.objective.distance.c={c}')
  for c in (0.3, 3.0)
  for name in ('ect', 'stable_ct')
}
METRICS |= {
  f'{name} constant rate': tuned(name, STEPS, *CONSTANT_RATE)
  for name in ('ect', 'stable_ct')
}
METRICS['stable_ct threshold=0'] = tuned(
  'stable_ct', STEPS, '--config.objective.threshold=0.0'
)
TABLES = {'objectives': OBJECTIVES, 'metrics': METRICS}


def rows_of(table: str, data: str) -> dict[str, Row]:
  """The rows of a table, in its order, after those they start from."""
  rows = TABLES[table]
  if table == 'objectives' and data == 'digits':  # where ECT's config is longer
    rows = rows | {name: METRICS[name] for name in ('ect', 'stable_ct')}
  return STARTS | rows


def cmjax(*arguments: str, log: Path) -> None:
  """Runs the command line; stops with the end of what it said if it fails."""
  command = [sys.executable, '-m', 'cmjax.main', *arguments]
  with log.open('a', encoding='utf-8') as file:
    code = subprocess.run(
      command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
    ).returncode
  if code:
    tail = log.read_text(encoding='utf-8').splitlines()[-5:]
    raise SystemExit(f'{" ".join(arguments)} failed:\n' + '\n'.join(tail))


def make(place: Path, data: str, name: str, row: Row, seed: int) -> Path:
  """The work directory of one trained and evaluated run."""
  home = place / f'{"_".join(re.findall("[a-z0-9_.=]+", name))}_{seed}'
  home.mkdir(parents=True, exist_ok=True)
  options = [f'--config={row.config}:{data}', f'--config.seed={seed}']
  options += [*QUIET, *COMMON[data], *row.options]
  if row.start:
    key = 'teacher' if row.distils else 'init_from'
    options.append(f'--config.{key}={place / f"{row.start}_{seed}"}')
  if not list(home.glob('evaluation_*.json')):
    cmjax(*options, f'--workdir={home}', log=home / 'log.txt')
    cmjax(f'--workdir={home}', '--mode=evaluate', log=home / 'log.txt')
  print(f'{data}: {name}, seed {seed}, is there', flush=True)
  return home


def measured(home: Path, data: str) -> dict[str, float]:
  """Distances by sampler, steps a second, and in the plane the error of the map.

  The error is the root mean square at t = 80, and over 14 levels from 0.01 to 80.
  """
  evaluation = json.loads(max(home.glob('evaluation_*.json')).read_text('utf-8'))
  found = {}
  for row in evaluation['rows']:
    for key in ('pixel_frechet', 'label_agreement'):
      if key in row:
        found[f'{row["sampler"]} {key}'] = row[key]
  if data == 'toy2d':
    subject = run.subject_of(run.reopen(home))
    rows = studies.map_error(subject, oracle=oracles.ring()).rows
    errors = [row['rms_error'] for row in rows]
    found['map error at 80'] = errors[-1]
    found['map error'] = math.sqrt(statistics.mean(e**2 for e in errors))
  lines = (home / 'metrics.jsonl').read_text('utf-8').splitlines()
  rates = [json.loads(line).get('images_per_s') for line in lines]
  rate = statistics.median(r for r in rates if r) if any(rates) else math.nan
  found['steps/s'] = rate / evaluation['config']['batch_size']
  return found


def markdown(rows: dict[str, list[dict[str, float]]]) -> str:
  """Mean and standard deviation over seeds."""
  columns = list(dict.fromkeys(key for runs in rows.values() for key in runs[0]))
  columns.append(columns.pop(columns.index('steps/s')))

  def cell(key, values):
    if not values:
      return ''
    mean = statistics.mean(values)
    if key == 'steps/s' or len(values) == 1:
      return f'{mean:.3g}'
    return f'{mean:.3f} ± {statistics.stdev(values):.3f}'

  lines = [['', *columns], ['---'] * (len(columns) + 1)]
  for name, runs in rows.items():
    values = ([run[key] for run in runs if key in run] for key in columns)
    lines.append([name, *map(cell, columns, values)])
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def main() -> None:
  """Runs what is missing, then prints and writes the table."""
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--data', default='toy2d', choices=list(COMMON))
  flags.add_argument('--table', default='objectives', choices=list(TABLES))
  flags.add_argument('--out', default='runs/compare', type=Path)
  flags.add_argument('--seeds', default=3, type=int)
  flags.add_argument('--jobs', default=1, type=int, help='runs at the same time')
  given = flags.parse_args()
  place = given.out.resolve() / given.data
  rows, homes = rows_of(given.table, given.data), {}
  with futures.ThreadPoolExecutor(given.jobs) as pool:
    for starts in (True, False):
      jobs = [
        (name, seed)
        for seed in range(given.seeds)
        for name in rows
        if (name in STARTS) == starts
      ]
      made = pool.map(
        lambda job: make(place, given.data, job[0], rows[job[0]], job[1]), jobs
      )
      homes |= dict(zip(jobs, made))
  results = {
    name: [measured(homes[name, seed], given.data) for seed in range(given.seeds)]
    for name in rows
  }
  text = markdown(results)
  path = place / f'{given.table}.md'
  path.write_text(text + '\n', encoding='utf-8')
  path.with_suffix('.json').write_text(json.dumps(results, indent=2), encoding='utf-8')
  print(f'{text}\n\n{path} and .json')


if __name__ == '__main__':
  main()
