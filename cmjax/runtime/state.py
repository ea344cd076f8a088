"""The training state of a run: shapes, shardings and initial values."""

from typing import Any
import zlib

import jax
import jax.numpy as jnp

from cmjax.core import Params, TrainState, UserError
from cmjax.runtime import checkpoint, logs, pretrained, sharding
from cmjax.runtime.config_record import differences
from cmjax.runtime.run import Run


def init_state(
  params: Params, opt_state: Any, ema_names: tuple[str, ...], with_target: bool
) -> TrainState:
  """The state of step 0; call it under `jit`, so that no two arrays share a buffer."""

  def copy():
    return jax.tree.map(jnp.copy, params)

  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=copy(),
    target=copy() if with_target else None,
    ema={name: copy() for name in ema_names},
    opt_state=opt_state,
  )


def abstract_state(run: Run) -> TrainState:
  """Shapes, dtypes and shardings of the state, without computing it."""
  return sharding.abstract(
    run.mesh, jax.eval_shape(lambda: _init(run, _random_params(run)))
  )


def shardings_of_state(run: Run) -> TrainState:
  """The sharding of every array of the state."""
  return jax.tree.map(lambda a: a.sharding, abstract_state(run))


def random_state(run: Run) -> TrainState:
  """The state of step 0 with random weights."""

  def create():
    return _init(run, _random_params(run))

  # Compiled once and run once: on CPUs, optimising so many draws takes half a minute.
  on_cpu = run.mesh.devices.flat[0].platform == 'cpu'
  options = {'xla_backend_optimization_level': 0} if on_cpu else {}
  return jax.jit(
    create, out_shardings=shardings_of_state(run), compiler_options=options
  )()


def first_state(run: Run) -> TrainState:
  """The state of step 0 with the weights of `config.init_from`, random if empty.

  Raises: UserError if the weights are missing, of another network, or of another
    preconditioning.
  """
  path = run.config.init_from
  if not path:
    return random_state(run)
  like = run.abstract_params()
  params, config = pretrained.load_weights(path, like, logs.say)
  changed = differences(config, run.config)
  precond, ours = (_path_of_precond(c) for c in (config, run.config))
  if precond != ours and not {precond, ours} <= _INTERCHANGEABLE:
    raise UserError(
      f'config.init_from: {path} was trained with {precond}, not {ours}, and its '
      'weights have another meaning; start from a model with the same config.precond'
    )
  for key in ('config.precond.sigma_data', 'config.network.noise_scale'):
    if key in changed:
      logs.say(f'note: {key} differs from that of init_from: {changed[key]}')
  shardings = shardings_of_state(run)
  return jax.jit(lambda params: _init(run, params), out_shardings=shardings)(params)


# Their c_skip and c_out differ only slightly.
_INTERCHANGEABLE = {'cmjax.precond:edm', 'cmjax.precond:consistency'}


def _path_of_precond(config: Any) -> str:
  return config.precond.fn


def weights(state: TrainState, name: str) -> Params:
  """The parameters if the name is `online`, otherwise the EMA of that name."""
  return state.params if name == checkpoint.ONLINE else state.ema[name]


def check_memory(run: Run) -> None:
  """On CPUs, raises UserError if this machine has too little memory for the state.

  Out of memory, other devices raise an error, but a process on a CPU is killed.
  """
  if jax.devices()[0].platform != 'cpu':
    return
  needed = sharding.bytes_held(abstract_state(run)) * jax.local_device_count()
  available = sharding.host_memory()
  if needed > available:
    raise UserError(
      f'config.network: parameters, averages and optimiser state need '
      f'{needed / 2**30:,.0f} GiB of the {available / 2**30:,.0f} GiB of memory; make '
      'the network smaller, or shard the state: config.mesh.fsdp=True'
    )


def _random_params(run: Run) -> Params:
  key = jax.random.fold_in(jax.random.key(run.config.seed), zlib.crc32(b'init'))
  inputs = pretrained.example_inputs(
    run.source.shape, run.source.classes, run.network.num_times
  )
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), inputs)
  return run.network.init(key, *zeros)


def _init(run: Run, params: Params) -> TrainState:
  opt_state, with_target = run.tx.init(params), run.target_decay is not None
  return init_state(params, opt_state, tuple(run.ema_decays), with_target)
