"""Compares recipes on one data set: trains each with several seeds, writes one table.

Usage: python launch/compare.py --data=digits --table=objectives --out=runs/compare

All students start from the EDM or TrigFlow model of their seed and train for the same
number of steps; recipes that start from random weights train for its steps too. A run
in --out that is incomplete is resumed; one that is complete is not repeated.
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

from cmjax import oracles
from cmjax.runtime.reopen import reopen, subject_of
from cmjax.studies.map_error import map_error

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3000  # of a student, and of its teacher
# Half the width of the configs on digits: a table takes half an hour on two cores.
COMMON = {
  'toy2d': [],
  'digits': ['--config.network.width=192'],
}
QUIET = ['--config.every.picture_steps=0', '--config.every.checkpoint_steps=100000']


class Row(NamedTuple):
  """A recipe: a config, the weights it starts from, and options."""

  config: str
  start: str = ''  # the row whose weights it starts from; empty: random weights
  distils: bool = False  # whether `start` is its teacher
  options: tuple[str, ...] = ()  # of the command line


def tuned(config: str, steps: int, *options: str) -> Row:
  """ECT or Stable Consistency Tuning on digits, for a number of steps."""
  images = steps * 128
  length = (
    f'--config.total_images={images}',
    f'--config.objective.relative_gap.stage_images={images // 8}',
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
# ECT and Stable Consistency Tuning with other distances and learning rates.
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
  f'{name} constant learning rate': tuned(name, STEPS, *CONSTANT_RATE)
  for name in ('ect', 'stable_ct')
}
METRICS['stable_ct sigma_threshold=0'] = tuned(
  'stable_ct', STEPS, '--config.objective.sigma_threshold=0.0'
)
TABLES = {'objectives': OBJECTIVES, 'metrics': METRICS}


def rows_of(table: str, data: str) -> dict[str, Row]:
  """The rows of a table in order, after the rows that they start from."""
  rows = TABLES[table]
  if table == 'objectives' and data == 'digits':  # their configs train for longer
    rows = rows | {name: METRICS[name] for name in ('ect', 'stable_ct')}
  return STARTS | rows


def cmjax(*arguments: str, log: Path) -> None:
  """Runs the command line; if it fails, exits with the end of its output."""
  command = [sys.executable, '-m', 'cmjax.main', *arguments]
  with log.open('a', encoding='utf-8') as file:
    code = subprocess.run(
      command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
    ).returncode
  if code:
    tail = log.read_text(encoding='utf-8').splitlines()[-5:]
    raise SystemExit(f'{" ".join(arguments)} failed:\n' + '\n'.join(tail))


def train_and_evaluate(folder: Path, data: str, name: str, row: Row, seed: int) -> Path:
  """The work directory of a row with a seed, which is trained and evaluated in it."""
  workdir = folder / f'{"_".join(re.findall("[a-z0-9_.=]+", name))}_{seed}'
  workdir.mkdir(parents=True, exist_ok=True)
  options = [f'--config={row.config}:{data}', f'--config.seed={seed}']
  options += [*QUIET, *COMMON[data], *row.options]
  if row.start:
    key = 'teacher' if row.distils else 'init_from'
    options.append(f'--config.{key}={folder / f"{row.start}_{seed}"}')
  if not list(workdir.glob('evaluation_*.json')):
    log = workdir / 'log.txt'
    cmjax(*options, f'--workdir={workdir}', log=log)
    cmjax(f'--workdir={workdir}', '--mode=evaluate', log=log)
  print(f'{data}: {name}, seed {seed}: done', flush=True)
  return workdir


def results_of(workdir: Path, data: str) -> dict[str, float]:
  """Metrics by sampler, training speed, and on toy2d the error of the map.

  The error is the root mean square of f minus the exact consistency map: at sigma = 80,
  and over 14 noise levels from 0.01 to 80.
  """
  evaluation = json.loads(max(workdir.glob('evaluation_*.json')).read_text('utf-8'))
  results = {}
  for row in evaluation['rows']:
    for key in ('pixel_frechet', 'label_agreement'):
      if key in row:
        results[f'{row["sampler"]} {key}'] = row[key]
  if data == 'toy2d':
    subject = subject_of(reopen(workdir))
    rows = map_error(subject, oracle=oracles.ring()).rows
    errors = [row['rms_error'] for row in rows]
    results['map error at 80'] = errors[-1]
    results['map error'] = math.sqrt(statistics.mean(e**2 for e in errors))
  lines = (workdir / 'metrics.jsonl').read_text('utf-8').splitlines()
  speeds = [json.loads(line).get('images_per_s') for line in lines]
  speeds = [speed for speed in speeds if speed]
  median = statistics.median(speeds) if speeds else math.nan
  results['steps/s'] = median / evaluation['config']['batch_size']
  return results


def markdown(rows: dict[str, list[dict[str, float]]]) -> str:
  """A table of means and standard deviations over seeds, one line per row."""
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
  """Trains and evaluates the runs that are missing, and writes the table."""
  parser = argparse.ArgumentParser(description='Compares recipes on one data set.')
  parser.add_argument('--data', default='toy2d', choices=list(COMMON))
  parser.add_argument('--table', default='objectives', choices=list(TABLES))
  parser.add_argument('--out', default='runs/compare', type=Path)
  parser.add_argument('--seeds', default=3, type=int, help='number of seeds')
  parser.add_argument('--jobs', default=1, type=int, help='number of runs in parallel')
  flags = parser.parse_args()
  folder = flags.out.resolve() / flags.data
  rows, workdirs = rows_of(flags.table, flags.data), {}
  with futures.ThreadPoolExecutor(flags.jobs) as pool:
    for starts in (True, False):  # the others start from the weights of these
      jobs = [
        (name, seed)
        for seed in range(flags.seeds)
        for name in rows
        if (name in STARTS) == starts
      ]
      done = pool.map(
        lambda job: train_and_evaluate(
          folder, flags.data, job[0], rows[job[0]], job[1]
        ),
        jobs,
      )
      workdirs |= dict(zip(jobs, done))
  results = {
    name: [results_of(workdirs[name, seed], flags.data) for seed in range(flags.seeds)]
    for name in rows
  }
  text = markdown(results)
  path = folder / f'{flags.table}.md'
  path.write_text(text + '\n', encoding='utf-8')
  path.with_suffix('.json').write_text(json.dumps(results, indent=2), encoding='utf-8')
  print(f'{text}\n\n{path} and .json')


if __name__ == '__main__':
  main()
