"""Sets XLA flags, which XLA reads once, when jax creates its first backend.

Imports the standard library only, as it runs before jax is imported.
"""

import importlib.metadata
import os

# Compiles convolutions with Eigen, as other versions of jaxlib do. With YNNPACK, the
# default of jaxlib 0.10, those of a U-Net take up to 1.5 times as long. XLA aborts on
# an unknown flag, but all releases of jaxlib 0.10 have this one.
_FLAG = '--xla_cpu_experimental_ynn_fusion_type'
_VALUE = '-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION'


def fast_convolutions() -> None:
  """Adds a flag to `XLA_FLAGS` that makes convolutions fast on a CPU with jaxlib 0.10.

  The user's flags are kept, including their own value of this one. Child processes
  inherit the variable.
  """
  flags = os.environ.get('XLA_FLAGS', '').strip()
  is_file = flags and not flags.startswith('--')  # XLA_FLAGS may name a file
  if not is_file and _FLAG not in flags and _jaxlib_version().startswith('0.10.'):
    os.environ['XLA_FLAGS'] = f'{flags} {_FLAG}={_VALUE}'.strip()


def _jaxlib_version() -> str:
  try:
    return importlib.metadata.version('jaxlib')
  except importlib.metadata.PackageNotFoundError:
    return ''
