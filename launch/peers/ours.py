"""The cmjax side of `bench_peers`: a step of `--mode=train`, one-step sampling."""

import itertools
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cmjax import samplers, sampling, train
from cmjax.modes import bench
from cmjax.runtime import batches, sharding
from cmjax.runtime.config import read
from cmjax.runtime.config_record import ConfigDict
from cmjax.runtime.run import prepare
from cmjax.runtime.state import first_state, weights

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'


def build(task: dict[str, Any]) -> dict[str, Any]:
  """The functions to time, which run a number of calls and wait, and facts."""
  run = prepare(_config(task), sharding.data_mesh(jax.devices()[:1]))
  stepper = bench.Stepper(run, train.compiled_step(run), first_state(run))
  sampler, step = samplers.one_step(), itertools.count()

  def steps(calls):
    stepper.loop(calls, lambda _: batches.batch(run, next(step)))

  def sample(calls):
    params = weights(stepper.state, 'slow')
    sampling.draw(run, params, sampler, num_samples=calls * task['batch'], seed=1)

  device = jax.devices()[0]
  return {
    'versions': {'jax': jax.__version__},
    'xla_flags': os.environ.get('XLA_FLAGS', ''),  # including those that cmjax sets
    'platform': device.platform,
    'device': '' if device.platform == 'cpu' else device.device_kind,
    'parameters': sum(a.size for a in jax.tree.leaves(stepper.state.params)),
    'train': steps,
    'sample': sample,
  }


def _config(task: dict[str, Any]) -> ConfigDict:
  name = {'ect': 'ect', 'jcm': 'ct'}[task['peer']]
  c = read(CONFIGS / f'{name}.py:cifar10')
  c.network = ConfigDict(
    dict(c.network)
    | {key: task[key] for key in ('channels', 'num_blocks')}
    | {'dtype': task['precision']}
  )
  c.batch_size = c.evaluation.batch_size = task['batch']
  c.init_from = ''
  path = Path(task['folder']) / 'images.npz'
  images = np.random.default_rng(0).integers(0, 256, (4096, 32, 32, 3), np.uint8)
  np.savez(path, images=images)
  c.data = ConfigDict(
    {'fn': 'cmjax.data.files:from_path', 'path': str(path), 'conditional': False}
  )
  return c
