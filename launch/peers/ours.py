"""Our side of `bench_peers`: what `cmjax --mode=train` does, and one-step sampling."""

import itertools
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cmjax import bench, evaluate, samplers, sharding, train
from cmjax import config as configs
from cmjax import run as runs

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
NETWORKS = {
  'ect': {},
  # What jcm was published with, where our CT config has DDPM++.
  'jcm': {'embedding': 'fourier', 'residual_input': True, 'taps': (1, 3, 3, 1)},
}


def build(task: dict[str, Any]) -> dict[str, Any]:
  """What can be timed: each takes a number of calls and returns when they are done."""
  run = runs.prepare(_config(task), sharding.data_mesh(jax.devices()[:1]))
  stepper = bench.Stepper(run, train.compiled_step(run), train.first_state(run))
  sampler, at = samplers.one_step(), itertools.count()

  def steps(calls):
    stepper.loop(calls, lambda _: train.batch(run, next(at)))

  def sample(calls):
    params = train.weights(stepper.state, 'slow')
    evaluate.draw(run, params, sampler, samples=calls * task['batch'], seed=1)

  device = jax.devices()[0]
  return {
    'versions': {'jax': jax.__version__},
    'xla_flags': os.environ.get('XLA_FLAGS', ''),  # with those of cmjax's own
    'platform': device.platform,
    'device': '' if device.platform == 'cpu' else device.device_kind,
    'parameters': sum(a.size for a in jax.tree.leaves(stepper.state.params)),
    'train': steps,
    'sample': sample,
  }


def _config(task):
  name = {'ect': 'ect', 'jcm': 'ct'}[task['peer']]
  c = configs.load(CONFIGS / f'{name}.py:cifar10')
  c.network = configs.ConfigDict(
    dict(c.network)
    | {key: task[key] for key in ('channels', 'blocks')}
    | {'dtype': task['precision']}
    | NETWORKS[task['peer']]
  )
  c.batch_size = c.evaluation.batch_size = task['batch']
  c.init_from = ''
  path = Path(task['folder']) / 'images.npz'
  images = np.random.default_rng(0).integers(0, 256, (4096, 32, 32, 3), np.uint8)
  np.savez(path, images=images)
  c.data = configs.ConfigDict(
    {'fn': 'cmjax.data:array', 'path': str(path), 'conditional': False}
  )
  return c
