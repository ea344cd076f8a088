"""Floors, doors, sizes and words of the package; change them here, deliberately."""

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Bottom to top. A module imports from its own floor, without a cycle, and those below.
FLOORS = {
  'algebra': [
    *('core', 'checks', 'process', 'precond', 'times', 'schedules'),
    *('distances', 'weightings', 'fields', 'solvers'),
  ],
  'methods': [
    *('objectives.*', 'networks.*', 'metrics.*', 'studies.*'),
    *('samplers', 'diffusion_samplers', 'guidance', 'oracles', 'optimizers'),
    *('ema', 'likelihood', 'search', 'editing', 'inversion', 'augmentation'),
    *('contracts', 'contract_networks', 'contract_objectives', 'contract_parts'),
    'contract_samplers',
  ],
  'doors': ['pictures', 'runtime.*', 'data.*', 'port.*'],
  'programs': [
    *('train', 'train_step', 'sampling', 'data_features', 'evaluation'),
    *('edit_requests', 'report.*', 'modes.*'),
  ],
  'main': ['main', '__main__'],
}

# Which module may import which library; jax, numpy and the standard library are free.
DOORS = {
  'flax': ['networks.*'],
  'ml_collections': ['runtime.config_record', 'runtime.records', 'runtime.build'],
  'tensorflow_datasets': ['data.tfds'],
  'grain': ['runtime.loader'],
  'absl': ['runtime.loader'],
  'orbax': ['runtime.checkpoint', 'runtime.storage'],
  'xxhash': ['runtime.checksums'],
  'etils': ['runtime.paths'],
  'fsspec': ['runtime.paths'],
  'tensorstore': ['runtime.bucket_lock'],
  'clu': ['runtime.logs'],
  'tensorboardX': ['runtime.trackers'],
  'wandb': ['runtime.trackers'],
  'mlflow': ['runtime.trackers'],
  'tqdm': ['runtime.logs'],
  'matplotlib': ['pictures', 'report.svg'],
  'PIL': ['runtime.results', 'report.embed', 'data.images', 'pictures'],
  'IPython': ['pictures'],
  'sklearn': ['data.digits', 'metrics.pixels'],
  'optax': [
    *('optimizers', 'studies.*', 'train_step', 'modes.bench'),
    *('runtime.functions', 'runtime.run', 'runtime.classifier'),
  ],
  'msgpack': ['port.*'],
  'safetensors': ['port.*'],
  'pickle': ['port.*'],
}

# Words that rot, or that hide faults; and where they are right.
BANNED = {
  r'jax\._src': [],
  r'optax\._src': [],
  r'PRNGKey': [],
  r'nansum|nan_to_num': [],
  r'import \*': [],
  r'pmap|axis_name': [],
  r'PartitionSpec|axis_names': ['runtime.sharding'],
  r'config\.get\(': [],
  r'jax\.jit': [
    *('train', 'sampling', 'modes.*', 'studies.*', 'runtime.state'),
    *('runtime.classifier', 'data_features', 'contracts', 'contract_parts'),
  ],
  r'\bprint\(': ['runtime.logs', 'runtime.errors', 'modes.configs', 'modes.report'],
  r'\b(run as runs|config as configs|workdir as workdirs|process as processes)\b': [],
}
MAX_LINES = 300
MAX_POSITIONAL = 6

PACKAGE = ROOT / 'cmjax'
FILES = sorted(p for p in PACKAGE.rglob('*.py') if p.name != '__init__.py')
FILES = [p for p in FILES if p.relative_to(PACKAGE).parts[0] != 'configs']


def name_of(path):
  return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)


NAMES = {name_of(path) for path in FILES}
each_file = pytest.mark.parametrize('path', FILES, ids=name_of)


def is_in(name, patterns):
  folder = name.rpartition('.')[0]
  return any(name == p or (folder and p == f'{folder}.*') for p in patterns)


def floor_of(name):
  floors = [i for i, patterns in enumerate(FLOORS.values()) if is_in(name, patterns)]
  assert len(floors) == 1, f'{name} lies on {len(floors)} floors'
  return floors[0]


def imports(path):
  """Every module a file imports, as dotted paths, wherever in the file."""
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: imports are absolute'
      of_room = (PACKAGE / node.module.partition('.')[2]).is_dir()
      of_room |= node.module == 'cmjax.configs'  # the folder `configs`
      if node.module.partition('.')[0] == 'cmjax' and of_room:
        yield from (f'{node.module}.{alias.name}' for alias in node.names)
      else:
        yield node.module


def rooms_imported(path):
  """The modules of the package that a file imports, without the configs."""
  modules = {m.removeprefix('cmjax.') for m in imports(path) if m.startswith('cmjax.')}
  return {m for m in modules if not m.startswith('configs.')} - {'__version__'}


@each_file
def test_imports_point_down_or_to_the_same_floor(path):
  name = name_of(path)
  for other in rooms_imported(path):
    assert floor_of(other) <= floor_of(name), f'{name} imports {other}'
  for module in imports(path):
    if module.startswith('cmjax.configs.'):
      assert is_in(name, ['runtime.config_record']), f'{name} imports {module}'


def test_no_floor_has_a_cycle():
  below = {name_of(path): rooms_imported(path) for path in FILES}
  while below:
    free = {name for name, others in below.items() if not others & below.keys()}
    assert free, f'a cycle among {sorted(below)}'
    below = {name: others for name, others in below.items() if name not in free}


@each_file
def test_a_floor_does_not_know_those_above_by_name(path):
  name, text = name_of(path), path.read_text(encoding='utf-8')
  floor = floor_of(name)
  for other in re.findall(r'cmjax\.([a-z_0-9]+(?:\.[a-z_0-9]+)?)', text):
    module = other if other in NAMES else other.partition('.')[0]
    if module in NAMES:
      assert floor_of(module) <= floor, f'{name} names {module}'
  if floor < list(FLOORS).index('doors'):
    upward = re.search(r'\bconfig\.\w+|[\s\'"`]--[a-z]\w+', text)
    assert not upward, f'{name} names {upward[0]}'


@each_file
def test_foreign_libraries_come_through_their_doors(path):
  free = {'jax', 'numpy', 'cmjax', *sys.stdlib_module_names}
  for library in {module.partition('.')[0] for module in imports(path)} - free:
    assert library in DOORS, f'{library} has no door'
    assert is_in(name_of(path), DOORS[library]), f'{library} in {name_of(path)}'


def test_every_door_is_used():
  used = {(m.partition('.')[0], name_of(p)) for p in FILES for m in imports(p)}
  for library, patterns in DOORS.items():
    for pattern in patterns:
      users = [name for module, name in used if module == library]
      assert any(is_in(name, [pattern]) for name in users), pattern


@each_file
def test_no_word_that_rots_or_hides_faults(path):
  text = path.read_text(encoding='utf-8')
  for word, allowed in BANNED.items():
    if not is_in(name_of(path), allowed):
      assert not re.search(word, text), f'{word} in {name_of(path)}'


@each_file
def test_files_and_signatures_are_short(path):
  text = path.read_text(encoding='utf-8')
  assert len(text.splitlines()) <= MAX_LINES
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      positional = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
      positional = [name for name in positional if name not in ('self', 'cls')]
      assert len(positional) <= MAX_POSITIONAL, node.name


def test_every_module_has_a_floor_and_every_floor_its_modules():
  for name in NAMES:
    floor_of(name)
  for pattern in (p for floor in FLOORS.values() for p in floor):
    assert any(is_in(name, [pattern]) for name in NAMES), pattern


def test_no_folder_inside_a_folder_and_a_folder_s_init_stays_empty():
  for path in PACKAGE.rglob('*.py'):
    assert len(path.relative_to(PACKAGE).parts) <= 2
    if path.name == '__init__.py' and path.parent != PACKAGE:
      assert not path.read_text(encoding='utf-8').strip(), path


def test_the_algebra_loads_jax_and_numpy_alone():
  script = (
    'import sys, jax, numpy; before = set(sys.modules); import cmjax.process;'
    'print(*{name.partition(".")[0] for name in set(sys.modules) - before})'
  )
  command = [sys.executable, '-c', script]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
  assert set(done.stdout.split()) - sys.stdlib_module_names == {'cmjax'}


@pytest.mark.parametrize(
  'path',
  [p for p in sorted((ROOT / 'configs').glob('[a-z]*.py'))],
  ids=lambda p: p.stem,
)
def test_a_config_imports_what_is_shared_and_at_most_one_other_config(path):
  shared = ('parts', 'papers')
  modules = set(imports(path))
  siblings = {name for name in modules if name.startswith('cmjax.configs.')}
  own = {'typing', 'ml_collections', 'cmjax.core'}
  allowed = own if path.stem in shared else set()
  assert modules - siblings <= allowed
  assert len(siblings - {f'cmjax.configs.{name}' for name in shared}) <= 1


@each_file
def test_every_part_is_built_as_a_kind(path):
  """Without one, a config of a stranger's could not name what it needs there."""
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Call):
      called = ast.unparse(node.func).removeprefix('build.')
      if called in ('build', 'build_each'):
        assert len(node.args) == 3, f'{name_of(path)}:{node.lineno}'


def test_top_level_holds_only_what_was_decided():
  allowed = {
    *('README.md', 'LICENSE', 'CITATION.cff', 'setup.cfg', 'pyproject.toml'),
    *('cmjax', 'configs', 'launch', 'tests', 'colabs', 'runs'),
  }
  there = {p.name for p in ROOT.iterdir() if not p.name.startswith('.')}
  assert {n for n in there if not n.endswith('.egg-info')} <= allowed
