"""Files of a stranger: whatever functions their config names, none is called."""

import json
import os
from pathlib import Path
import sys

import jax
import numpy as np
import pytest

from cmjax import main
from cmjax.core import UserError
from cmjax.port import write
from cmjax.runtime import checkpoint, pretrained
from cmjax.runtime.config import load
from tests.test_build import HOSTILE, payload
from tests.test_main import SMALL

__all__ = ['payload']

# Every function in a thorough run, else one in twelve at each place.
EVERY = bool(os.environ.get('CMJAX_THOROUGH'))
# Where a function can be named, and the command that would call it first.
PLACES = {
  'network': 'sample',
  'network.width': 'sample',
  'precond': 'sample',
  'precond.sigma_data': 'sample',
  'samplers.x': 'sample',
  'data': 'evaluate',
  'metrics.x': 'evaluate',
  'objective': 'study',
  'objective.times': 'study',
  'studies.x': 'study',
  'target_decay': 'dry_run',
  'ema.x': 'dry_run',
  'mesh': 'dry_run',
  'optimizer': 'dry_run',
  'optimizer.learning_rate': 'dry_run',
  'reference': 'dry_run',
  'perceptual': 'dry_run',
}
FORMS = ('file', 'checkpoint', 'config.json')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A run of three steps, its weights and its config."""
  workdir = tmp_path_factory.mktemp('trust') / 'run'
  assert main.main([*SMALL, f'--workdir={workdir}']) == 0
  return pretrained.load(workdir), (workdir / 'config.json').read_text()


def poisoned(trained, place, part):
  """The config of the run with a part of a stranger's, as JSON."""
  config = json.loads(trained[1])
  *path, last = place.split('.')
  at = config
  for name in path:
    at = at[name]
  at[last] = part
  return json.dumps(config)


def stranger(trained, form, text, folder):
  """What holds the weights and that config: the path of a --workdir."""
  known = trained[0]
  meta = known.meta() | {'config': text, 'step': 3}
  if form == 'file':
    params = jax.tree.map(np.asarray, known.params)
    write.safetensors(folder / 'weights.safetensors', params, meta)
    return folder / 'weights.safetensors'
  if form == 'checkpoint':
    checkpoint.save_weights(folder / 'run', 3, known.params, meta)
    return folder / 'run'
  (folder / 'run').mkdir()
  (folder / 'run' / 'config.json').write_text(text)
  return folder / 'run'


def commands():
  """Each place, form and mode in which a function would be called."""
  for place, mode in PLACES.items():
    if mode != 'dry_run':  # weights alone are not trained from
      yield from ((place, form, mode) for form in FORMS if form != 'config.json')
    if place not in ('metrics.x', 'studies.x'):  # which a dry run does not build
      yield place, 'config.json', 'dry_run'


@pytest.mark.parametrize(('place', 'form', 'mode'), list(commands()))
def test_no_function_of_an_untrusted_file_is_called(
  place, form, mode, trained, payload, tmp_path, capsys
):
  cases = list(enumerate(HOSTILE))
  own = list(PLACES).index(place) + FORMS.index(form)
  for i, (fn, keywords) in cases if EVERY else cases[own % 12 :: 12]:
    text = json.dumps(dict(fn=fn, **keywords))
    part = json.loads(text.replace('{marker}', str(payload)))
    folder = tmp_path / f'{i}'
    folder.mkdir()
    path = stranger(trained, form, poisoned(trained, place, part), folder)
    before = sorted(p for p in folder.rglob('*'))
    code = main.main([f'--workdir={path}', f'--mode={mode}'])
    err = capsys.readouterr().err
    assert code == 2, (fn, err)
    assert err.count('\n') == 1, err
    assert not payload.exists(), fn
    assert 'payload_module' not in sys.modules
    assert sorted(p for p in folder.rglob('*')) == before


@pytest.mark.parametrize('use', ['load', 'teacher', 'port', 'init_from'])
def test_no_use_of_an_untrusted_file_calls_its_functions(
  use, trained, payload, tmp_path, capsys
):
  command = [f'touch {payload}']
  part = dict(fn='os:system', command=command[0])
  place = 'optimizer' if use == 'init_from' else 'network'
  path = stranger(trained, 'file', poisoned(trained, place, part), tmp_path)
  if use == 'load':
    with pytest.raises(UserError, match=r"names 'os:system', .*--trust=os"):
      pretrained.load(path)
  elif use == 'init_from':  # the weights alone are used
    argv = [*SMALL, f'--workdir={tmp_path / "new"}', f'--config.init_from={path}']
    assert main.main(argv) == 0
  else:
    argv = ['--mode=port', f'--from={path}', f'--to={tmp_path / "new"}']
    if use == 'teacher':
      argv = ['--config=cd:digits', '--mode=dry_run', f'--config.teacher={path}']
    assert main.main(argv) == 2
    assert "names 'os:system'" in capsys.readouterr().err
  assert not payload.exists()


OWN = """
from cmjax.networks import mlp
from cmjax.objectives import denoise

def network(**settings):
  return mlp.mlp(width=16, num_blocks=1, embedding=8)

def loss(f, times, sigma_data, label_dropout):
  return denoise.edm(f, times=times)
"""


def test_a_run_of_ones_own_functions_opens_once_they_are_trusted(
  tmp_path, monkeypatch, capsys
):
  (tmp_path / 'theirlab.py').write_text(OWN)
  monkeypatch.syspath_prepend(tmp_path)
  run = tmp_path / 'run'
  argv = [*SMALL, '--config.objective.fn=theirlab:loss', f'--workdir={run}']
  assert main.main(argv) == 0  # a command of one's own is trusted
  assert pretrained.load(run).step == 3  # which needs no loss
  capsys.readouterr()
  assert main.main([f'--workdir={run}']) == 2
  assert '--trust=theirlab' in capsys.readouterr().err
  assert main.main([f'--workdir={run}', '--trust=theirlab']) == 0
  config = load(run / 'config.json', trust=('theirlab',))
  assert config.objective.fn == 'theirlab:loss'


@pytest.mark.parametrize('text', ['[]', '3', 'null', '{}', '', '[' * 100_000])
@pytest.mark.parametrize('form', FORMS)
def test_a_config_that_is_none_is_one_line(form, text, trained, tmp_path, capsys):
  path = stranger(trained, form, text, tmp_path)
  mode = 'dry_run' if form == 'config.json' else 'sample'
  assert main.main([f'--workdir={path}', f'--mode={mode}']) == 2
  err = capsys.readouterr().err
  assert err.count('\n') == 1
  assert str(Path(path).name) in err
