"""Executes the notebooks of colabs/, each in a kernel and a folder of its own.

Usage: python launch/notebooks.py [--short] [--html=FOLDER] [--pictures] [NAME ...]
       python launch/notebooks.py --strip     (before a commit)

The kernel is that of the Python that runs this script, with this checkout; `pip install
-e '.[test]'` installs what it needs. Results and caches go into a temporary folder.
"""

import argparse
import base64
from collections.abc import Mapping, Sequence
import io
import os
from pathlib import Path
import re
import sys
import tempfile
import time

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
import nbclient
from nbclient.exceptions import CellExecutionError
import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / 'colabs'
LONG, SHORT = 'SHORT = False', 'SHORT = True'
CELL_TIMEOUT_S = 1200
MAX_PICTURE_BYTES = 150_000
# Short cells compile much more than they compute.
QUICK = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'

# --strip writes it into every notebook, so that it is changed in this one place.
FIRST_CELL = """\
SHORT = False  # True: a few steps of everything, to try the code

import importlib.util, pathlib, subprocess, sys

if importlib.util.find_spec('cmjax') is None:
  checkout = pathlib.Path('../setup.cfg').exists()
  source = '..' if checkout else 'git+https://github.com/cmjax/cmjax'
  print('installing cmjax ...')
  install = [sys.executable, '-m', 'pip', 'install', '-q', source]
  if subprocess.run(install, capture_output=True).returncode:
    raise SystemExit(
      'cmjax is missing and could not be installed; '
      'in a checkout, run: pip install -e .'
    )

import jax
import cmjax

device = jax.devices()[0]
print(
  f'cmjax {cmjax.__version__}, jax {jax.__version__}, '
  f'{jax.device_count()} x {device.device_kind} ({device.platform})'
)"""


class NotebookError(Exception):
  """A cell that failed: its number, id and traceback, and the notebook so far."""

  def __init__(self, text: str, notebook: nbformat.NotebookNode | None = None):
    super().__init__(text)
    self.notebook = notebook


class _ThisPython(KernelSpecManager):
  """The kernel of the running Python, whichever kernels are installed."""

  def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
    argv = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    return KernelSpec(argv=argv, display_name=kernel_name, language='python')


def paths(names: Sequence[str] = ()) -> list[Path]:
  """The notebooks of these names, or all."""
  found = {path.stem: path for path in sorted(FOLDER.glob('*.ipynb'))}
  wanted = [Path(name).stem for name in names] or list(found)
  for name in wanted:
    if name not in found:
      raise SystemExit(f'{name}: no such notebook; there are {", ".join(found)}')
  return [found[name] for name in wanted]


def read(path: Path) -> nbformat.NotebookNode:
  """A notebook."""
  return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
  """The cells of code."""
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def execute(
  path: Path, *, short: bool = False, environment: Mapping[str, str] | None = None
) -> nbformat.NotebookNode:
  """The notebook with its outputs.

  Args:
    path: the file, which is not changed.
    short: with SHORT = True in its first cell; XLA_FLAGS are then those that compile
      quickly.
    environment: variables of the kernel that differ from those of this process.

  Raises:
    NotebookError: a cell raised an exception; `notebook` has the outputs so far.
  """
  notebook = read(path)
  if short:
    first = code_cells(notebook)[0]
    if not first.source.startswith(LONG):
      raise NotebookError(f'{path.name}: its first cell must start with {LONG}')
    first.source = first.source.replace(LONG, SHORT, 1)
  with tempfile.TemporaryDirectory(prefix='notebook_') as folder:
    env = {**_environment(folder), **({'XLA_FLAGS': QUICK} if short else {})}
    env |= environment or {}
    (Path(folder) / 'work').mkdir()
    client = nbclient.NotebookClient(
      notebook,
      timeout=CELL_TIMEOUT_S,
      km=AsyncKernelManager(kernel_spec_manager=_ThisPython()),
      resources={'metadata': {'path': str(Path(folder) / 'work')}},
    )
    # Its warnings are not of the notebook, whose outputs have what cells write there.
    with (Path(folder) / 'kernel.log').open('w+', encoding='utf-8') as log:
      try:
        client.execute(env=env, stderr=log)
      except Exception as e:  # of the cell, or a kernel that died or took too long
        log.seek(0)
        raise _described(e, path, notebook, log.read()) from None
  return notebook


def _environment(folder: str) -> dict[str, str]:
  """Variables of the kernel: this checkout, any device, no folder of the user."""
  env = {key: value for key, value in os.environ.items() if key != 'JAX_PLATFORMS'}
  env.setdefault('CMJAX_CACHE_DIR', str(Path(folder) / 'cache'))
  env['IPYTHONDIR'] = str(Path(folder) / 'ipython')
  env['PYTHONPATH'] = os.pathsep.join(filter(None, (str(ROOT), env.get('PYTHONPATH'))))
  env.pop('MPLBACKEND', None)  # the kernel's own draws into the notebook
  return env


def _described(
  error: Exception, path: Path, notebook: nbformat.NotebookNode, log: str
) -> NotebookError:
  """The error of a cell, with where it is; of a dead kernel, what it wrote last."""
  place, trace = path.name, f'{type(error).__name__}: {error}\n{log[-2000:]}'
  for number, cell in enumerate(notebook.cells, 1):
    for output in cell.get('outputs', ()):
      if output.output_type == 'error' and isinstance(error, CellExecutionError):
        place = f'{path.name}, cell {number} (id {cell.id})'
        trace = '\n'.join(output.traceback) or f'{output.ename}: {output.evalue}'
  return NotebookError(f'{place}:\n' + re.sub(r'\x1b\[[\d;]*m', '', trace), notebook)


def stripped(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
  """The notebook as it is committed: no outputs, and the shared first cell."""
  notebook.metadata = nbformat.from_dict(
    {
      'kernelspec': {
        'display_name': 'Python 3',
        'language': 'python',
        'name': 'python3',
      },
      'language_info': {'name': 'python'},
    }
  )
  code_cells(notebook)[0].source = FIRST_CELL
  for cell in notebook.cells:
    kept = {'tags': cell.metadata['tags']} if cell.metadata.get('tags') else {}
    cell.metadata = nbformat.from_dict(kept)
    if cell.cell_type == 'code':
      cell.outputs, cell.execution_count = [], None
  return notebook


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
  """A file, as Jupyter writes it."""
  path.write_text(nbformat.writes(notebook) + '\n', encoding='utf-8')


def picture(notebook: nbformat.NotebookNode) -> bytes:
  """The last image of the cell tagged `picture`, as a PNG of at most 150 kB."""
  (cell,) = (c for c in notebook.cells if 'picture' in c.metadata.get('tags', ()))
  images = [
    output.data['image/png']
    for output in cell.outputs
    if 'image/png' in output.get('data', ())
  ]
  if not images:
    raise NotebookError('its cell tagged `picture` has shown no image')
  image = Image.open(io.BytesIO(base64.b64decode(images[-1])))
  flat = Image.new('RGB', image.size, 'white')
  flat.paste(image, mask=image.convert('RGBA').getchannel('A'))
  for colours in (256, 64, 16):
    buffer = io.BytesIO()
    flat.quantize(colours).save(buffer, 'PNG', optimize=True)
    if buffer.tell() <= MAX_PICTURE_BYTES:
      return buffer.getvalue()
  raise NotebookError(f'its picture of {image.size} takes over {MAX_PICTURE_BYTES} B')


def write_page(notebook: nbformat.NotebookNode, path: Path) -> None:
  """An HTML page."""
  from nbconvert import HTMLExporter  # not among the requirements of the tests

  body, _ = HTMLExporter().from_notebook_node(notebook)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(body, encoding='utf-8')


def main(arguments: Sequence[str] | None = None) -> int:
  """Executes or strips; the exit code is 1 if a notebook has failed."""
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('names', nargs='*', metavar='NAME', help='default: all')
  flags.add_argument('--short', action='store_true', help='a few steps of everything')
  flags.add_argument('--html', type=Path, metavar='FOLDER', help='a page of each')
  flags.add_argument('--pictures', action='store_true', help='write colabs/NAME.png')
  flags.add_argument('--strip', action='store_true', help='remove outputs; do not run')
  chosen = flags.parse_args(arguments)
  if chosen.strip:
    for path in paths(chosen.names):
      write(stripped(read(path)), path)
    return 0
  if chosen.html:
    try:
      import nbconvert  # noqa: F401  before the notebooks take minutes
    except ImportError:
      print('--html needs nbconvert: pip install nbconvert', file=sys.stderr)
      return 2
  failed = False
  for path in paths(chosen.names):
    begun = time.monotonic()
    notebook = None
    try:
      notebook = execute(path, short=chosen.short)
      outcome = f'{time.monotonic() - begun:.0f} s'
      if chosen.pictures:
        path.with_suffix('.png').write_bytes(picture(notebook))
    except NotebookError as e:
      failed, outcome, notebook = True, f'failed\n{e}', notebook or e.notebook
    print(f'{path.stem}: {outcome}', flush=True)
    if chosen.html and notebook is not None:
      write_page(notebook, chosen.html / f'{path.stem}.html')
  return int(failed)


if __name__ == '__main__':
  sys.exit(main())
