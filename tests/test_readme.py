"""The READMEs: links, commands, names, the drawing and the example of an objective."""

import configparser
import functools
import importlib
import importlib.util
import re
import shlex
import sys

import pytest

import cmjax
from cmjax import contracts, main
from cmjax.configs import parts
from cmjax.runtime.config import overridden, read, shipped
from cmjax.runtime.flags import parsed
from tests.conftest import ROOT

TOP = ROOT / 'README.md'
READMES = [TOP, ROOT / 'cmjax' / 'CHANGELOG.md']
READMES += sorted(ROOT.glob('[a-z]*/README.md'))
READMES += sorted(ROOT.glob('cmjax/[a-z]*/README.md'))
READMES = [path for path in READMES if path.parent != ROOT / 'cmjax' / 'configs']
each_readme = pytest.mark.parametrize(
  'path', READMES, ids=lambda path: str(path.relative_to(ROOT))
)


def text_of(path):
  return path.read_text(encoding='utf-8')


def blocks(path, language):
  """The fenced blocks of a language."""
  return re.findall(rf'^```{language}\n(.*?)^```', text_of(path), re.S | re.M)


def commands(path):
  """The words of every `cmjax` command in a fenced block, without placeholders."""
  for block in blocks(path, ''):
    for line in block.replace('\\\n', ' ').splitlines():
      if line.startswith('cmjax ') and '...' not in line:
        yield shlex.split(line, comments=True)[1:]


def launch_script(name):
  """A script of launch/, as a module."""
  spec = importlib.util.spec_from_file_location(name, ROOT / 'launch' / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def anchor(heading):
  """The anchor of a heading, as GitHub makes it."""
  return re.sub(r'[^\w -]', '', heading.strip().lower()).replace(' ', '-')


@each_readme
def test_links_lead_somewhere(path):
  for link in re.findall(r'\]\(([^)]+)\)', text_of(path), re.S):
    if re.match(r'https?:', link):
      continue
    file, _, fragment = link.replace('\n', ' ').partition('#')
    target = (path.parent / file).resolve() if file else path
    assert target.exists(), link
    if fragment:
      anchors = map(anchor, re.findall(r'^#+ (.*)$', text_of(target), re.M))
      assert fragment in anchors, link


@each_readme
def test_commands_have_known_flags_configs_and_keys(path):
  for words in commands(path):
    flags = parsed(words)
    name = flags.config.partition(':')[0]
    if flags.config and not name.endswith('.py'):
      overridden(read(flags.config), flags.overrides)


@each_readme
def test_functions_that_are_named_exist(path):
  text = text_of(path)
  if path.name == 'CHANGELOG.md':  # has a table of old names, and older entries
    text = ''
  for module, name in re.findall(r'\b(cmjax(?:\.\w+)+):(\w+)', text):
    assert hasattr(importlib.import_module(module), name), f'{module}:{name}'


@each_readme
def test_python_blocks_compile_and_their_imports_work(path):
  for block in blocks(path, 'python'):
    compile(block, str(path), 'exec')
    for line in re.findall(r'^(?:from|import) .*$', block, re.M):
      exec(line, {})


def test_the_top_readme_is_short():
  assert len(text_of(TOP).splitlines()) <= 180


def test_the_drawing_is_that_of_the_imports():
  floors = launch_script('floors')
  text = text_of(ROOT / 'cmjax' / 'README.md')
  assert floors.placed(text, floors.current()) == text, (
    'cmjax/README.md: run launch/floors.py --write'
  )


def test_the_table_of_objectives_has_every_config():
  table = text_of(TOP).partition('## Objectives')[2].partition('## Results')[0]
  names = {name for row in table.splitlines() for name in re.findall(r'`(\w+)`', row)}
  assert set(shipped()) <= names
  for name in re.findall(r'`(\w+\.py)` \|$', table, re.M):
    assert (ROOT / 'cmjax' / 'objectives' / name).exists()


def test_the_table_of_keys_has_every_key():
  text = text_of(ROOT / 'configs' / 'README.md')
  rows = re.findall(r'^\| (`.*?) \|', text.partition('## Data')[0], re.M)
  assert set(re.findall(r'`(\w+)`', ' '.join(rows))) == set(parts.base())


@pytest.fixture
def example(tmp_path, monkeypatch):
  """A folder with the objective and the config of the top README."""
  losses, mine = (b for b in blocks(TOP, 'python') if 'def plain' in b or 'edm' in b)
  (tmp_path / 'mylab').mkdir()
  (tmp_path / 'mylab' / 'losses.py').write_text(losses)
  (tmp_path / 'my_config.py').write_text(mine)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  yield tmp_path
  for name in ('mylab.losses', 'mylab'):
    sys.modules.pop(name, None)


def test_the_objective_of_the_readme_trains(example):
  steps = [f'--config.total_images={2 * 128}', '--config.network.width=16']
  quiet = ['--config.every.picture_steps=0', '--config.every.log_steps=1']
  code = main.main(['--config=my_config.py', '--workdir=run', *steps, *quiet])
  assert code == 0
  assert len(text_of(example / 'run' / 'metrics.jsonl').splitlines()) >= 2


def test_the_objective_of_the_readme_passes_its_check(example, monkeypatch):
  monkeypatch.syspath_prepend(str(example))
  plain = importlib.import_module('mylab.losses').plain
  check = next(b for b in blocks(TOP, 'python') if b.startswith('contracts.'))
  exec(check, {'contracts': contracts, 'plain': plain})
  with pytest.raises(contracts.ContractError, match='return LossOut'):
    exec(check, {'contracts': contracts, 'plain': lambda f, sigma: lambda *rest: None})


def test_the_citation_has_the_version_of_the_package():
  text = text_of(ROOT / 'CITATION.cff')
  fields = dict(re.findall(r'^([\w-]+): (.+)$', text, re.M))
  assert fields['cff-version'] == '1.2.0'
  assert {'message', 'title', 'type'} <= fields.keys()
  assert fields['version'] == cmjax.__version__
  assert fields['license'] == 'Apache-2.0'


@functools.cache
def setup():
  """setup.cfg."""
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  return parser


def test_every_room_is_installed():
  rooms = {path.parent.name for path in (ROOT / 'cmjax').glob('*/__init__.py')}
  installed = setup()['options']['packages'].split()
  assert set(installed) == {'cmjax', *(f'cmjax.{room}' for room in rooms | {'configs'})}


def test_lower_bounds_are_constraints():
  pins = launch_script('lower_bounds').pins(text_of(ROOT / 'setup.cfg'))
  assert len(pins) == len(setup()['options']['install_requires'].split())
  assert all(re.fullmatch(r'[\w-]+==[\d.]+', pin) for pin in pins)
