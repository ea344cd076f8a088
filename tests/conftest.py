"""Strict mode: eight devices, no silent broadcasting, no key used twice."""

import atexit
import gc
import os
from pathlib import Path
import shutil
import signal
import tempfile

# Before jax is imported: a test of sharding needs devices to shard over, and tests
# compile far more than they compute, with a process on each core.
os.environ['XLA_FLAGS'] = ' '.join(
  (
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    '--xla_cpu_parallel_codegen_split_count=1',
    '--xla_cpu_multi_thread_eigen=false',
  )
)
os.environ['JAX_PLATFORMS'] = 'cpu'
# Not the folders of the user: those of compiled programs, which all processes of the
# tests share, and of decoded data.
if 'CMJAX_TESTS' not in os.environ:
  os.environ['CMJAX_TESTS'] = tempfile.mkdtemp(prefix='cmjax_tests_')
  atexit.register(shutil.rmtree, os.environ['CMJAX_TESTS'], ignore_errors=True)
os.environ['JAX_COMPILATION_CACHE_DIR'] = f'{os.environ["CMJAX_TESTS"]}/compiled'
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
os.environ['CMJAX_CACHE_DIR'] = f'{os.environ["CMJAX_TESTS"]}/cache'

import jax
import pytest

from cmjax.runtime import sharding

signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup ignores it
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)

ROOT = Path(__file__).resolve().parent.parent

# Left out by launch/test.sh --fast: whole processes, large networks, the TPU compiler.
SLOW = (
  'test_bucket.py',
  *('test_compile.py', 'test_bench_peers.py', 'test_checkpoint.py', 'test_colabs.py'),
  'test_configs.py',
  *('test_continuous.py', 'test_contracts.py', 'test_fuzz_configs.py'),
  *('test_classifier.py', 'test_edit_mode.py', 'test_editing.py', 'test_likelihood.py'),
  'test_search_mode.py',
  *('test_hostile_files.py', 'test_main.py', 'test_names.py', 'test_perceptual.py'),
  *(
    'test_snapshots.py',
    'test_stalls.py',
    'test_pod.py',
    'test_report.py',
    'test_studies.py',
    'test_tpu_pod.py',
    'test_train.py',
    'test_trust.py',
    'test_watchdog.py',
  ),
)


def pytest_collection_modifyitems(items):
  """Marks the slow tests."""
  for item in items:
    if item.nodeid.rpartition('tests/')[2].startswith(SLOW):
      item.add_marker('slow')


@pytest.fixture(scope='module', autouse=True)
def young_heap():
  """Excludes what earlier modules compiled from garbage collection."""
  gc.collect()
  gc.freeze()


@pytest.fixture
def x64():
  """Float64, for mathematics that is checked to more digits than float32 has."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='session')
def one_device():
  """A mesh of one device."""
  return sharding.data_mesh(jax.devices()[:1])


@pytest.fixture(scope='session')
def root() -> Path:
  """The checkout."""
  return ROOT
