"""The flags of XLA, which reads them once, when jax makes its first backend.

The standard library alone: this runs before jax is imported.
"""

import importlib.metadata
import os

# Convolutions by Eigen, as in other versions of jaxlib: by YNNPACK, the default of
# jaxlib 0.10, those of a U-Net take up to 1.5 times as long. XLA ends the process for a
# flag that it does not know; every release of 0.10 knows this one.
_FLAG = '--xla_cpu_experimental_ynn_fusion_type'
_VALUE = '-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION'


def fast_convolutions() -> None:
  """Sets in `XLA_FLAGS` what makes convolutions fast on a CPU under jaxlib 0.10.

  A setting of that flag by the user stays, and so do all other flags. Child processes
  inherit the variable.
  """
  flags = os.environ.get('XLA_FLAGS', '').strip()
  in_file = flags and not flags.startswith('--')  # the name of a file of flags
  if not in_file and _FLAG not in flags and _jaxlib().startswith('0.10.'):
    os.environ['XLA_FLAGS'] = f'{flags} {_FLAG}={_VALUE}'.strip()


def _jaxlib() -> str:
  try:
    return importlib.metadata.version('jaxlib')
  except importlib.metadata.PackageNotFoundError:
    return ''
