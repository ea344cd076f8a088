"""The flags of XLA, set before jax is imported and after it."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from cmjax.runtime import startup
from tests.conftest import ROOT

FAST = (
  '--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION'
)
OTHER = '--xla_force_host_platform_device_count=3'
OWN = '--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_REDUCE'
JAXLIB = importlib.metadata.version('jaxlib')


def run_alone(code, flags):
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': flags},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


@pytest.mark.parametrize('version', ['0.10.0', '0.10.2', '0.10.3.dev20260101'])
@pytest.mark.parametrize('flags', ['', OTHER, f' {OTHER} '])
def test_jaxlib_0_10_gets_the_flag_beside_those_that_are_set(
  version, flags, monkeypatch
):
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: version)
  monkeypatch.setenv('XLA_FLAGS', flags)
  startup.fast_convolutions()
  startup.fast_convolutions()
  assert os.environ['XLA_FLAGS'].split() == [*flags.split(), FAST]


@pytest.mark.parametrize(
  ('version', 'flags'),
  [
    ('0.9.2', OTHER),
    ('0.11.0', OTHER),
    ('0.12.0.1', OTHER),
    ('1.0.10.1', OTHER),
    ('0.10.2', OWN),
    ('0.10.2', f'{OTHER} {OWN}'),
    ('0.10.2', '/etc/xla_flags'),  # a file of flags: XLA takes the whole as its name
  ],
)
def test_other_versions_and_what_the_user_set_stay(version, flags, monkeypatch):
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: version)
  monkeypatch.setenv('XLA_FLAGS', flags)
  startup.fast_convolutions()
  assert os.environ['XLA_FLAGS'] == flags


def test_the_module_imports_no_jax():
  code = 'import sys; from cmjax.runtime import startup; startup.fast_convolutions(); '
  assert run_alone(code + 'print("jax" in sys.modules)', '') == 'False'


@pytest.mark.skipif(not JAXLIB.startswith('0.10.'), reason='is for jaxlib 0.10 alone')
@pytest.mark.parametrize(
  ('imports', 'by_ynnpack'),
  [
    # The default, for which there is the flag.
    (f'import os, cmjax, jax; os.environ["XLA_FLAGS"] = {OTHER!r}', True),
    ('import cmjax, jax', False),
    ('import jax, cmjax', False),
  ],
)
def test_xla_reads_the_flag_with_the_first_backend(imports, by_ynnpack):
  code = f"""
{imports}
x, w = jax.numpy.ones((32, 32, 32, 64)), jax.numpy.ones((3, 3, 64, 64))
orders = ('NHWC', 'HWIO', 'NHWC')
convolve = lambda x, w: jax.lax.conv_general_dilated(
  x, w, (1, 1), 'SAME', dimension_numbers=orders
)
text = jax.jit(convolve).lower(x, w).compile().as_text()
print(jax.device_count(), '__ynn_fusion' in text)
"""
  assert run_alone(code, OTHER) == f'3 {by_ynnpack}'
