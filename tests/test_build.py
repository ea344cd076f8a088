"""Parts against signatures and kinds; whose mistake an error is; what may be called."""

import copy
import sys
import traceback

import optax
import pytest

from cmjax.core import Model, Network, Schedule, UserError
from cmjax.data.source import Source
from cmjax.objectives import consistency
from cmjax.runtime import build, schedules
from cmjax.runtime.config import load
from cmjax.runtime.config_json import from_json, to_json
from cmjax.runtime.config_record import ConfigDict
from cmjax.runtime.errors import user_errors
from cmjax.samplers import Sampler

# Functions that a config of these tests names, as a user's own would ---------------


def leaf(*, value: float, steps: int = 3, name: str = 'plain', on: bool = False):
  """Returns what it was called with."""
  if value < 0:
    raise ValueError('value must not be negative')
  return dict(value=value, steps=steps, name=name, on=on)


def branch(f, *, child, batch_size: int, sizes=(1, 2)):
  """Takes another part, and two things that the run gives."""
  return dict(f=f, child=child, batch_size=batch_size, sizes=sizes)


def distil(f, teacher, *, weight: float = 1.0):
  """Needs a teacher."""
  return f, teacher, weight


LEAF, BRANCH, DISTIL = (f'{__name__}:{fn}' for fn in ('leaf', 'branch', 'distil'))
GIVEN = dict(f='model', batch_size=8, total_images=80)


def made(given=GIVEN, **spec):
  return build.build(ConfigDict(spec), 'config.part', **given)


def refusal(call, *args, **kwargs):
  """The one line that a mistake is told by."""
  with pytest.raises(UserError) as error:
    call(*args, **kwargs)
  assert '\n' not in str(error.value)
  return str(error.value)


# build -----------------------------------------------------------------------------


def test_a_part_is_its_function_called_with_its_keywords():
  assert made(fn=LEAF, value=1.5, on=True) == dict(
    value=1.5, steps=3, name='plain', on=True
  )


def test_parts_inside_parts_are_built_first_and_what_the_run_gives_reaches_all():
  child = dict(fn=BRANCH, child=dict(fn=LEAF, value=2.0), sizes=(3, (4, 5)))
  built = made(fn=BRANCH, child=child)
  assert (built['f'], built['batch_size'], built['sizes']) == ('model', 8, (1, 2))
  inner = built['child']
  assert (inner['f'], inner['batch_size'], inner['sizes']) == ('model', 8, (3, (4, 5)))
  assert inner['child']['value'] == 2.0


def test_an_int_is_accepted_for_a_float():
  assert made(fn=LEAF, value=2)['value'] == 2


BAD_PARTS = {
  'misspelt': (
    dict(fn=LEAF, valeu=1.0),
    f'config.part.valeu: {LEAF} has no such key, did you mean value?',
  ),
  'unlike any': (
    dict(fn=LEAF, zzz=1.0),
    f'config.part.zzz: {LEAF} has no such key; known: value, steps, name, on',
  ),
  'misspelt below': (
    dict(fn=BRANCH, child=dict(fn=LEAF, value=1.0, step=1)),
    f'config.part.child.step: {LEAF} has no such key, did you mean steps?',
  ),
  'missing': (dict(fn=LEAF), f'config.part.value: missing; {LEAF} needs it'),
  'missing below': (
    dict(fn=BRANCH, child=dict(fn=LEAF)),
    f'config.part.child.value: missing; {LEAF} needs it',
  ),
  'text for a number': (
    dict(fn=LEAF, value='1'),
    "config.part.value: must be float, got '1'",
  ),
  'float for an int': (
    dict(fn=LEAF, value=1.0, steps=3.0),
    'config.part.steps: must be int, got 3.0',
  ),
  'bool for an int': (
    dict(fn=LEAF, value=1.0, steps=True),
    'config.part.steps: must be int, got True',
  ),
  'number for text': (
    dict(fn=LEAF, value=1.0, name=3),
    'config.part.name: must be str, got 3',
  ),
  'number for a bool': (
    dict(fn=LEAF, value=1.0, on=1),
    'config.part.on: must be bool, got 1',
  ),
  'refused by a function of cmjax': (
    dict(fn='cmjax.samplers:phased', edges=(3.0, 2.0)),
    'config.part: edges must be positive and ascend, got (3.0, 2.0)',
  ),
  'not a number': (
    dict(fn=LEAF, value=float('nan')),
    'config.part.value: must be finite, got nan',
  ),
  'beyond every integer': (
    dict(fn=LEAF, value=1.0, steps=10**100),
    'config.part.steps: must not exceed 2**53',
  ),
  'text in a tuple of numbers': (
    dict(fn='cmjax.samplers:multistep', sigmas=(80.0, 'x')),
    "config.part.sigmas: must be float, got 'x'",
  ),
  'a number for a tuple': (
    dict(fn='cmjax.samplers:multistep', sigmas=80.0),
    'config.part.sigmas: must be a tuple of float, got 80.0',
  ),
  'a share of Adam beyond one': (
    dict(fn='optax:adam', learning_rate=1e-3, b1=1.0),
    'config.part.b1: must be in [0, 1), got 1.0',
  ),
  'a rate below zero': (
    dict(fn='optax:adam', learning_rate=-1.0),
    'config.part.learning_rate: must not be negative, got -1.0',
  ),
  'set by the run': (
    dict(fn=BRANCH, child=0, batch_size=4),
    'config.part.batch_size: is set by the run; leave it out',
  ),
  'without its teacher': (
    dict(fn=DISTIL),
    f'config.part: {DISTIL} needs a teacher; give --config.teacher=PATH',
  ),
}


@pytest.mark.parametrize('mistake', BAD_PARTS)
def test_a_mistake_in_a_part_names_the_key_and_the_function(mistake):
  spec, told = BAD_PARTS[mistake]
  assert refusal(made, **spec) == told


def test_a_hint_does_not_offer_what_only_the_run_may_set():
  assert refusal(made, fn=BRANCH, child=0, zzz=0).endswith('known: child, sizes')


def test_a_teacher_that_is_given_reaches_the_function():
  assert made(GIVEN | dict(teacher='D'), fn=DISTIL, weight=0.5) == ('model', 'D', 0.5)


@pytest.mark.parametrize(
  'path', ['no_such_module:f', 'cmjax.times:no_such_function', 'cmjax.times', ':f', '']
)
def test_an_import_path_that_leads_nowhere_is_named(path):
  assert refusal(made, fn=path).startswith(f'config.part.fn: cannot import {path!r} (')


def test_build_each_builds_by_name_and_names_the_part_at_fault():
  parts = ConfigDict(dict(a=dict(fn=LEAF, value=1.0), b=dict(fn=LEAF, value=2)))
  built = build.build_each(parts, 'config.parts')
  assert {name: each['value'] for name, each in built.items()} == dict(a=1.0, b=2)
  parts.b = dict(fn=LEAF, value='x')
  told = refusal(build.build_each, parts, 'config.parts')
  assert told == "config.parts.b.value: must be float, got 'x'"


# Kinds -----------------------------------------------------------------------------


def silent(network):
  """Says nothing of what it returns, which is no model."""
  return 'a string'


@pytest.mark.parametrize(
  ('fn', 'kind', 'told'),
  [
    ('cmjax.diffusion_samplers:ode', Network, 'returns Sampler, not Network'),
    ('cmjax.schedules:constant', Model, 'returns a function, not Model'),
    ('optax:adam', Schedule, 'not a function'),
    (f'{__name__}:silent', Model, 'of type str, not Model'),
    (f'{__name__}:silent', Network, 'of type str, not Network'),
  ],
)
def test_a_function_of_another_kind_is_refused(fn, kind, told):
  spec = ConfigDict(dict(fn=fn))
  given = dict(network=None, learning_rate=1.0, value=1.0)
  assert told in refusal(build.build, spec, 'config.x', kind, **given)


def test_a_part_inside_a_part_is_of_the_kind_of_its_parameter():
  ode = dict(fn='cmjax.diffusion_samplers:ode')
  told = refusal(made, fn='cmjax.objectives.consistency:ct', pairs=ode)
  assert told.startswith(f'config.part.pairs.fn: {ode["fn"]} returns Sampler')
  told = refusal(made, fn='optax:adam', learning_rate=ode)
  assert told.startswith(f'config.part.learning_rate.fn: {ode["fn"]} returns')


# Whose mistake it is ---------------------------------------------------------------


def test_a_mistake_in_a_function_of_the_users_keeps_its_traceback():
  with pytest.raises(ValueError, match='must not be negative') as error:
    made(fn=LEAF, value=-1.0)
  assert not isinstance(error.value, UserError)
  assert error.value.__notes__ == ['raised in config.part']
  shown = ''.join(traceback.format_exception(error.value))
  assert "raise ValueError('value must not be negative')" in shown


def test_a_mistake_in_a_function_called_by_cmjax_keeps_its_traceback():
  rest = dict(relative_gap=None, distance=None, weighting=None)
  with pytest.raises(ValueError, match='must not be negative'), user_errors('x'):
    consistency.ect(None, times=lambda *_: leaf(value=-1.0), **rest)


def test_a_module_of_the_users_that_cannot_be_imported_keeps_its_traceback(
  tmp_path, monkeypatch
):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'broken_losses.py').write_text('import no_such_module_at_all\n')
  with pytest.raises(ModuleNotFoundError, match='no_such_module_at_all'):
    made(fn='broken_losses:plain')


# What came with weights ------------------------------------------------------------

# The kind each place needs, and a function of cmjax that stands there.
PLACES = {
  'network': (Network, 'cmjax.networks.mlp:mlp'),
  'precond': (Model, 'cmjax.precond:edm'),
  'data': (Source, 'cmjax.data.digits:digits'),
  'samplers.x': (Sampler, 'cmjax.samplers:one_step'),
  'ema.x': (Schedule, 'cmjax.schedules:constant'),
  'optimizer': (optax.GradientTransformation, 'optax:adam'),
}
# None of these may be called, or its module be imported: what they would do is harmless
# or to make the marker.
HOSTILE = [
  ('os:system', dict(command='touch {marker}')),
  ('posix:system', dict(command='touch {marker}')),
  ('os:mkdir', dict(path='{marker}')),
  ('os:makedirs', dict(name='{marker}')),
  ('os.path:exists', dict(path='{marker}')),
  ('os:popen', dict(cmd='touch {marker}')),
  ('os:execv', dict(path='/bin/touch', argv=('touch', '{marker}'))),
  ('subprocess:Popen', dict(args=('touch', '{marker}'))),
  ('subprocess:run', dict(args=('touch', '{marker}'))),
  ('subprocess:check_output', dict(args=('touch', '{marker}'))),
  ('builtins:open', dict(file='{marker}', mode='w')),
  ('builtins:eval', dict(source='open("{marker}", "w")')),
  ('builtins:exec', dict(source='open("{marker}", "w")')),
  ('builtins:__import__', dict(name='payload_module')),
  ('builtins:print', dict(file='{marker}')),
  ('io:open', dict(file='{marker}', mode='w')),
  ('codecs:open', dict(filename='{marker}', mode='w')),
  ('shutil:rmtree', dict(path='{marker}')),
  ('shutil:copyfile', dict(src='/etc/hostname', dst='{marker}')),
  ('pathlib:Path', dict(path='{marker}')),
  ('runpy:run_module', dict(mod_name='payload_module')),
  ('importlib:import_module', dict(name='payload_module')),
  ('payload_module:anything', {}),
  ('payload_module.inner:anything', {}),
  ('numpy:save', dict(file='{marker}', arr=(1,))),
  ('numpy:fromfile', dict(file='{marker}')),
  ('pickle:loads', dict(data='cos\nsystem\n(S"touch {marker}"\ntR.')),
  ('ctypes:CDLL', dict(name='{marker}')),
  ('webbrowser:open', dict(url='file://{marker}')),
  ('jax.numpy:save', dict(file='{marker}', arr=(1,))),
  ('flax.serialization:to_bytes', dict(target=(1,))),
  ('optax.payload:anything', {}),
  ('cmjax.runtime.config:load', dict(name='{marker}')),
  ('cmjax.runtime.functions:allow_imports_from', dict(folder='{marker}')),
  ('cmjax.runtime.build:build', dict(where='x')),
  ('cmjax.main:main', dict(argv=('--help',))),
  ('cmjax.runtime.checkpoint:save_weights', dict(workdir='{marker}', step=1)),
  ('cmjax.runtime.results:write_png', dict(path='{marker}')),
  ('cmjax.data.source:np.save', dict(file='{marker}')),
  ('cmjax.data:os', {}),
  ('cmjax.data:_images', {}),
  ('cmjax:__getattr__', {}),
  ('', {}),
  (':', {}),
  ('cmjax..data:digits', {}),
  ('cmjax.no_such_module:f', {}),
]


def foreign(part, marker, trust=()):
  """A part as it comes out of a file."""
  text = to_json(ConfigDict(dict(x=part)))
  return from_json(text.replace('{marker}', str(marker)), 'file', trust).x


@pytest.fixture
def payload(tmp_path, monkeypatch):
  """A module that leaves a marker when it is imported."""
  folder, marker = tmp_path / 'modules', tmp_path / 'marker'
  folder.mkdir()
  (folder / 'payload_module.py').write_text(f'open({str(marker)!r}, "w")\n')
  monkeypatch.syspath_prepend(folder)
  yield marker
  sys.modules.pop('payload_module', None)


@pytest.mark.parametrize('place', PLACES)
def test_an_untrusted_config_calls_only_cmjax_functions_of_the_right_kind(
  place, payload
):
  kind, _ = PLACES[place]
  before = set(sys.modules)
  for fn, keywords in HOSTILE:
    part = foreign(dict(fn=fn, **keywords), payload)
    told = refusal(build.build, part, f'config.{place}', kind)
    assert told.startswith(f'config.{place}.fn: '), told
    assert not payload.exists(), fn
  new = set(sys.modules) - before
  assert not new & {'payload_module', 'runpy', 'webbrowser', 'optax.payload'}


def test_an_untrusted_part_inside_a_part_is_not_called(payload):
  for fn, keywords in HOSTILE:
    inner = dict(fn=fn, **keywords)
    for outer, key, kind in (
      ('cmjax.objectives.consistency:ct', 'pairs', None),
      ('optax:adam', 'learning_rate', optax.GradientTransformation),
      ('cmjax.precond:edm', 'sigma_data', Model),
      ('cmjax.networks.mlp:mlp', 'width', Network),
      ('cmjax.data.points:points', 'oracle', Source),
    ):
      part = foreign({'fn': outer, key: inner}, payload)
      told = refusal(build.build, part, 'config.x', kind, network=None)
      starts = ('config.x.fn: ', f'config.x.{key}.fn: ', f'config.x.{key}: must be a')
      assert told.startswith(starts), told
      assert not payload.exists(), fn


@pytest.mark.parametrize('place', PLACES)
def test_functions_of_cmjax_in_an_untrusted_config_are_built(place, tmp_path):
  kind, fn = PLACES[place]
  needs = {'value': 0.9} if 'schedules' in fn else {}
  needs = {'learning_rate': 1e-3} if 'optax' in fn else needs
  given = {'network': Network(None, None)} if place == 'precond' else {}
  build.build(foreign(dict(fn=fn, **needs), tmp_path), 'config.x', kind, **given)


def test_a_package_that_is_trusted_may_be_named(tmp_path):
  part = dict(fn=LEAF, value=1.0)
  told = refusal(build.build, foreign(part, tmp_path), 'config.x', None)
  assert f'names {LEAF!r}' in told
  assert '--trust=tests' in told
  built = build.build(foreign(part, tmp_path, ('tests',)), 'config.x', None)
  assert built['value'] == 1.0
  built = build.build(foreign(part, tmp_path, 'tests'), 'config.x', None)
  assert built['value'] == 1.0


def test_copies_of_an_untrusted_config_stay_untrusted(tmp_path):
  part = foreign(dict(fn='os:system', command='x'), tmp_path)
  config = ConfigDict(dict(network=part))
  for each in (
    copy.deepcopy(config),
    config.copy_and_resolve_references(),
    ConfigDict(config.to_dict()),
  ):
    assert 'it was not called' in refusal(build.build, each.network, 'c', Network)


# Schedules -------------------------------------------------------------------------


def test_schedules_are_found_wherever_they_are():
  config = load('ct:toy2d')
  config = config.replace(total_images=config.batch_size * 100)
  found = schedules.schedules_of(config)
  assert set(found) == {
    'config.ema.slow',
    'config.objective.pairs.num_scales',
    'config.optimizer.learning_rate',
    'config.target_decay',
  }
  rate, spec = found['config.optimizer.learning_rate'], config.optimizer.learning_rate
  assert spec.fn == 'cmjax.schedules:cosine'
  # Half a cosine stands at half its height half-way, to the rounding of float32.
  assert float(rate(50)) == pytest.approx(spec.peak / 2, rel=1e-6)


def annotated(*, value: float) -> Schedule:
  """A schedule by its annotation."""
  return lambda step: step * 0.0 + value


def of_optax(*, value: float) -> optax.Schedule:
  """The same, annotated as optax does."""
  return lambda count: count * 0.0 + value


def unannotated(*, value):
  """A schedule only by the parameter that it is for."""
  return lambda step: step * 0.0 + value


def in_text(*, value: float) -> 'Schedule':
  """A schedule whose annotation is a string, as of a `from __future__` import."""
  return lambda step: step * 0.0 + value


def loss_of_a_user(f, *, rate, weight: Schedule):
  """An objective of the user's, one of whose keys says its type."""
  return f, rate, weight


OPTAX_RATE = dict(fn='optax:cosine_decay_schedule', init_value=0.5, decay_steps=10)


@pytest.mark.parametrize('name', ['annotated', 'of_optax', 'unannotated', 'in_text'])
def test_a_schedule_of_the_users_is_found_by_its_annotation_or_its_place(name):
  part = dict(fn=f'{__name__}:{name}', value=0.25)
  optimizer = dict(fn='optax:adam', learning_rate=part)
  objective = dict(fn=f'{__name__}:loss_of_a_user', rate=part, weight=part)
  config = load('edm:digits').replace(
    optimizer=optimizer, objective=objective, ema=dict(slow=part), target_decay=part
  )
  expected = {
    'config.optimizer.learning_rate',
    'config.objective.weight',
    'config.ema.slow',
    'config.target_decay',
  }
  if name != 'unannotated':  # then nothing says what `rate` is
    expected |= {'config.objective.rate'}
  found = schedules.schedules_of(config)
  assert set(found) == expected
  assert {float(schedule(3)) for schedule in found.values()} == {0.25}


def test_a_schedule_of_optax_is_found_built_and_checked(tmp_path):
  config = load('edm:digits')
  optimizer = config.optimizer.to_dict() | dict(learning_rate=OPTAX_RATE)
  config = config.replace(optimizer=optimizer, ema=dict(slow=OPTAX_RATE))
  found = schedules.schedules_of(config)
  assert set(found) == {'config.optimizer.learning_rate', 'config.ema.slow'}
  assert float(found['config.ema.slow'](5)) == pytest.approx(0.25)
  schedules.check_schedules(config, found)
  (tmp_path / 'config.json').write_text(to_json(config))
  again = load(tmp_path / 'config.json')  # as data, whose functions are foreign
  assert set(schedules.schedules_of(again)) == set(found)
  for key, kind in (('optimizer', optax.GradientTransformation), ('ema', Schedule)):
    part = again.optimizer if key == 'optimizer' else again.ema.slow
    build.build(part, f'config.{key}', kind)
  wild = config.replace(ema=dict(slow=OPTAX_RATE | dict(init_value=3.0)))
  told = refusal(schedules.check_schedules, wild, schedules.schedules_of(wild))
  assert told.startswith('config.ema.slow: must be in [0, 1), and is 3')


def test_no_module_of_an_untrusted_config_is_imported_to_find_schedules(payload):
  config = load('edm:digits')
  for place in ('optimizer', 'objective', 'target_decay'):
    part = foreign(dict(fn='payload_module:anything'), payload)
    told = refusal(schedules.schedules_of, config.replace(**{place: part}))
    assert told.startswith(f'config.{place}.fn: ')
    assert not payload.exists()
