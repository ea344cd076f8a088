"""Our side of `bench_peers`: what `cmjax --mode=train` does, and one-step sampling."""

import collections
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cmjax import config as configs
from cmjax import run as runs
from cmjax import samplers, sharding, train

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
NETWORKS = {
  'ect': {},
  # What jcm was published with, where our CT config has DDPM++.
  'jcm': {'embedding': 'fourier', 'residual_input': True, 'taps': (1, 3, 3, 1)},
}


def build(task: dict[str, Any]) -> dict[str, Any]:
  """What can be timed: each takes a number of calls and returns when they are done."""
  run = runs.prepare(_config(task), sharding.data_mesh(jax.devices()[:1]))
  state, at = train.first_state(run), itertools.count()
  step_fn = train.compiled_step(run)
  draw, root = samplers.one_step(), jax.random.key(1)

  def steps(calls):
    nonlocal state
    ahead = collections.deque()
    for _ in range(calls):
      state, metrics = step_fn(state, run.frozen, train.batch(run, next(at)))
      ahead.append(metrics)
      if len(ahead) > train.AHEAD:
        jax.block_until_ready(ahead.popleft())
    jax.block_until_ready((state, ahead))

  @jax.jit
  def drawn(params, first):
    rows = jax.numpy.arange(task['batch'], dtype='uint32') + first
    keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(rows)
    return draw(run.f, params, keys, None, run.source.shape).x

  def sample(calls):
    params = train.weights(state, 'slow')
    for i in range(calls):
      x = drawn(params, np.uint32(i * task['batch']))
    x.block_until_ready()

  device = jax.devices()[0]
  return {
    'versions': {'jax': jax.__version__},
    'platform': device.platform,
    'device': '' if device.platform == 'cpu' else device.device_kind,
    'parameters': sum(a.size for a in jax.tree.leaves(state.params)),
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
  c.batch_size, c.init_from = task['batch'], ''
  path = Path(task['folder']) / 'images.npz'
  images = np.random.default_rng(0).integers(0, 256, (4096, 32, 32, 3), np.uint8)
  np.savez(path, images=images)
  c.data = configs.ConfigDict(
    {'fn': 'cmjax.data:array', 'path': str(path), 'conditional': False}
  )
  return c
