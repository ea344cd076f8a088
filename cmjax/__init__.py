"""Consistency models in JAX.

To train and use a model (each name is imported when it is first used):

  config              config.load('ect:digits', batch_size=64): a config, checked
  run                 run.prepare(config): its network, objective, data and samplers
  train               train.steps(run): an iterator; train.train(run, folder): a run;
                      train.save(run, state, folder): so that it can be resumed
  pretrained          pretrained.load(path): the model of a run or of a released file
  reopen              reopen.reopen(path): a run with its data and samplers, to measure
  sampling            sampling.draw(...): any number of samples, on all devices
  samplers            few-step sampling; diffusion_samplers: EDM, DDIM, DPM-Solver++
  guidance            classifier-free guidance, autoguidance
  editing             zero-shot editing; inversion: noise of images, interpolation
  evaluation          evaluation.table(...): samplers by metrics, as --mode=evaluate
  search              for the best noise levels, by any measure
  pictures            pictures.show(x): samples or points, in a notebook
  contracts           contracts.check_objective(build): checks of one's own objective

What these are made of, pure functions of arrays:

  core                types: Batch, Loss, LossOut, Model, Network, Sampler parts
  process, precond    x_t from x0 and z; the denoiser D and the map f from a network
  times, schedules    draws of t and r; functions of the step
  fields, solvers     dx/dt; one step from t to r
  distances, weightings
  oracles             exact denoisers and consistency maps of known data
  objectives          consistency, continuous, denoise, flow_map, progressive, trigflow
  networks            mlp, songunet, adm, edm2

The command line is `cmjax --help`.
"""

import importlib
from typing import Any

from cmjax.runtime import startup

__version__ = '0.3.0.dev0'

# Names of the README that are not modules of this folder.
_FROM_RUNTIME = ('config', 'pretrained', 'reopen', 'run')
_MODULES = (
  *('contracts', 'core', 'diffusion_samplers', 'distances', 'editing', 'evaluation'),
  *('fields', 'guidance', 'inversion', 'oracles', 'pictures', 'precond', 'process'),
  *('samplers', 'sampling', 'schedules', 'search', 'solvers', 'times', 'train'),
  'weightings',
)

startup.fast_convolutions()


def __getattr__(name: str) -> Any:
  """Imports a module at its first use (PEP 562), so that `import cmjax` is fast."""
  if name in _FROM_RUNTIME:
    return importlib.import_module(f'cmjax.runtime.{name}')
  if name in _MODULES:
    return importlib.import_module(f'cmjax.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted({*globals(), *_FROM_RUNTIME, *_MODULES})
