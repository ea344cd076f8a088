"""`--mode=bench`: times the training step of a config, its parts and its data."""

import argparse
from collections.abc import Callable
import contextlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cmjax import train
from cmjax.core import Batch, Loss, Model, Nets, TrainState, streams, unused
from cmjax.runtime import batches, build, logs, results, workdir
from cmjax.runtime.flops import PEAKS, flops
from cmjax.runtime.run import Run, prepare
from cmjax.runtime.state import random_state
from cmjax.train_step import Step, averages

# Rounds of a measurement: not counted, least, most; and none starts after ROUND_S.
WARM_UP, MIN_ROUNDS, MAX_ROUNDS, ROUND_S = 3, 5, 50, 20.0
WINDOW_S = 2.0  # of training steps, timed together
_MATRIX_SIZES = (512, 1024, 2048)  # which is fastest depends on the caches


def seconds(call: Callable[[], Any]) -> float:
  """The median time of a call in seconds, until its result is ready."""
  return statistics.median(_rounds(call))


def _rounds(call: Callable[[], Any]) -> list[float]:
  """The time of each call in seconds, after a few that are not counted."""
  for _ in range(WARM_UP):
    jax.block_until_ready(call())
  times, first = [], time.perf_counter()
  while len(times) < MIN_ROUNDS or (
    len(times) < MAX_ROUNDS and time.perf_counter() - first < ROUND_S
  ):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return times


def peak_flops() -> tuple[float, str]:
  """Peak FLOP/s of one device, and a description of the number.

  For a device that is not in `PEAKS`, such as a CPU, it is the highest rate that a
  float32 matrix product reaches in any round.
  """
  kind = jax.devices()[0].device_kind
  for name in sorted(PEAKS, key=len, reverse=True):
    if kind.startswith(name):
      return PEAKS[name], f'the bfloat16 peak of {name}'
  multiply = jax.jit(jnp.matmul)

  def highest_rate(n):
    a = jnp.ones((n, n), jnp.float32)
    return 2 * n**3 / min(_rounds(lambda: multiply(a, a)))

  return max(map(highest_rate, _MATRIX_SIZES)), 'the fastest float32 matmul measured'


def measure(run: Run) -> dict[str, Any]:
  """The measurements that `report` shows, as values for JSON."""
  start = time.perf_counter()
  state = random_state(run)
  batch = batches.batch(run, 0)
  jax.block_until_ready((state, batch))
  ready = time.perf_counter()
  # `compiled_step` returns a jitted function, whose type has no `trace`.
  jitted: Any = train.compiled_step(run)
  program = jitted.trace(state, run.frozen, batch)
  lowered = program.lower()
  traced = time.perf_counter()
  step = lowered.compile()
  compiled = time.perf_counter()
  flops_per_device = flops(program.jaxpr) / run.mesh.size
  memory = step.memory_analysis()
  stepper = Stepper(run, step, state)
  step_s, loop_s = _loop_seconds(run, stepper, batch)
  peak, peak_of = peak_flops()
  size = len(batch.x0)
  device_memory = jax.local_devices()[0].memory_stats() or {}
  return {
    'devices': run.mesh.size,
    'device_kind': jax.devices()[0].device_kind,
    'jax': jax.__version__,
    'batch_size': size,
    'state_s': ready - start,
    'trace_s': traced - ready,
    'compile_s': compiled - traced,
    'step_s': step_s,
    'images_per_s': size / step_s,
    'loop_images_per_s': size / loop_s,
    'waiting_for_data': max(0.0, 1 - step_s / loop_s),
    'flops_a_device': flops_per_device,
    'flops_per_s_a_device': flops_per_device / step_s,
    'peak_flops_per_s': peak,
    'peak_of': peak_of,
    'of_peak': flops_per_device / step_s / peak,
    'argument_bytes': memory.argument_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
    # 0 on devices that do not report it, such as CPUs.
    'peak_bytes_in_use': device_memory.get('peak_bytes_in_use', 0),
    'parts': {name: seconds(call) for name, call in _parts(run, stepper.state).items()},
  }


class Stepper:
  """The compiled training step with its state, which each call replaces."""

  def __init__(self, run: Run, step: Step, state: TrainState):
    self._step, self._frozen, self.state = step, run.frozen, state

  def __call__(self, batch: Batch) -> dict[str, jax.Array]:
    """Dispatches one step, and returns its metrics."""
    self.state, metrics = self._step(self.state, self._frozen, batch)
    return metrics

  def loop(self, num_steps: int, next_batch: Callable[[int], Batch]) -> None:
    """Runs steps, dispatched as far ahead as in training, and waits for the last."""
    dispatched = []
    for i in range(num_steps):
      dispatched.append(self(next_batch(i)))
      if len(dispatched) > train.AHEAD:
        jax.block_until_ready(dispatched[-train.AHEAD])
    jax.block_until_ready((self.state, dispatched))


def _loop_seconds(run: Run, stepper: Stepper, batch: Batch) -> tuple[float, float]:
  """Seconds per step of the training loop, with one fixed batch and with the data.

  Each is a median over windows of many steps; the two kinds alternate.
  """
  num_steps = max(3, min(500, round(WINDOW_S / seconds(lambda: stepper(batch)))))

  def window(next_batch):
    start = time.perf_counter()
    stepper.loop(num_steps, next_batch)
    return (time.perf_counter() - start) / num_steps

  with contextlib.closing(batches.batches(run)) as data:
    windows = [
      (window(lambda i: batch), window(lambda i: next(data))) for _ in range(7)
    ]
  fixed, with_data = zip(*windows)
  return statistics.median(fixed), statistics.median(with_data)


def _parts(run: Run, state: TrainState) -> dict[str, Callable[[], Any]]:
  """The parts of a step, compiled one by one; a step may use each more than once."""
  batch, frozen, params = batches.batch(run, 0), run.frozen, state.params

  def sigmas(batch):
    return jnp.linspace(0.01, 10.0, len(batch.x0))

  def keys():
    return streams(jax.random.key(0), 0)

  def network(params, x, c_noise, cond):
    return run.network.apply(params, x, c_noise, cond, key=keys()['dropout'])

  def inputs(batch):
    t, num_times = sigmas(batch), run.network.num_times
    return batch.x0, t if num_times == 1 else jnp.stack([t] * num_times, axis=-1)

  def forward(params, batch):
    return network(params, *inputs(batch), batch.cond)

  def jvp(params, batch):
    tangents = jax.tree.map(jnp.ones_like, inputs(batch))
    return jax.jvp(
      lambda x, c_noise: network(params, x, c_noise, batch.cond),
      inputs(batch),
      tangents,
    )

  def gradient(params, batch):
    return jax.grad(lambda p: jnp.mean(forward(p, batch) ** 2))(params)

  def update(state):  # the parameters stand in for their gradient
    updates, opt_state = run.tx.update(state.params, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state

  def average(state):
    return averages(state, state.params, run.ema_decays, run.target_decay)

  def value_of(loss):
    def value(state, frozen, batch):
      target = state.target if run.target_decay else None
      nets = Nets(state.params, target, **frozen._asdict())
      return loss(nets, batch, state.step, keys()).loss

    return value

  def compiled(function, *arguments):
    jitted = jax.jit(function)
    return lambda: jitted(*arguments)

  parts = {
    'network, forward': compiled(forward, params, batch),
    'network, jvp': compiled(jvp, params, batch),
    'network, forward and backward': compiled(gradient, params, batch),
    'objective, forward': compiled(value_of(run.loss), state, frozen, batch),
    'objective, without its networks': compiled(
      value_of(_loss_without_networks(run)), state, frozen, batch
    ),
    'optimiser': compiled(update, state),
    'averages': compiled(average, state),
  }
  if (teacher := run.teacher) is not None:

    def teacher_forward(params, batch):
      return teacher(params, batch.x0, sigmas(batch), batch.cond)

    parts['teacher, forward'] = compiled(teacher_forward, frozen.teacher, batch)
  return parts


def _loss_without_networks(run: Run) -> Loss:
  """The objective of a run whose network and teacher return their input."""
  config = run.config
  network = run.network._replace(apply=lambda params, x, c_noise, cond, *, key=None: x)
  f = build.build(config.precond, 'config.precond', Model, network=network)
  provided: dict[str, Any] = {'f': f}
  if run.teacher is not None:
    provided['teacher'] = lambda params, x, sigma, cond, *, key=None: x
  return build.build(
    config.objective,
    'config.objective',
    Loss,
    batch_size=config.batch_size,
    total_images=config.total_images,
    **provided,
  )


def report(result: dict[str, Any]) -> str:
  """The result of `measure` as Markdown: a table of the step, and one of its parts."""
  gib = 2**30
  rows = {
    'devices': f'{result["devices"]} x {result["device_kind"]}',
    'tracing and lowering': f'{result["trace_s"]:.1f} s',
    'compilation, or loading from the cache': f'{result["compile_s"]:.1f} s',
    'one step': f'{1e3 * result["step_s"]:.1f} ms',
    'images/s of the step alone': f'{result["images_per_s"]:.1f}',
    'images/s with the data': f'{result["loop_images_per_s"]:.1f}',
    'time spent waiting for data': f'{result["waiting_for_data"]:.1%}',
    'FLOPs per step and device': f'{result["flops_a_device"]:.3g}',
    'FLOP/s per device': f'{result["flops_per_s_a_device"]:.3g}',
    f'fraction of {result["peak_of"]}': f'{result["of_peak"]:.1%}',
    'arguments, temporaries per device': (
      f'{result["argument_bytes"] / gib:.3f}, {result["temporary_bytes"] / gib:.3f} GiB'
    ),
  }
  if result['peak_bytes_in_use']:
    rows['peak memory in use'] = f'{result["peak_bytes_in_use"] / gib:.3f} GiB'
  step = [{'quantity': name, 'value': value} for name, value in rows.items()]
  parts = [
    {
      'part': name,
      'ms': 1e3 * part_s,
      'relative to a step': f'{part_s / result["step_s"]:.1%}',
    }
    for name, part_s in result['parts'].items()
  ]
  return f'{logs.markdown_table(step)}\n\n{logs.markdown_table(parts)}'


def run(flags: argparse.Namespace) -> None:
  """Prints the report; with a --workdir, also writes `bench.json` into it."""
  folder = workdir.folder(flags.workdir) if flags.workdir else None
  config = workdir.config_for(flags.config, folder, flags.overrides, flags.trust)
  if config.init_from:
    config = config.replace(init_from='')  # any weights take the same time
  result = measure(prepare(config, trust=flags.trust))
  logs.say(report(result))
  if folder:
    path = unused(folder / 'bench', '.json')
    results.write_json(path, result | {'config': config.to_dict()})
    logs.say(f'\n{path}')
