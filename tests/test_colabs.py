"""The notebooks: each runs in the short setting, and is committed without outputs."""

import ast
import base64
import configparser
import io
import os
import re
import subprocess
import sys

import nbformat
import numpy as np
from PIL import Image
import pytest

from tests.conftest import ROOT
from tests.test_readme import launch_script

notebooks = launch_script('notebooks')
PATHS = notebooks.paths()
README = ROOT / 'colabs' / 'README.md'
each = pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)


def repository():
  """The address of the repository, in setup.cfg."""
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  return parser['metadata']['url']


def a_notebook(tmp_path, *sources):
  cells = [nbformat.v4.new_code_cell(source) for source in sources]
  path = tmp_path / 'a.ipynb'
  notebooks.write(nbformat.v4.new_notebook(cells=cells), path)
  return path


@each
def test_notebook_runs_in_the_short_setting(path):
  notebook = notebooks.execute(path, short=True)
  assert any(cell.outputs for cell in notebooks.code_cells(notebook))
  assert notebooks.picture(notebook).startswith(b'\x89PNG')


@each
def test_notebook_is_committed_stripped(path):
  text = path.read_text(encoding='utf-8')
  notebook = notebooks.read(path)
  nbformat.validate(notebook)
  assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
  assert nbformat.writes(notebooks.stripped(notebook)) + '\n' == text, (
    'run python launch/notebooks.py --strip'
  )


@each
def test_notebook_has_a_title_and_one_picture(path):
  notebook = notebooks.read(path)
  assert notebook.cells[0].cell_type == 'markdown'
  assert notebook.cells[0].source.startswith('# ')
  tags = [tag for cell in notebook.cells for tag in cell.metadata.get('tags', ())]
  assert tags == ['picture']


@each
def test_cells_are_short_lines_of_public_names(path):
  for cell in notebooks.code_cells(notebooks.read(path)):
    assert max(map(len, cell.source.splitlines())) <= 88, cell.id
    for node in ast.walk(ast.parse(cell.source)):
      names = [getattr(node, 'attr', ''), getattr(node, 'module', '') or '']
      names += [a.name for a in getattr(node, 'names', ()) if isinstance(a, ast.alias)]
      # `_replace` is the documented method of a NamedTuple.
      private = [n for n in names if re.search(r'(^|\.)_(?!_|replace$)', str(n))]
      assert not private, (cell.id, private)


def test_first_cells_install_from_the_repository():
  assert repository() in notebooks.FIRST_CELL
  citation = (ROOT / 'CITATION.cff').read_text(encoding='utf-8')
  assert f'repository-code: {repository()}\n' in citation


@each
def test_readme_has_a_row_with_badge_and_picture(path):
  colab = repository().replace('https://', 'https://colab.research.google.com/')
  colab = colab.replace('github.com', 'github')
  rows = [
    row
    for row in README.read_text(encoding='utf-8').splitlines()
    if f'({colab}/blob/main/colabs/{path.name})' in row
  ]
  assert len(rows) == 1
  assert 'https://colab.research.google.com/assets/colab-badge.svg' in rows[0]
  assert f'({path.stem}.png)' in rows[0]
  picture = path.with_suffix('.png').read_bytes()
  assert len(picture) <= notebooks.MAX_PICTURE_BYTES


def first_cell(tmp_path, pip):
  """Runs the first cell where cmjax is missing, with `pip` as the text of pip.

  -I and -S hide every installed package from the cell; its pip is found by PYTHONPATH.
  """
  (tmp_path / 'colabs').mkdir()
  (tmp_path / 'pip').mkdir()
  (tmp_path / 'pip' / '__init__.py').touch()  # else the installed one is preferred
  (tmp_path / 'pip' / '__main__.py').write_text(pip)
  (tmp_path / 'cell.py').write_text(notebooks.FIRST_CELL)
  return subprocess.run(
    [sys.executable, '-I', '-S', '../cell.py'],
    cwd=tmp_path / 'colabs',
    env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    capture_output=True,
    text=True,
    check=False,
  )


def test_first_cell_without_network_is_one_line(tmp_path):
  run = first_cell(tmp_path, 'raise SystemExit(1)')
  assert (run.returncode, run.stdout) == (1, 'installing cmjax ...\n')
  assert len(run.stderr.splitlines()) == 1
  assert 'pip install -e .' in run.stderr


@pytest.mark.parametrize('checkout', [True, False])
def test_first_cell_installs_from_a_checkout_or_the_repository(tmp_path, checkout):
  if checkout:
    (tmp_path / 'setup.cfg').touch()
  log = tmp_path / 'arguments'
  write = f'import sys; open({str(log)!r}, "w").write(" ".join(sys.argv[1:]))'
  run = first_cell(tmp_path, write)
  source = '..' if checkout else f'git+{repository()}'
  assert log.read_text() == f'install -q {source}'
  assert run.stdout == 'installing cmjax ...\n'
  assert "No module named 'jax'" in run.stderr  # the cell went on to its imports


def test_a_cell_that_fails_is_named_with_its_traceback(tmp_path, monkeypatch, capsys):
  path = a_notebook(tmp_path, 'SHORT = False\nx = 1', 'y = x / 0  # the culprit')
  monkeypatch.setattr(notebooks, 'FOLDER', tmp_path)
  assert notebooks.main(['--short', 'a']) == 1
  printed = capsys.readouterr().out
  identity = notebooks.read(path).cells[1].id
  assert f'a.ipynb, cell 2 (id {identity})' in printed
  assert 'the culprit' in printed
  assert 'ZeroDivisionError: division by zero' in printed
  with pytest.raises(SystemExit, match='b: no such notebook'):
    notebooks.main(['b'])


def test_a_kernel_that_dies_says_what_it_wrote_last(tmp_path):
  cell = 'SHORT = False\nimport os; os.write(2, b"the end"); os.kill(os.getpid(), 9)'
  with pytest.raises(notebooks.NotebookError, match=r'(?s)a\.ipynb:.*DeadKernel'):
    notebooks.execute(a_notebook(tmp_path, cell), short=True)


def test_the_kernel_is_this_python_in_an_empty_folder(tmp_path):
  cell = """\
SHORT = False
import os, sys
assert sys.executable == os.environ['EXPECTED'] and not os.listdir('.')
assert 'JAX_PLATFORMS' not in os.environ and os.environ['CMJAX_CACHE_DIR']
print(SHORT)"""
  path = a_notebook(tmp_path, cell)
  notebook = notebooks.execute(
    path, short=True, environment={'EXPECTED': sys.executable}
  )
  assert notebook.cells[0].outputs[0].text == 'True\n'


def test_stripping_keeps_only_text_and_tags():
  notebook = nbformat.v4.new_notebook(metadata={'widgets': {}})
  metadata = {'tags': ['picture'], 'collapsed': True}
  cell = nbformat.v4.new_code_cell('x', metadata=metadata)
  cell.outputs = [nbformat.v4.new_output('stream', text='seen')]
  cell.execution_count = 3
  notebook.cells = [nbformat.v4.new_code_cell('old'), cell]
  notebooks.stripped(notebook)
  assert notebook.cells[0].source == notebooks.FIRST_CELL
  assert (cell.metadata, cell.outputs) == ({'tags': ['picture']}, [])
  assert cell.execution_count is None
  assert set(notebook.metadata) == {'kernelspec', 'language_info'}


def test_a_picture_is_small_enough_for_a_repository():
  noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(noise).save(buffer, 'PNG')
  data = {'image/png': base64.b64encode(buffer.getvalue()).decode()}
  cell = nbformat.v4.new_code_cell('x', metadata={'tags': ['picture']})
  cell.outputs = [nbformat.v4.new_output('display_data', data)]
  png = notebooks.picture(nbformat.v4.new_notebook(cells=[cell]))
  assert len(png) <= notebooks.MAX_PICTURE_BYTES < len(buffer.getvalue())
