"""What `import cmjax` offers, and what it does not load."""

import importlib
import pydoc
import re
import subprocess
import sys

import pytest

import cmjax
from tests.conftest import ROOT

SLOW = ('tensorflow_datasets', 'sklearn', 'matplotlib', 'orbax', 'flax', 'tensorboardX')
OFFERED = [name for name in dir(cmjax) if not name.startswith('_')]
LAZY = sorted({*cmjax._FROM_RUNTIME, *cmjax._MODULES})


def loaded_by(code):
  script = f'import sys\n{code}\nprint(*{{m.partition(".")[0] for m in sys.modules}})'
  command = [sys.executable, '-c', script]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
  return set(done.stdout.split())


def test_importing_the_package_loads_no_library():
  assert not loaded_by('import cmjax; dir(cmjax)') & {*SLOW, 'jax', 'numpy', 'optax'}


def test_slow_libraries_are_loaded_by_their_use_alone():
  code = (
    'import cmjax; cmjax.samplers, cmjax.pictures, cmjax.oracles, cmjax.times;'
    "cmjax.config.load('ect:cifar10')"
  )
  assert not loaded_by(code) & {*SLOW}


@pytest.mark.parametrize('name', LAZY)
def test_a_name_is_the_module_of_that_name(name):
  module = getattr(cmjax, name)
  assert module.__name__.rpartition('.')[2] == name
  assert importlib.import_module(module.__name__) is module
  assert name in dir(cmjax)


def test_other_names_raise():
  with pytest.raises(AttributeError, match='sampler'):
    cmjax.sampler  # noqa: B018
  with pytest.raises(ImportError):
    from cmjax import sampler  # noqa: F401


def test_help_is_a_map_of_every_name():
  text = pydoc.plain(pydoc.render_doc(cmjax))
  words = set(re.findall(r'\w+', text.partition('PACKAGE CONTENTS')[0]))
  assert {*LAZY} <= words
  for function in re.findall(r'  (\w+\.\w+)\(', cmjax.__doc__):
    module, name = function.split('.')
    assert callable(getattr(getattr(cmjax, module), name)), function
