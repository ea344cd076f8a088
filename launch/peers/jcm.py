"""The openai/consistency_models_cifar10 ("jcm") side of `bench_peers`.

Its config, network, loss, optimiser and step, under pmap as it is run. Both sides use
the l2 distance in place of the LPIPS of the config.
"""

import functools
import importlib.util
import itertools
import sys
import types
from typing import Any

import flax
import jax
import numpy as np


class _PRNGSequence:
  """The part of haiku's PRNGSequence that the step uses: a new key at each `next`."""

  def __init__(self, key):
    self.internal_state = key

  def __next__(self):
    self.internal_state, key = jax.random.split(self.internal_state)
    return key


def _substitute(name: str, **members: Any) -> None:
  """Provides a module, if it is not installed."""
  if not importlib.util.find_spec(name):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)


# Functions and defaults that current versions of its libraries no longer have.
if not hasattr(jax, 'tree_map'):
  jax.tree_map = jax.tree_util.tree_map
if hasattr(flax.config, 'flax_return_frozendict'):
  flax.config.update('flax_return_frozendict', True)
_substitute('haiku', PRNGSequence=_PRNGSequence)
_substitute('blobfile')  # for checkpoints; none is read

from configs.cifar10_ve_ct_adaptive import get_config  # noqa: E402
from jcm import losses, sde_lib  # noqa: E402
from jcm.models import ncsnpp  # noqa: E402, F401  (registers the network)
from jcm.models import utils as models  # noqa: E402


def build(task: dict[str, Any]) -> dict[str, Any]:
  """The function to time, which runs a number of calls and waits, and facts."""
  config = get_config()
  config.training.loss_norm = 'l2'
  config.training.batch_size = task['batch']
  config.model.nf, config.model.num_res_blocks = task['channels'], task['num_blocks']
  key, rng = jax.random.split(jax.random.PRNGKey(0))
  net, model_state, params = models.init_model(key, config)
  tx, optimize_fn = losses.get_optimizer(config)
  state = models.StateWithTarget(
    step=0,
    lr=config.optim.lr,
    ema_rate=config.model.ema_rate,
    params=params,
    target_params=params,
    params_ema=params,
    model_state=model_state,
    opt_state=tx.init(params),
    rng_state=rng,
  )
  loss_fn = losses.get_consistency_loss_fn(
    sde_lib.get_sde(config),
    net,  # the teacher, which is not used with `dsm_target`
    params,
    model_state,
    net,
    train=True,
    loss_norm=config.training.loss_norm,
    weighting=config.training.weighting,
    stopgrad=config.training.stopgrad,
    dsm_target=config.training.dsm_target,
    solver=config.training.solver,
  )
  step_fn = losses.get_step_fn(
    loss_fn,
    train=True,
    optimize_fn=optimize_fn,
    ema_scales_fn=losses.get_ema_scales_fn(config),
  )
  p_step = jax.pmap(
    functools.partial(jax.lax.scan, step_fn),
    axis_name='batch',
    devices=jax.devices()[:1],
  )
  p_state = jax.tree_util.tree_map(lambda a: jax.numpy.asarray(a)[None], state)
  shape = (1, 1, task['batch'])  # devices, steps compiled together, examples
  draw = np.random.default_rng(0).uniform
  batches = itertools.cycle(
    [
      {
        'image': draw(-1, 1, (*shape, 32, 32, 3)).astype('f4'),
        'mask': np.ones(shape, np.int64),
      }
      for _ in range(8)
    ]
  )

  def steps(calls):
    nonlocal p_state, rng
    metrics = None
    for _ in range(calls):
      rng, step_rng = jax.random.split(rng)
      (_, p_state), metrics = p_step((step_rng[None], p_state), next(batches))
    jax.block_until_ready((p_state, metrics))

  return {
    'versions': {'jax': jax.__version__, 'flax': flax.__version__},
    'platform': jax.devices()[0].platform,
    'parameters': sum(a.size for a in jax.tree_util.tree_leaves(params)),
    'train': steps,
  }
