"""Random values in every config: one line, or a run that trains.

`CMJAX_FUZZ=1000 pytest tests/test_fuzz_configs.py` tries as many, and from another seed
with `CMJAX_FUZZ_SEED`.
"""

import os
import random
import signal

import jax
import numpy as np
import pytest

from cmjax import train
from cmjax.core import UserError
from cmjax.runtime import batches, sharding
from cmjax.runtime.config_record import ConfigDict, checked, require
from cmjax.runtime.overrides import override
from cmjax.runtime.run import prepare
from tests import test_configs
from tests.test_configs import CONFIGS, shrunken

stand_ins = test_configs.stand_ins
CASES = int(os.environ.get('CMJAX_FUZZ', '32'))
SEED = int(os.environ.get('CMJAX_FUZZ_SEED', '0'))
DEADLINE_S = 20  # of one case, on a busy machine

NUMBERS = [
  *('0', '1', '2', '3', '7', '-1', '64', '100000', '2147483648', '-2147483649'),
  *('9007199254740992', '1000000000000000000', str(10**100), '9' * 5000),
  *('0.5', '1.0', '-0.5', '1e-30', '1e30', '1e300', '1e999', '-1e999'),
  *('nan', 'inf', '-inf', '0x10', '1_000', '٣'),
]
TEXTS = [
  *('', 'x', 'true', 'None', '?', '/', '..', 'a:b', 'online', 'slow', 'euler'),
  *(
    'float16',
    'x' * 100_000,
    'ä\x00\n',
    '{}',
    '[]',
    '[[[',
    '(' * 3000,
    '{"fn": "os:system"}',
  ),
]
TUPLES = ['()', '(1,)', '(80.0, 1.0)', '(1.0, 80.0)', '(nan,)', '("x",)', '((1, 2), 3)',
          '(-1,)', '(0,)', '(1e30,)', f'({10**100},)', '(None,)', '1,2']  # fmt: skip
FUNCTIONS = [
  'cmjax.schedules:constant', 'cmjax.schedules:cosine', 'cmjax.diffusion_samplers:ode',
  'cmjax.networks.mlp:mlp', 'cmjax.precond:edm', 'cmjax.precond:two_time',
  'cmjax.distances:l1', 'cmjax.weightings:uniform', 'cmjax.times:lognormal',
  'cmjax.data.digits:digits', 'cmjax.data.blank:blank', 'optax:sgd', 'os:times',
  'cmjax.objectives.denoise:edm', 'cmjax.objectives.consistency:ict',
  'optax:constant_schedule', 'cmjax.core:Network', 'cmjax.main:main', 'os:sep',
  'nowhere:f', 'cmjax:', ':', '.', 'json:loads', 'cmjax.data.source:np', '',
  'x' * 999,
]  # fmt: skip
KEYS = ['fn', 'value', 'lr', 'x', 'batchsize', 'steps', '', 'network', 'a.b', '__doc__']


def leaves(part, where=''):
  for key in part:
    value = part[key]
    if isinstance(value, ConfigDict):
      yield f'{where}{key}'
      yield from leaves(value, f'{where}{key}.')
    else:
      yield f'{where}{key}'


def random_override(draw, config):
  """A key of the config, or near one, and the text of a value."""
  key = draw.choice(list(leaves(config)))
  chance = draw.random()
  if chance < 0.1:
    key = f'{key}.{draw.choice(KEYS)}'
  elif chance < 0.2:
    key = f'{key.rpartition(".")[0]}.{draw.choice(KEYS)}'.lstrip('.')
  elif chance < 0.25:
    at = draw.randrange(len(key))
    key = key[:at] + draw.choice('xyz._') + key[at + 1 :]
  pools = [FUNCTIONS] if key.endswith('fn') else [NUMBERS, NUMBERS, TEXTS, TUPLES]
  return key, draw.choice(draw.choice(pools))


def late(number, frame):
  raise TimeoutError(f'took more than {DEADLINE_S} s')


@pytest.mark.parametrize('case', range(CASES))
def test_a_random_value_is_one_line_or_trains(case, stand_ins, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  draw = random.Random(SEED * 1_000_003 + case)
  config = shrunken(draw.choice(CONFIGS))
  stand_ins(config.copy_and_resolve_references())
  overrides = [random_override(draw, config) for _ in range(draw.choice([1, 1, 2]))]
  signal.signal(signal.SIGALRM, late)
  signal.alarm(DEADLINE_S)
  try:
    for key, text in overrides:
      override(config, key, text)
    require(checked(config))
    run = prepare(config, sharding.data_mesh(jax.devices()[:1]))
    train.check_memory(run)
  except UserError as error:
    one_line = str(error)
  else:
    one_line = ''
  finally:
    signal.alarm(0)
  if one_line:
    assert '\n' not in one_line
    assert len(one_line) < 700
    return
  state = train.first_state(run)
  state, metrics = train.compiled_step(run)(state, run.frozen, batches.batch(run, 0))
  assert int(state.step) == 1, overrides
  # A step that is not finite is skipped and counted; it is none the less a step.
  assert np.isfinite(metrics['loss']) or metrics['skipped'] == 1, overrides
