"""Command line: flags -> one of the modes: train, sample, bench and so on."""

from collections.abc import Sequence
import json
import math
import os
from pathlib import Path
import platform
import re
import sys
from typing import Any

from absl import flags
import jax
import numpy as np

from cmjax import aot, bench, data, evaluate, logs, pretrained, sharding
from cmjax import config as configs
from cmjax import run as runs
from cmjax import train as training
from cmjax.core import UserError, first_line, unused

_CONFIG = configs.define_flag('config')
_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'Folder of the run: made, or gone on with.'
)
_MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'sample', 'evaluate', 'study', 'dry_run', 'compile', 'port', 'bench'],
  'What to do.',
)
_FROM = flags.DEFINE_string(
  'from', '', 'With --mode=port: a run, a checkpoint or a released file.'
)
_TO = flags.DEFINE_string(
  'to', '', 'With --mode=port: a folder, or a file that ends with .safetensors.'
)
_FORM = flags.DEFINE_string(
  'form', '', "With --mode=port: 'denoiser' or 'consistency', for OpenAI's files."
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'One process of several, as a TPU pod, GKE or Slurm starts them.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', '', 'HOST:PORT of process 0, where no cluster says it.'
)
_PROCESSES = flags.DEFINE_integer('processes', 0, 'With --coordinator: how many.')
_PROCESS = flags.DEFINE_integer('process', -1, 'With --coordinator: which, from 0.')
_CACHE = flags.DEFINE_string(
  'compilation_cache',
  str(Path.home() / '.cache' / 'cmjax' / platform.node()),
  'Folder of compiled programs, for a faster next start; empty: none.',
)

_TOPOLOGY = flags.DEFINE_string(
  'topology', '', 'With --mode=compile: the TPUs, such as v5e:16x16.'
)
_BLANK = flags.DEFINE_list(
  'blank', [], 'With --mode=compile: SIZE,CHANNELS,CLASSES instead of config.data.'
)
_EFFORT = flags.DEFINE_float(
  'effort', -1.0, "With --mode=compile: the compiler's, -1 to 1; 0 is a run's.", -1, 1
)

_OURS = (
  _CONFIG,
  _WORKDIR,
  _MODE,
  _FROM,
  _TO,
  _FORM,
  _DISTRIBUTED,
  _COORDINATOR,
  _PROCESSES,
  _PROCESS,
  _CACHE,
  _TOPOLOGY,
  _BLANK,
  _EFFORT,
)


def main() -> None:
  """The console script; a user's mistake is one line on stderr and exit code 2."""
  modes = {
    'train': _train,
    'sample': _sample,
    'evaluate': _evaluate,
    'study': _study,
    'dry_run': _dry_run,
    'compile': _compile,
    'port': _port,
    'bench': _bench,
  }
  try:
    _parse(sys.argv)
    _start()
    modes[_MODE.value]()
  except (UserError, FloatingPointError) as error:
    _fail(str(error))
  except OSError as error:
    _fail(f'{error.filename or _WORKDIR.value}: {error.strerror or error}')
  except jax.errors.JaxRuntimeError as error:
    _fail(f'{first_line(error)}; {_way_out(str(error))}', code=1)
  except KeyboardInterrupt:
    text = 'stopped; a training goes on from its last checkpoint by the same command'
    _fail(text, code=130)


def _start() -> None:
  """Joins the other processes, and finds what earlier ones compiled."""
  if _CACHE.present or not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', _CACHE.value or None)
  if _COORDINATOR.value or _DISTRIBUTED.value:
    sharding.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  elif _PROCESSES.value or _PROCESS.value >= 0:
    raise UserError('--processes and --process go with --coordinator=HOST:PORT')


def _way_out(error: str) -> str:
  if 'RESOURCE_EXHAUSTED' in error:
    return (
      'raise config.accumulate, set config.network.remat=True, or split the state: '
      'config.mesh.fsdp=True'
    )
  if jax.process_count() > 1:
    return 'another process or a device is gone; the same command goes on'
  return 'a device failed'


def _fail(text: str, code: int = 2) -> None:
  many = flags.FLAGS.is_parsed() and jax.process_count() > 1
  process = f'process {jax.process_index()}: ' if many else ''
  sys.stdout.flush()
  print(f'cmjax: {process}{text}', file=sys.stderr, flush=True)
  os._exit(code)  # the usual way out waits for processes and disks that may be gone


def _help() -> int:
  print('cmjax --config=FILE --workdir=DIR [--mode=MODE] [--config.KEY=VALUE ...]')
  for flag in (flags.FLAGS[holder.name] for holder in _OURS):
    print(f'  --{flag.name}: {flag.help}')
  return 0


def _parse(argv: Sequence[str]) -> None:
  sys.path.append(os.getcwd())  # a config may name functions of the user's own
  for flag, value in zip(argv, [*argv[1:], '']):
    name, _, attached = flag.lstrip('-').partition('=')
    if name == 'config':
      path = (attached if '=' in flag else value).partition(':')[0]
      if not Path(path).is_file():
        raise UserError(f'--config: no file {path!r}; see configs/ for those that ship')
      configs.allow_imports_beside(path)
    elif flag in ('--help', '-h'):
      raise SystemExit(_help())
  try:
    rest = flags.FLAGS(list(argv))[1:]
  except Exception as error:  # a config is code, and may raise anything
    raise UserError(f'{_one_line(error)}; cmjax --help lists the flags') from error
  if rest:
    raise UserError(
      f'unexpected {rest[0]!r}; flags look like --config=FILE --workdir=DIR'
    )


def _one_line(error: Exception) -> str:
  text = error.args[0] if isinstance(error, KeyError) else str(error)
  if 'Traceback' in str(text):  # what a config raised is in its last line
    text = str(text).strip().splitlines()[-1]
  text = ' '.join(str(text).split())[:400] or type(error).__name__
  unknown_key = isinstance(error, (KeyError, AttributeError)) and text[0] in '"\''
  return f'--config: unknown key {text}' if unknown_key else text


def _config() -> configs.ConfigDict:
  if _CONFIG.value is None:
    raise UserError('give --config=FILE, such as configs/ect.py:digits')
  return configs.checked(_CONFIG.value)


def _workdir() -> Path:
  if not _WORKDIR.value:
    raise UserError('give --workdir=DIR, the folder of the run')
  path = Path(_WORKDIR.value)
  for part in (path, *path.parents):
    if part.exists() and not part.is_dir():
      raise UserError(f'--workdir: {part} is a file, not a folder')
  return path


def _train() -> None:
  config, workdir = _config(), _workdir()
  configs.require(config)
  training.check_claim(workdir, config)
  run = runs.prepare(config)
  hooks = {'picture': evaluate.log_pictures}
  if config.every.evaluate_steps:
    hooks['evaluate'] = evaluate.table_logger(evaluate.build_metrics(run))
  state = training.train(run, workdir, hooks)
  if int(state.step) == run.total_steps:
    logs.say(f'done: {workdir}')


def _reopened() -> runs.Opened:
  return runs.reopen(_workdir(), None if _CONFIG.value is None else _config())


def _sample() -> None:
  opened = _reopened()
  folder = unused(_workdir() / 'samples' / f'step_{opened.step:08d}')
  wanted = opened.config.evaluation
  real = data.as_x0(opened.source, opened.source.examples[: wanted.pictured])
  panels = {opened.source.name: evaluate.picture(opened.source, real)}
  for name, sampler in opened.samplers.items():
    drawn = evaluate.draw(
      opened, opened.params, sampler, samples=wanted.pictured, seed=wanted.seed
    )
    image = evaluate.picture(opened.source, drawn.x)
    panels[f'{name}, evaluations of the network a sample: {drawn.evaluations}'] = image
    logs.write_png(folder / f'{name}.png', image)
    arrays = {'images': drawn.x, 'evaluations': drawn.evaluations}
    if drawn.labels is not None:
      arrays['labels'] = drawn.labels
    np.savez(folder / f'{name}.npz', **arrays)
  logs.write_png(folder / 'all.png', logs.sheet(panels))
  logs.say(f'{folder / "all.png"}; each sampler has a .png and a .npz beside it')


def _evaluate() -> None:
  opened = _reopened()
  rows = evaluate.table(opened, opened.params, evaluate.build_metrics(opened))
  text = (
    f'{opened.source.name}, step {opened.step:,}, '
    f'weights {opened.config.sample_weights}, '
    f'seed {opened.config.evaluation.seed}\n\n{logs.markdown_table(rows)}\n'
  )
  path = unused(_workdir() / f'evaluation_{opened.step:08d}', '.json')
  _write_facts(path, opened, rows=rows)
  path.with_suffix('.md').write_text(text, encoding='utf-8')
  logs.say(f'{text}\n{path} and .md')


def _study() -> None:
  opened = _reopened()
  if not opened.config.studies:
    raise UserError('config.studies is empty; configs/parts.py:studies() has some')
  folder = unused(_workdir() / 'studies' / f'step_{opened.step:08d}')
  subject = runs.subject_of(opened)
  pages, found = [f'# {opened.source.name}, step {opened.step:,}'], {}
  for name in opened.config.studies:
    logs.say(f'{name} ...')
    part = opened.config.studies[name]
    study = configs.build(part, f'config.studies.{name}', subject=subject)
    logs.write_png(folder / f'{name}.png', logs.curves(study.rows, study.x, study.ys))
    rows = [{k: f'{v:.3g}' for k, v in row.items()} for row in study.rows]
    pages.append(f'## {study.title}\n\n{logs.markdown_table(rows)}\n\n![]({name}.png)')
    found[name] = study.rows
  text = '\n\n'.join(pages) + '\n'
  (folder / 'study.md').write_text(text, encoding='utf-8')
  _write_facts(folder / 'study.json', opened, studies=found)
  logs.say(f'{text}\n{folder}/study.md, study.json and a picture a table')


def _write_facts(path: Path, opened: runs.Opened, **found: Any) -> None:
  """What was found, and of what: data, step and the whole config, as JSON."""
  facts = {'data': opened.source.name, 'step': opened.step} | found
  facts['config'] = opened.config.to_dict()
  path.write_text(json.dumps(_finite(facts), indent=2), encoding='utf-8')


def _finite(value: Any) -> Any:
  """The same with null for every number that JSON does not have."""
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _port() -> None:
  if not _FROM.value or not _TO.value:
    raise UserError('--mode=port needs --from=PATH and --to=FOLDER or FILE.safetensors')
  known = pretrained.convert(_FROM.value, _TO.value, form=_FORM.value, say=logs.say)
  classes = f'{known.classes} classes' if known.classes else 'no classes'
  logs.say(
    f'{_TO.value}: a {known.config.precond.fn} of {known.config.network.fn} on '
    f'{known.shape} with {classes}, from {_FROM.value} ({known.origin})'
  )


def _bench() -> None:
  config = _config()
  if config.init_from:
    with config.unlocked():
      config.init_from = ''  # weights take the same time whatever they are
  found = bench.measure(runs.prepare(config))
  logs.say(bench.report(found))
  if _WORKDIR.value:
    path = unused(_workdir() / 'bench', '.json')
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = found | {'config': config.to_dict()}
    path.write_text(json.dumps(_finite(facts), indent=2), encoding='utf-8')
    logs.say(f'\n{path}')


def _compile() -> None:
  """Exits with 1 where the step does not fit, so that a script can tell."""
  aot.stay_on_cpu()
  config, topology = _config(), _TOPOLOGY.value
  if not topology:
    raise UserError('--mode=compile needs --topology=CHIPS, such as v5e:16x16')
  folder = _workdir() if _WORKDIR.value else None
  if _BLANK.value:
    if len(_BLANK.value) != 3 or not all(n.isdecimal() for n in _BLANK.value):
      raise UserError('--blank: must be SIZE,CHANNELS,CLASSES, such as 64,3,1000')
    size, channels, classes = map(int, _BLANK.value)
    blank = {'size': size, 'channels': channels, 'classes': classes}
    with config.unlocked():
      config.data = {'fn': 'cmjax.data:blank'} | blank
  devices = aot.devices(topology)
  mesh = configs.build(config.mesh, 'config.mesh', devices=devices)
  run = runs.prepare(config, mesh)
  known = aot.facts(run, topology, _EFFORT.value, aot.compile_step(run, _EFFORT.value))
  text = aot.page(known)
  logs.say(text)
  if folder:
    path = unused(folder / f'compile_{re.sub(r"[:*]", "_", topology)}', '.json')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=2), encoding='utf-8')
    path.with_suffix('.md').write_text(text + '\n', encoding='utf-8')
    logs.say(f'\n{path} and .md')
  if not known['fits']:
    sys.exit(1)


def _dry_run() -> None:
  config = _config()
  run = runs.prepare(config)
  last = run.total_steps
  points = [0, last // 4, last // 2, 3 * last // 4, max(last - 1, 0)]
  rows = [
    {'schedule': name} | {f'step {step}': f'{float(at(step)):.4g}' for step in points}
    for name, at in run.schedules.items()
  ]
  logs.say(configs.to_json(config))
  logs.say(logs.parameter_table(run.abstract_params()))
  logs.say(logs.markdown_table(rows) if rows else 'no schedules')
  logs.say(
    f'\n{run.source.name}: {len(run.source.examples):,} examples of '
    f'{run.source.shape}; {last:,} steps of {config.batch_size} on {run.mesh.size} '
    f'{jax.devices()[0].platform} device(s)'
  )


if __name__ == '__main__':
  main()
