"""The walls of the house: layers, doors, words. Change them here, deliberately."""

import ast
import re
import sys

import pytest

from tests.conftest import ROOT

# Imports point strictly down: a module imports only from layers above it in this list.
LAYERS = [
  ['core', 'startup'],
  ['checks'],
  ['process', 'schedules', 'distances', 'optimizers'],
  ['precond', 'times', 'fields', 'solvers'],
  ['oracles', 'samplers', 'statistics', 'objectives.*', 'networks.*'],
  ['port.pickles', 'port.names'],
  ['port.edm', 'port.openai', 'port.read'],
  ['studies', 'port.*'],
  ['sharding'],
  ['build', 'data', 'checkpoint', 'logs', 'preemption', 'watchdog'],
  ['config'],
  ['pretrained', 'workdir'],
  ['run'],
  ['evaluate'],
  ['train'],
  ['bench'],
  ['aot'],
  ['modes.*'],
  ['main'],
  ['__main__'],
]
# Inside a folder, files may share the layer below their own.
SHARED_IN_FOLDER = {'networks.layers'}

# Which module may import which library; jax, numpy and the standard library are free.
DOORS = {
  'flax': ['networks.*'],
  'ml_collections': ['config', 'build'],
  'tensorflow_datasets': ['data'],
  'orbax': ['checkpoint'],
  'xxhash': ['checkpoint'],
  'clu': ['logs'],
  'tensorboardX': ['logs'],
  'tqdm': ['logs'],
  'matplotlib': ['logs'],
  'PIL': ['logs', 'data'],
  'sklearn': ['data', 'evaluate'],
  'optax': ['build', 'run', 'train', 'bench', 'optimizers'],
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
  r'PartitionSpec|axis_names': ['sharding'],
  r'config\.get\(': [],
  r'jax\.jit': ['train', 'evaluate', 'studies', 'bench'],
  r'\bprint\(': ['logs', 'main', 'modes.configs'],
}

PACKAGE = ROOT / 'cmjax'
FILES = sorted(p for p in PACKAGE.rglob('*.py') if p.name != '__init__.py')


def name_of(path):
  return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)


def is_in(name, patterns):
  folder = name.rpartition('.')[0]
  return any(name == p or (folder and p == f'{folder}.*') for p in patterns)


def layer_of(name):
  return next(i for i, layer in enumerate(LAYERS) if is_in(name, layer))


def imports(path):
  """Every module a file imports, as dotted paths, wherever in the file."""
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: imports are absolute'
      within = (PACKAGE / f'{node.module.partition(".")[2]}').is_dir()
      within |= node.module == 'cmjax.configs'  # the folder `configs`
      if node.module == 'cmjax' or (node.module.startswith('cmjax.') and within):
        yield from (f'{node.module}.{alias.name}' for alias in node.names)
      else:
        yield node.module


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_imports_point_strictly_down(path):
  name = name_of(path)
  for module in imports(path):
    if not module.startswith('cmjax.'):
      continue
    if module.startswith('cmjax.configs.'):
      assert name == 'config', f'{name} imports {module}'
      continue
    other = module.removeprefix('cmjax.')
    if other not in SHARED_IN_FOLDER or name in SHARED_IN_FOLDER:
      assert layer_of(other) < layer_of(name), f'{name} imports {other}'


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_foreign_libraries_come_through_their_doors(path):
  free = {'jax', 'numpy', 'cmjax', *sys.stdlib_module_names}
  for library in {module.partition('.')[0] for module in imports(path)} - free:
    assert library in DOORS, f'{library} has no door'
    assert is_in(name_of(path), DOORS[library]), f'{library} in {name_of(path)}'


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_no_word_that_rots_or_hides_faults(path):
  text = path.read_text(encoding='utf-8')
  for word, allowed in BANNED.items():
    if not is_in(name_of(path), allowed):
      assert not re.search(word, text), f'{word} in {name_of(path)}'


def test_every_file_has_a_layer_and_every_layer_a_file():
  names = {name_of(path) for path in FILES}
  for name in names:
    layer_of(name)  # StopIteration where there is none
  for pattern in (p for layer in LAYERS for p in layer):
    assert any(is_in(name, [pattern]) for name in names), pattern


def test_no_folder_inside_a_folder_and_a_folder_s_init_stays_empty():
  for path in PACKAGE.rglob('*.py'):
    assert len(path.relative_to(PACKAGE).parts) <= 2
    if path.name == '__init__.py' and path.parent != PACKAGE:
      assert not path.read_text(encoding='utf-8').strip(), path


@pytest.mark.parametrize(
  'path',
  [p for p in sorted((ROOT / 'configs').glob('[a-z]*.py'))],
  ids=lambda p: p.stem,
)
def test_a_config_imports_parts_and_at_most_one_other_config(path):
  modules = set(imports(path))
  siblings = {name for name in modules if name.startswith('cmjax.configs.')}
  allowed = {'ml_collections', 'cmjax.core'} if path.stem == 'parts' else set()
  assert modules - siblings <= allowed
  assert len(siblings - {'cmjax.configs.parts'}) <= 1


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_every_part_is_built_as_a_kind(path):
  """Without one, a config of a stranger's could not name what it needs there."""
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Call) and ast.unparse(node.func) in (
      'build.build',
      'build.build_each',
    ):
      assert len(node.args) == 3, f'{name_of(path)}:{node.lineno}'


def test_top_level_holds_only_what_was_decided():
  allowed = {
    'README.md', 'LICENSE', 'setup.cfg', 'pyproject.toml',
    'cmjax', 'configs', 'launch', 'tests', 'colabs', 'runs',
  }  # fmt: skip
  there = {p.name for p in ROOT.iterdir() if not p.name.startswith('.')}
  assert {n for n in there if not n.endswith('.egg-info')} <= allowed
