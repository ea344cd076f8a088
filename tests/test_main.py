"""The command line: a run from first step to table, and mistakes in one line."""

import importlib.util
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

import cmjax
from cmjax import main, pictures
from cmjax.data.digits import digits
from cmjax.data.source import as_x0
from cmjax.metrics.pixels import pixel_frechet
from cmjax.runtime import errors, functions, pretrained
from tests.conftest import ROOT

SMALL = [
  '--config=configs/edm.py:digits',
  '--config.network.width=16',
  '--config.network.num_blocks=1',
  '--config.network.embedding=8',
  '--config.batch_size=8',
  '--config.total_images=24',
  '--config.evaluation.num_samples=32',
  '--config.evaluation.num_pictured=32',
  '--config.every.log_steps=1',
  '--config.every.picture_steps=0',
]
SAME_NETWORK = [option for option in SMALL if 'config.network' in option]
ECT = '--config=configs/ect.py:digits'
# Below, @ stands for where these runs lie.
NEW, TRAINED, EMPTY = '--workdir=@/NEW', '--workdir=@/TRAINED', '--workdir=@/EMPTY'

# What a user may get wrong, and what the one line must name.
MISTAKES = {
  'port from nowhere': (['--mode=port', '--to=@/PORTED'], r'port needs --from=PATH'),
  'port to what is there': (
    ['--mode=port', '--from=@/TRAINED', '--to=@/EMPTY'],
    r'EMPTY',
  ),
  'port of nothing': (
    ['--mode=port', '--from=@/none.pkl', '--to=@/PORTED'],
    r'none\.pkl: ',
  ),
  'port of a web page': (
    ['--mode=port', '--from=@/page.pkl', '--to=@/PORTED'],
    r'page\.pkl.* web page',
  ),
  'teacher is no checkpoint': (
    ['--config=configs/cd.py:digits', NEW, '--config.teacher=@/page.pkl'],
    r'page\.pkl.* web page',
  ),
  'start from no checkpoint': (
    [*SMALL, NEW, '--config.init_from=@/page.pkl'],
    r'page\.pkl.* web page',
  ),
  'slices that do not divide': (
    [*SMALL, NEW, '--config.mesh.num_slices=3'],
    r'config\.mesh: .*num_slices=3 .*8 devices',
  ),
  'parts that do not divide': (
    [*SMALL, NEW, '--config.accumulate=3'],
    r'config\.accumulate: 3 does not divide the batch size 8',
  ),
  'parts that leave devices without examples': (
    [*SMALL, NEW, '--config.accumulate=2'],
    r'config\.batch_size: 8 examples .* 8 devices in 2 parts; .* is 16',
  ),
  'a key without a value': ([*SMALL, '--config.seed', NEW], r'--config\.seed: .*value'),
  'a last key without a value': ([*SMALL, NEW, '--config.seed'], r'seed: .*value'),
  'no parts': ([*SMALL, NEW, '--config.accumulate=0'], r'accumulate: must be positive'),
  'bench without a teacher': (
    ['--config=configs/cd.py:digits', NEW, '--mode=bench'],
    r'config\.teacher: must be given',
  ),
  'distributed, and alone': (
    [*SMALL, NEW, '--distributed'],
    r'--distributed: .*--coordinator=HOST:PORT --processes=N --process=I',
  ),
  'one of several, of whom nobody knows': (
    [*SMALL, NEW, '--process=1'],
    r'--process go with --coordinator=HOST:PORT',
  ),
  'no config': ([NEW], r'give --config=NAME'),
  'no workdir': (SMALL, r'give --workdir=DIR'),
  'unknown flag': ([*SMALL, NEW, '--workdri=x'], r'--workdri, did you mean --workdir'),
  'unknown mode': ([*SMALL, NEW, '--mode=trian'], r"--mode: .*'trian' .*train.*sample"),
  'no number': ([*SMALL, NEW, '--process=x'], r"--process: invalid int value: 'x'"),
  'unexpected argument': ([*SMALL, NEW, 'train'], r"unexpected 'train'"),
  'unknown key': ([*SMALL, NEW, '--config.batchsize=8'], r'batchsize.*batch_size'),
  'unknown key of a part': ([*SMALL, NEW, '--config.network.widht=8'], r'widht.*width'),
  'wrong type': ([*SMALL, NEW, '--config.seed=many'], r"--config\.seed=many: .*'many'"),
  'float for an int': ([*SMALL, NEW, '--config.batch_size=1e3'], r'batch_size=1e3: '),
  'key of an optimiser': (
    [*SMALL, NEW, '--config.optimizer.lr=5'],
    r'optimizer\.lr: optax:adam has no such key, did you mean learning_rate\?',
  ),
  'key without its end': (
    [*SMALL, NEW, '--config.total_image=8'],
    r'mean total_images\?',
  ),
  'a rate that is no number': (
    [*SMALL, NEW, '--config.optimizer.learning_rate.peak=nan'],
    r'config\.optimizer\.learning_rate\.peak: must be finite',
  ),
  'a rate below zero': (
    [*SMALL, NEW, '--config.optimizer.learning_rate.peak=-1'],
    r'config\.optimizer\.learning_rate: peak must be finite and at least 0',
  ),
  'a share of Adam beyond one': (
    [*SMALL, NEW, '--config.optimizer.b2=1.5'],
    r'config\.optimizer\.b2: must be in \[0, 1\), got 1\.5',
  ),
  'an average that never follows': (
    [*SMALL, NEW, '--config.ema.slow.value=1.5'],
    r'config\.ema\.slow: must be in \[0, 1\), and is 1\.5 at step 0',
  ),
  'no noise at all': (
    [*SMALL, NEW, '--config.precond.sigma_data=0'],
    r'config\.precond: .*sigma_data',
  ),
  'a grid upside down': (
    [*SMALL, NEW, '--config.samplers.heun.sigma_min=100'],
    r'config\.samplers\.heun: .*sigma_min',
  ),
  'nothing to start from, in a dry run': (
    [ECT, '--mode=dry_run', '--config.init_from=@/nowhere'],
    r'config\.init_from: .*nowhere: ',
  ),
  'a batch larger than the data': (
    [*SMALL, NEW, '--config.batch_size=4096', '--config.total_images=40960'],
    r'config\.batch_size: .*4,?096.*1,?797',
  ),
  'one sample': ([*SMALL, NEW, '--config.evaluation.num_samples=1'], r'between 2 and'),
  'more than any machine holds': (
    [*SMALL, NEW, '--config.network.width=65536', '--config.network.num_blocks=20'],
    r'config\.network: parameters, averages .* GiB',
  ),
  'an integer of a hundred digits': (
    [*SMALL, NEW, f'--config.network.width={10**100}'],
    r'config\.network\.width: must not exceed 2\*\*53',
  ),
  'a bucket': ([*SMALL, '--workdir=s3://bucket/run'], r's3://bucket/run'),
  'a network that is a string': (
    [*SMALL, NEW, '--config.network.fn=tests.test_main:text_network'],
    r'config\.network\.fn: .*text_network returned a value of type str',
  ),
  'a sampler that is a string': (
    [*SMALL, NEW, '--config.samplers.mine.fn=tests.test_main:text_sampler'],
    r'config\.samplers\.mine: must return Samples, not a value of type str',
  ),
  'not positive': ([*SMALL, NEW, '--config.keep_checkpoints=0'], r'keep_checkpoints: '),
  'no such function': (
    [*SMALL, NEW, '--config.objective.fn=cmjax.objectives.denoise:emd'],
    r"config\.objective\.fn: cannot import 'cmjax\.objectives\.denoise:emd'",
  ),
  'what must be given is not': ([ECT, NEW], r'config\.init_from: must be given'),
  'batch over devices': (
    [*SMALL, NEW, '--config.batch_size=12'],
    r'config\.batch_size: 12 .* 8 devices.*16',
  ),
  'no such weights': (
    [*SMALL, NEW, '--config.sample_weights=fast'],
    r"config\.sample_weights: no weights 'fast'; .*online, slow",
  ),
  'refused by a part': (
    [*SMALL, NEW, '--config.samplers.heun.solver=rk'],
    r"config\.samplers\.heun: .*solver.*'rk'",
  ),
  'workdir of another run': (
    [*SMALL, TRAINED, '--config.seed=3'],
    r'TRAINED holds a run with another config \(config\.seed: 0 -> 3\)',
  ),
  'sample from nothing': (['--mode=sample', EMPTY], r'EMPTY: '),
  'evaluate nothing': (['--mode=evaluate', EMPTY], r'EMPTY: '),
  'sample without workdir': (['--mode=sample'], r'give --workdir=DIR'),
  'sample another network': (
    [*SMALL, '--config.network.width=32', '--mode=sample', TRAINED],
    r'another network: parameter .*\(32,\).*\(64,\)',
  ),
  'no such file': (
    ['--config=configs/none.py', NEW],
    r"--config: no file 'configs/none\.py'",
  ),
  'a folder for a file': (['--config=configs', NEW], r"--config: no config 'configs'"),
  'no file': (['--config=', NEW], r'give --config=NAME'),
  'unknown part': ([*SMALL, NEW, '--config.nonesuch.x=8'], r'nonesuch: unknown key'),
  'workdir is a file': (
    [*SMALL, '--workdir=@/TRAINED/config.json'],
    r'--workdir: .*config\.json is a file',
  ),
  'workdir inside a file': (
    [*SMALL, '--workdir=@/TRAINED/config.json/x'],
    r'--workdir: .*config\.json is a file',
  ),
  'nothing to start from': (
    [ECT, NEW, '--config.init_from=@/EMPTY'],
    r'EMPTY: ',
  ),
  'start from another network': (
    [ECT, NEW, '--config.init_from=@/TRAINED'],
    r'TRAINED.*another network: parameter .*\(32,\)',
  ),
  'not a function': (
    [*SMALL, NEW, '--config.objective.fn=os:sep'],
    r"config\.objective\.fn: cannot import 'os:sep'",
  ),
  'relative import': (
    [*SMALL, NEW, '--config.objective.fn=.times:karras'],
    r"config\.objective\.fn: cannot import '\.times:karras'",
  ),
  'seed beyond 32 bits': (
    [*SMALL, NEW, f'--config.seed={2**32}'],
    r'config\.seed: must be between 0 and 4,294,967,295',
  ),
  'never told as a negative': (
    [*SMALL, NEW, '--config.every.picture_steps=-1'],
    r'config\.every\.picture_steps: must not be negative, got -1',
  ),
  'distillation without a teacher': (
    ['--config=configs/cd.py:digits', NEW],
    r'^cmjax: config\.teacher: must be given',
  ),
  'no such data': (
    ['--config=configs/ict.py:imagenet', NEW],
    r"no data 'imagenet'; .*toy2d, digits, cifar10",
  ),
  'r not below t': (
    [ECT, NEW, '--config.init_from=@/TRAINED', '--config.objective.k=-20'],
    r'config\.objective: .*0 <= r < t',
  ),
  'r that would round to t': (
    [ECT, NEW, '--config.init_from=@/TRAINED', '--config.objective.relative_gap.q=200'],
    r'config\.objective\.relative_gap: .*200',
  ),
  'a metric without curvature in Theorem 3': (
    [
      '--config=configs/theorem3.py:digits',
      NEW,
      *SAME_NETWORK,
      '--config.teacher=@/TRAINED',
      '--config.objective.distance.fn=cmjax.distances:l1',
    ],
    r'config\.objective: Theorem 3 ',
  ),
  'a weighting without a limit': (
    [
      '--config=configs/continuous_ct.py:digits',
      NEW,
      '--config.init_from=@/TRAINED',
      '--config.objective.weighting.fn=cmjax.weightings:inverse_gap',
    ],
    r'config\.objective: .*weighting .*r = t',
  ),
  'another form of model': (
    [
      '--config=configs/sct.py:digits',
      NEW,
      *SAME_NETWORK,
      '--config.init_from=@/TRAINED',
    ],
    r'TRAINED .*cmjax\.precond:edm',
  ),
  'sCM of an EDM model': (
    [
      '--config=configs/sct.py:digits',
      NEW,
      '--config.init_from=@/TRAINED',
      '--config.precond.fn=cmjax.precond:edm',
    ],
    r'config\.objective: .*trigflow',
  ),
  'MeanFlow of one time': (
    ['--config=configs/meanflow.py:digits', NEW, '--config.network.num_times=1'],
    r'config\.precond: .*num_times=2',
  ),
  'guidance of a teacher that always had labels': (
    [
      '--config=configs/cd.py:digits',
      NEW,
      *SAME_NETWORK,
      '--config.teacher=@/TRAINED',
      '--config.objective.guidance=2.0',
    ],
    r'config\.objective\.guidance: .*TRAINED .*config\.objective\.label_dropout',
  ),
  'guidance without dropped labels': (
    ['--config=configs/meanflow.py:digits', NEW, '--config.objective.guidance=2.0'],
    r'guidance=2\.0 .*label_dropout',
  ),
  'edges that do not ascend': (
    [
      '--config=configs/stable_ct.py:digits',
      NEW,
      '--config.init_from=@/TRAINED',
      '--config.objective.edges=(2.0,1.0)',
    ],
    r'config\.objective: edges must be positive',
  ),
  'more stages than steps': (
    ['--config=configs/ict.py:digits', NEW, '--config.total_images=300'],
    r'config\.objective\.num_scales: .*5 stages .*2 steps',
  ),
  'no such dtype': (
    [*SMALL, NEW, '--config.network.dtype=float31'],
    r'network.*float31',
  ),
  'odd embedding': ([*SMALL, NEW, '--config.network.embedding=7'], r'config\.network'),
  'compile for nothing': ([*SMALL, '--mode=compile'], r'needs --topology=CHIPS'),
  'compile without a config': (
    ['--mode=compile', '--topology=v5e:2x2'],
    r'give --config=NAME',
  ),
  'compile for an unknown chip': (
    [*SMALL, '--mode=compile', '--topology=v9:2x2'],
    r'--topology=v9:2x2: .*v4, v5e, v5p, v6e',
  ),
  'compile blanks of no size': (
    [*SMALL, '--mode=compile', '--topology=v5e:2x2', '--blank=8,1'],
    r'--blank: must be SIZE,CHANNELS,CLASSES',
  ),
  'no data set': (
    [
      *SMALL,
      NEW,
      '--config.data.fn=cmjax.data.tfds:tfds',
      '--config.data.conditional=False',
    ],
    r'^cmjax: config\.data\.name: missing',
  ),
}


def text_network(
  width, num_blocks, embedding, dropout, noise_scale, num_times, log_weight, dtype
):
  """A user's network that is none."""
  return 'a string'


def text_sampler():
  """A user's sampler whose samples are none."""
  return lambda f, params, keys, cond, shape: 'a string'


def failing_loss(f, times, sigma_data, label_dropout):
  """A user's objective with a mistake in it."""

  def loss(nets, batch, step, keys):
    return batch.no_such_field

  return loss


def failing_builder(f, times, sigma_data, label_dropout):
  """A user's objective that cannot be built."""
  raise TypeError('my own mistake')


# What fails in functions of the user's: their traceback, from their own line on.
THEIRS = {
  'in a loss': (
    [*SMALL, NEW, '--config.objective.fn=tests.test_main:failing_loss'],
    'return batch.no_such_field',
  ),
  'in a builder': (
    [*SMALL, NEW, '--config.objective.fn=tests.test_main:failing_builder'],
    "raise TypeError('my own mistake')",
  ),
}
# What goes well; the first two each in a copy of the trained run.
COMMANDS = {
  'study': [
    '--config=@/small_studies.py',
    *SMALL[1:],
    '--mode=study',
    '--workdir=@/STUDIED',
    '--config.studies.tangents.num_sigmas=2',
    '--config.studies.tangents.num_samples=8',
    '--config.studies.normalised_bias.num_sigmas=2',
    '--config.studies.gradient_noise.num_batches=2',
    '--config.studies.jvp_precision.num_samples=4',
    '--config.studies.discrete_limit.num_samples=4',
    '--config.studies.likelihood.num_samples=4',
  ],
  'sample': ['--mode=sample', '--workdir=@/SAMPLED'],
  'list configs': ['--mode=configs'],
  'key before config': ['--config.seed=1', *SMALL, '--mode=dry_run'],
  'go on': ['--workdir=@/GONE_ON'],
  'evaluate others': [
    '--mode=evaluate',
    '--workdir=@/GONE_ON',
    '--config.sample_weights=online',
  ],
  'dry run of a run': ['--mode=dry_run', '--config=@/TRAINED/config.json'],
  'evaluate': ['--mode=evaluate', '--workdir=@/EVALUATED'],
  'weights out': ['--mode=port', '--from=@/TRAINED', '--to=@/PORTED/w.safetensors'],
  'and in': ['--mode=port', '--from=@/PORTED/w.safetensors', '--to=@/PORTED/back'],
  'sample of them': ['--mode=sample', '--workdir=@/PORTED/back'],
  'sample a file': [
    '--mode=sample',
    '--workdir=@/PORTED/w.safetensors',
    '--labels=3,7',
    '--config.evaluation.num_pictured=6',
  ],
  'train there': [*SMALL, '--workdir=@/PORTED/back'],
  'teach with them': [
    '--config=configs/cd.py:digits',
    *SMALL[1:],
    '--config.total_images=8',
    '--config.teacher=@/PORTED/w.safetensors',
    '--config.init_from=@/PORTED/w.safetensors',
    '--workdir=@/PORTED/taught',
  ],
  'bench': [*SMALL, '--mode=bench', '--workdir=@/BENCH'],
  'dry run': [*SMALL, '--mode=dry_run'],
  'dry run of what must be given': [ECT, '--mode=dry_run'],
}

SMALL_STUDIES = """
from cmjax.configs import edm


def get_config():
  c = edm.get_config()
  c.studies.discrete_limit['num_scales'] = (4, 8)
  c.studies.likelihood['num_steps'] = (2, 4)
  return c
"""

# Each command line in a process of its own, without importing cmjax again for each.
DRIVER = """
import json, os, sys, tempfile, traceback
from cmjax import main
from cmjax.modes import bench, compile, configs, dry_run, evaluate, port, sample, study
from cmjax.modes import train

bench.ROUND_S, bench.WINDOW_S = 0.5, 0.1  # numbers that are only read
for argv in json.load(sys.stdin):
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    child = os.fork()
    if not child:
      os.dup2(out.fileno(), 1)
      os.dup2(err.fileno(), 2)
      try:
        code = main.main(argv)
      except BaseException:
        traceback.print_exc()
        code = 1
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out.seek(0)
    err.seek(0)
    print(json.dumps([code, out.read().decode(), err.read().decode()]), flush=True)
"""


def python(*args, **kwargs):
  # Deadlines are far beyond what these take, and only there to end what hangs.
  return subprocess.run(
    [sys.executable, *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
    **kwargs,
  )


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """Where all of these runs lie."""
  return tmp_path_factory.mktemp('main')


@pytest.fixture(scope='module')
def trained(place):
  """A run of three steps, by the command that a user would give."""
  workdir = place / 'TRAINED'
  done = python('-m', 'cmjax.main', *SMALL, f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr
  return workdir, done.stdout


def listing(folder):
  """Every file with its content, and every folder."""
  return {
    str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
    for p in folder.rglob('*')
  }


@pytest.fixture(scope='module')
def answers(place, trained):
  """Exit code, output and error output of each command; what was there before all."""
  (place / 'EMPTY').mkdir()
  (place / 'small_studies.py').write_text(SMALL_STUDIES)
  (place / 'page.pkl').write_text('<!DOCTYPE html><html>Not found</html>')
  for copy in ('SAMPLED', 'EVALUATED', 'STUDIED', 'GONE_ON'):
    shutil.copytree(trained[0], place / copy)
  (place / 'SAMPLED' / 'samples' / 'step_00000003').mkdir(parents=True)
  for suffix in ('.json', '.md'):
    earlier = place / 'EVALUATED' / f'evaluation_00000003{suffix}'
    earlier.write_text('kept')
  before = listing(place)

  lines = {name: argv for name, (argv, _) in (MISTAKES | THEIRS).items()} | COMMANDS
  for name, argv in lines.items():
    own = [argument.replace('@/NEW', f'@/NEW/{name}') for argument in argv]
    lines[name] = [argument.replace('@', str(place)) for argument in own]
  given = json.dumps(list(lines.values()))
  done = python('-c', DRIVER, input=given)
  assert done.returncode == 0, done.stderr
  found = [json.loads(line) for line in done.stdout.splitlines()]
  return dict(zip(lines, found, strict=True)), before


def test_training_leaves_a_config_metrics_and_a_checkpoint(trained):
  workdir, said = trained
  assert said.splitlines()[-2:] == [
    f'done: {workdir}',
    f'report: {workdir / "report.html"}',
  ]
  assert '3 steps of 8 on 8 cpu device(s)' in said
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').open()]
  assert [row['step'] for row in rows] == [1, 2, 3]
  assert all(np.isfinite(row['loss']) and row['skipped_steps'] == 0 for row in rows)
  assert [p.name for p in (workdir / 'checkpoints').iterdir()] == ['3']
  config = json.loads((workdir / 'config.json').read_text())
  assert (config['batch_size'], config['network']['width']) == (8, 16)


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_one_line_that_names_it(mistake, answers, place):
  code, out, err = answers[0][mistake]
  assert err.startswith('cmjax: '), err
  assert err.count('\n') == 1, err
  assert code == 2
  assert out == ''
  assert re.search(MISTAKES[mistake][1], err), err
  assert not (place / 'NEW' / mistake).exists()


@pytest.mark.parametrize('mistake', THEIRS)
def test_a_mistake_of_the_users_own_shows_their_line(mistake, answers, place):
  code, _, err = answers[0][mistake]
  assert code == 1
  lines = err.splitlines()
  assert lines[0] == 'Traceback (most recent call last):'
  assert f'{Path(__file__).name}", line ' in lines[1]  # theirs is the first
  assert THEIRS[mistake][1] in err
  assert 'raised in config.objective' in err
  assert not (place / 'NEW' / mistake).exists()


def test_nothing_is_touched_but_what_the_commands_write(answers, place):
  before, after = answers[1], listing(place)
  new = {Path(name) for name in after.keys() - before.keys()}
  assert {path.parts[:2] for path in new} == {
    ('SAMPLED', 'samples'),
    ('EVALUATED', 'evaluation_00000003_2.json'),
    ('EVALUATED', 'evaluation_00000003_2.md'),
    ('STUDIED', 'studies'),
    ('BENCH',),
    ('BENCH', 'bench.json'),
    ('PORTED',),
    ('PORTED', 'w.safetensors'),
    ('PORTED', 'back'),
    ('PORTED', 'taught'),
    ('PORTED', 'w.safetensors.results'),
    ('GONE_ON', 'tensorboard'),
    ('GONE_ON', 'evaluation_00000003.json'),
    ('GONE_ON', 'evaluation_00000003.md'),
  }
  changed = {name for name in before if after.get(name) != before[name]}
  assert changed == {'GONE_ON/report.html', 'GONE_ON/starts.jsonl'}


def test_a_run_goes_on_by_its_folder_alone(answers, place):
  code, out, err = answers[0]['go on']
  assert (code, err) == (0, '')
  assert 'from step 3' in out
  assert out.splitlines()[-2] == f'done: {place / "GONE_ON"}'


def test_a_value_of_a_runs_own_config_can_be_set(answers, place):
  code, out, err = answers[0]['evaluate others']
  assert code == 0, err
  assert 'weights online' in out
  found = json.loads((place / 'GONE_ON' / 'evaluation_00000003.json').read_text())
  assert found['config']['sample_weights'] == 'online'
  code, out, err = answers[0]['dry run of a run']
  assert code == 0, err
  assert '3 steps of 8 on' in out


def test_a_file_of_weights_is_sampled_without_its_data(answers, place):
  code, _, err = answers[0]['sample a file']
  assert code == 0, err
  folder = place / 'PORTED' / 'w.safetensors.results' / 'samples' / 'step_00000003'
  found = np.load(folder / 'heun.npz')
  assert found['images'].shape == (6, 8, 8, 1)
  np.testing.assert_array_equal(found['labels'], [3, 7, 3, 7, 3, 7])
  source = digits()  # whose range the file of weights holds
  shown = np.asarray(Image.open(folder / 'heun.png'))
  np.testing.assert_array_equal(shown, pictures.samples(source, found['images']))


def test_the_configs_that_ship_are_listed(answers):
  code, out, err = answers[0]['list configs']
  assert (code, err) == (0, '')
  assert 'ict            Improved consistency training: from data alone.' in out
  assert answers[0]['key before config'][0] == 0


def test_version_and_help_take_no_time_and_load_no_jax():
  code = (
    'import sys; from cmjax import main; code = main.main(sys.argv[1:]); '
    'print(sorted({"jax", "numpy", "matplotlib"} & set(sys.modules)), code)'
  )
  for argv, told in (
    (['--version'], f'cmjax {cmjax.__version__}'),
    (['--help'], 'usage: cmjax --config=NAME'),
    (['--mdoe=x'], ''),
  ):
    done = python('-c', code, *argv)
    assert done.stdout.startswith(told)
    assert done.stdout.splitlines()[-1] == ('[] 2' if not told else '[] 0')
  done = python('-m', 'cmjax', '--version')
  assert done.stdout == f'cmjax {cmjax.__version__}\n'


def test_ctrl_c_while_cmjax_is_being_imported_is_one_line(tmp_path):
  (tmp_path / 'jax.py').write_text('raise KeyboardInterrupt\n')  # as if it came then
  done = python(
    '-m', 'cmjax', '--config=edm:digits', env=os.environ | {'PYTHONPATH': str(tmp_path)}
  )
  assert done.returncode == 130
  assert done.stderr.startswith('cmjax: interrupted; ')
  assert done.stderr.count('\n') == 1


def test_in_a_notebook_a_mistake_is_an_exit_code(capsys):
  assert main.main(['--config=none:x', '--mode=dry_run']) == 2
  assert capsys.readouterr().err.startswith("cmjax: --config: no config 'none'")


@pytest.mark.parametrize(
  ('flags', 'there'),
  [
    (['--workdir=none'], False),  # a folder that was downloaded may be the current one
    (['--config=edm:digits'], False),
    (['--config=edm:digits', '--config.objective.fn=theirs:loss'], True),
    (['--config=mine.py'], True),
    (['--workdir=none', '--trust=theirs'], True),
  ],
)
def test_the_current_folder_is_importable_if_the_command_names_code(
  flags, there, tmp_path, monkeypatch
):
  (tmp_path / 'in_this_folder.py').write_text('')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [p for p in sys.path if p])
  monkeypatch.setattr(sys, 'meta_path', sys.meta_path.copy())
  monkeypatch.setattr(functions, '_user_folders', functions._Folders())
  before = sys.path.copy()
  assert main.main([*flags, '--mode=dry_run']) != 0 or not there
  assert (importlib.util.find_spec('in_this_folder') is not None) == there
  assert sys.path == before


def test_a_module_of_the_users_hides_none_that_is_installed(tmp_path, monkeypatch):
  for name in ('optax', 'json', 'only_mine'):
    (tmp_path / f'{name}.py').write_text('')
  (tmp_path / 'a_package').mkdir()
  (tmp_path / 'a_package' / '__init__.py').write_text('from only_mine import *\n')
  (tmp_path / 'a_package' / 'inner.py').write_text('VALUE = 3\n')
  monkeypatch.setattr(sys, 'meta_path', sys.meta_path.copy())
  monkeypatch.setattr(functions, '_user_folders', functions._Folders())
  functions.allow_imports_from(tmp_path)
  for name in ('optax', 'json'):
    monkeypatch.delitem(sys.modules, name)
    assert str(tmp_path) not in importlib.util.find_spec(name).origin
  assert importlib.import_module('a_package.inner').VALUE == 3
  for name in ('only_mine', 'a_package', 'a_package.inner'):
    assert sys.modules.pop(name).__file__.startswith(str(tmp_path))


@pytest.mark.parametrize(
  ('text', 'code', 'told'),
  [
    ('def get_config(:\n', 1, 'SyntaxError'),
    ('import sys\nsys.exit("my own end")\n', 1, 'cmjax: my own end'),
    ('def get_config():\n  raise FloatingPointError("mine")\n', 1, 'raise Floating'),
  ],
)
def test_how_a_config_of_the_users_ends_is_shown(text, code, told, tmp_path, capsys):
  (tmp_path / 'mine.py').write_text(text)
  assert main.main([f'--config={tmp_path / "mine.py"}', '--mode=dry_run']) == code
  err = capsys.readouterr().err
  assert told in err
  assert 'a bug in cmjax' not in err


def test_a_closed_pipe_prints_no_error():
  done = subprocess.run(
    ['bash', '-c', '"$@" --mode=configs | true; exit "${PIPESTATUS[0]}"', 'x',
     sys.executable, '-m', 'cmjax'],
    cwd=ROOT, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 1
  assert done.stderr == ''


def test_debug_shows_where_a_mistake_was_noticed(capsys):
  assert main.main(['--config=none:x', '--mode=dry_run', '--debug']) == 2
  err = capsys.readouterr().err
  assert 'Traceback' in err
  assert err.splitlines()[-1].startswith('cmjax: --config: no config')


def test_samples_are_the_picture_and_the_arrays(answers, place):
  code, _, err = answers[0]['sample']
  assert code == 0, err
  samples = place / 'SAMPLED' / 'samples'
  assert not any((samples / 'step_00000003').iterdir())  # an earlier one is kept
  found = np.load(samples / 'step_00000003_2' / 'heun.npz')
  source = digits()
  assert found['images'].shape == (32, 8, 8, 1)
  assert found['images'].dtype == np.float32
  np.testing.assert_array_equal(found['labels'], source.labels[:32])
  assert found['evaluations'] == 35  # 18 steps of Heun's method, the last by Euler's
  with Image.open(samples / 'step_00000003_2' / 'heun.png') as picture:
    shown = np.asarray(picture)
  np.testing.assert_array_equal(shown, pictures.samples(source, found['images']))


def test_an_evaluation_is_a_table_of_those_samples_beside_earlier_ones(answers, place):
  code, out, err = answers[0]['evaluate']
  assert code == 0, err
  found = json.loads((place / 'EVALUATED' / 'evaluation_00000003_2.json').read_text())
  row, _ = found['rows']
  assert (row['sampler'], row['evaluations'], row['samples']) == ('heun', 35, 32)
  assert 0 <= row['label_agreement'] <= 1
  assert (found['data'], found['step']) == ('digits (scikit-learn, 8x8)', 3)
  config = json.loads((place / 'TRAINED' / 'config.json').read_text())
  assert found['config'] == config
  arrays = np.load(place / 'SAMPLED' / 'samples' / 'step_00000003_2' / 'heun.npz')
  samples = [{'pixels': arrays['images'].reshape(32, -1)}]
  data = [{'pixels': as_x0(digits(), digits().examples).reshape(1797, -1)}]
  expected = pixel_frechet().values(samples, data)['pixel_frechet']
  # The same samples in float64 statistics; BLAS may sum in another order.
  first, *_ = row['seeds']
  assert first['seed'] == 1
  assert first['pixel_frechet'] == pytest.approx(expected, rel=1e-6)
  assert not (place / 'EVALUATED' / 'evaluation.unfinished').exists()
  text = (place / 'EVALUATED' / 'evaluation_00000003_2.md').read_text()
  assert '| sampler | evaluations | samples |' in text
  assert f'| heun | 35 | 32 | {row["pixel_frechet"]:.3f} ± ' in text
  assert f'| heun | 1 | {expected:.3f} |' in text
  assert 'digits (scikit-learn, 8x8), step 3, weights slow, seeds 1-3' in text
  assert text in out


def test_weights_written_as_safetensors_can_sample_and_be_a_teacher(
  answers, trained, place
):
  for name in ('weights out', 'and in', 'sample of them', 'teach with them'):
    assert answers[0][name][0] == 0, answers[0][name]
  run, ported = (pretrained.load(p) for p in (trained[0], place / 'PORTED' / 'back'))
  assert ported.config.sample_weights == 'online'
  assert (ported.step, ported.shape, ported.classes) == (3, (8, 8, 1), 10)
  jax.tree.map(np.testing.assert_array_equal, ported.params, run.params)
  assert (place / 'PORTED' / 'back' / 'samples' / 'step_00000003' / 'heun.npz').exists()
  code, _, err = answers[0]['train there']
  assert code == 2
  assert err.count('\n') == 1
  assert re.search(r'weights.*no run; .*--config\.init_from=.*PORTED/back', err)
  assert not (place / 'PORTED' / 'back' / 'config.json').exists()
  assert (place / 'PORTED' / 'taught' / 'checkpoints' / '1').is_dir()


def test_a_study_is_tables_and_pictures(answers, place):
  code, out, err = answers[0]['study']
  assert code == 0, err
  folder = place / 'STUDIED' / 'studies' / 'step_00000003'
  found = json.loads((folder / 'study.json').read_text())
  text = (folder / 'study.md').read_text()
  assert set(found['studies']) == {
    'tangents',
    'normalised_bias',
    'gradient_noise',
    'jvp_precision',
    'discrete_limit',
    'likelihood',
  }
  for name, rows in found['studies'].items():
    assert rows
    assert f'![]({name}.png)' in text
    with Image.open(folder / f'{name}.png') as picture:
      assert min(picture.size) > 100
  assert [row['sigma'] for row in found['studies']['tangents']] == [0.01, 80.0]
  assert text in out


def test_a_bench_is_a_table_and_its_numbers(answers, place):
  code, out, err = answers[0]['bench']
  assert code == 0, err
  found = json.loads((place / 'BENCH' / 'bench.json').read_text())
  assert f'{1e3 * found["step_s"]:.1f} ms' in out
  assert found['config']['batch_size'] == found['batch_size'] == 8


@pytest.mark.parametrize(
  ('error', 'expected'),
  [
    ('RESOURCE_EXHAUSTED: out of memory', r'config\.accumulate'),
    ('INTERNAL', 'a device'),
  ],
)
def test_a_device_error_says_what_may_help(error, expected):
  assert re.search(expected, errors.advice(error))


@pytest.mark.parametrize(
  ('error', 'code'),
  [('UNAVAILABLE: connection reset', errors.RETRY), ('INTERNAL: core halted', 1)],
)
def test_a_device_that_is_not_available_is_tried_again_later(error, code, capsys):
  assert errors.report(jax.errors.JaxRuntimeError(error)) == code
  assert capsys.readouterr().err.startswith(f'cmjax: {error}; a device failed')


def test_what_was_compiled_is_found_again(tmp_path):
  cache = tmp_path / 'cache'
  other = tmp_path / 'other'  # what is given on the command line wins
  environment = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(other),
    # A step this small may compile in under the second that JAX asks for.
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  files = []
  for name in ('a', 'b'):
    done = python(
      '-m', 'cmjax.main', *SMALL, f'--workdir={tmp_path / name}',
      f'--compilation_cache={cache}', env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files.append({path.name for path in cache.iterdir()})
  assert any('train_step' in name for name in files[0])
  assert {n for n in files[1] if n.endswith('-cache')} <= files[0]
  assert not other.exists()


def test_a_dry_run_shows_config_parameters_and_schedules(answers):
  code, out, err = answers[0]['dry run']
  assert code == 0, err
  config, _ = json.JSONDecoder().raw_decode(out)
  assert (config['batch_size'], config['network']['width']) == (8, 16)
  assert 'input/kernel' in out
  assert '| config.optimizer.learning_rate | ' in out
  assert (
    '1,797 examples of shape (8, 8, 1) in memory; 3 steps of 8 on 8 cpu device(s)'
    in out
  )
  code, out, err = answers[0]['dry run of what must be given']
  assert code == 0, err
  assert '"init_from": "?"' in out
  assert '| config.objective.relative_gap | ' in out


OWN_SCHEDULES = """
from cmjax.configs import edm

def get_config():
  c = edm.get_config('digits')
  c.network.update(width=16, num_blocks=1, embedding=8)
  c.optimizer.learning_rate = dict(
    fn='optax:linear_schedule', init_value=0.5, end_value=0.0, transition_steps=2
  )
  c.ema = dict(slow=dict(fn='schedules_of_a_user:rising', value=0.25))
  c.update(batch_size=8, total_images=16)
  c.every.log_steps, c.every.picture_steps = 1, 0
  return c
"""


def test_schedules_of_optax_and_of_the_user_are_shown_and_logged(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(sys, 'meta_path', sys.meta_path.copy())
  (tmp_path / 'mine.py').write_text(OWN_SCHEDULES)
  (tmp_path / 'schedules_of_a_user.py').write_text(
    'def rising(value):\n  return lambda step: value + step / 100\n'
  )
  argv = [f'--config={tmp_path / "mine.py"}', f'--workdir={tmp_path / "run"}']
  assert main.main([*argv, '--mode=dry_run']) == 0
  out = capsys.readouterr().out
  assert re.search(r'\| config\.optimizer\.learning_rate +\| 0\.5 ', out)
  assert re.search(r'\| config\.ema\.slow +\| 0\.25 ', out)
  assert main.main(argv) == 0
  rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').open()]
  assert [row['optimizer.learning_rate'] for row in rows] == [0.5, 0.25]
  np.testing.assert_allclose([row['ema.slow'] for row in rows], [0.25, 0.26], rtol=1e-6)
