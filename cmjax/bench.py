"""How fast a run is on the devices at hand: step, parts, data and memory."""

from collections.abc import Callable, Iterator
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cmjax import fields, logs, train
from cmjax.core import Batch, Nets, TrainState, streams
from cmjax.run import Run

# Peak FLOP/s of a device in bfloat16, dense. Source: the data sheets of the makers.
PEAKS = {
  'NVIDIA A100': 312e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
}
WARM_UP, LEAST_ROUNDS, MOST_ROUNDS, ROUND_S = 3, 5, 50, 20.0
WINDOW_S = 2.0
_MATRICES = (512, 1024, 2048)  # which is fastest depends on the caches


def seconds(call: Callable[[], Any]) -> float:
  """The median time of a call."""
  return statistics.median(_rounds(call))


def _rounds(call: Callable[[], Any]) -> list[float]:
  """Times of a call, each waited for, after some that are not counted."""
  for _ in range(WARM_UP):
    jax.block_until_ready(call())
  took, begun = [], time.perf_counter()
  while len(took) < LEAST_ROUNDS or (
    len(took) < MOST_ROUNDS and time.perf_counter() - begun < ROUND_S
  ):
    start = time.perf_counter()
    jax.block_until_ready(call())
    took.append(time.perf_counter() - start)
  return took


def peak_flops() -> tuple[float, str]:
  """FLOP/s of one device, and what the number is.

  For a device that is not in `PEAKS`, such as a CPU, the most that a float32 product of
  matrices reached in any round.
  """
  kind = jax.devices()[0].device_kind
  for name in sorted(PEAKS, key=len, reverse=True):
    if kind.startswith(name):
      return PEAKS[name], f'the bfloat16 peak of {name}'
  multiply = jax.jit(jnp.matmul)

  def fastest(n):
    a = jnp.ones((n, n), jnp.float32)
    return 2 * n**3 / min(_rounds(lambda: multiply(a, a)))

  return max(map(fastest, _MATRICES)), 'the fastest float32 matmul measured'


def flops(program: Any) -> float:
  """Floating-point operations of the products and convolutions of a traced step.

  Of the whole batch, on all chips together. Every tap of a convolution counts, also
  where it meets padding; a scan counts as often as it runs, any other loop once, and of
  branches the dearest. The compiler's own count takes each loop for one pass, and it
  makes loops of its own to overlap products with collectives.
  """
  total = 0.0
  for equation in program.eqns:
    inner = [flops(part) for part in _programs(equation.params.values())]
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
      total += 2.0 * equation.outvars[0].aval.size * math.prod(sizes)
    elif equation.primitive.name == 'conv_general_dilated':
      kernel = equation.invars[1].aval
      features = kernel.shape[equation.params['dimension_numbers'].rhs_spec[0]]
      total += 2.0 * equation.outvars[0].aval.size * kernel.size / features
    elif equation.primitive.name == 'cond':
      total += max(inner)
    else:
      total += sum(inner) * equation.params.get('length', 1)
  return total


def _programs(values: Any) -> Iterator[Any]:
  """The programs among the settings of an operation."""
  for value in values:
    if isinstance(value, (tuple, list)):
      yield from _programs(value)
    elif hasattr(value, 'jaxpr') or hasattr(value, 'eqns'):
      yield value


def measure(run: Run) -> dict[str, Any]:
  """Every number of `report`, as JSON can hold them."""
  begun = time.perf_counter()
  state = train.random_state(run)
  batch = train.batch(run, 0)
  jax.block_until_ready((state, batch))
  ready = time.perf_counter()
  program = train.compiled_step(run).trace(state, run.frozen, batch)
  lowered = program.lower()
  traced = time.perf_counter()
  step = lowered.compile()
  compiled = time.perf_counter()
  flops_a_device = flops(program.jaxpr) / run.mesh.size
  memory = step.memory_analysis()
  stepper = Stepper(run, step, state)
  step_s, loop_s = _loops(run, stepper, batch)
  peak, peak_of = peak_flops()
  size = run.config.batch_size
  in_use = (jax.local_devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)
  found = {
    'devices': run.mesh.size,
    'device_kind': jax.devices()[0].device_kind,
    'jax': jax.__version__,
    'batch_size': size,
    'state_s': ready - begun,
    'trace_s': traced - ready,
    'compile_s': compiled - traced,
    'step_s': step_s,
    'images_per_s': size / step_s,
    'loop_images_per_s': size / loop_s,
    'waiting_for_data': max(0.0, 1 - step_s / loop_s),
    'flops_a_device': flops_a_device,
    'flops_per_s_a_device': flops_a_device / step_s,
    'peak_flops_per_s': peak,
    'peak_of': peak_of,
    'of_peak': flops_a_device / step_s / peak,
    'argument_bytes': memory.argument_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
    'peak_bytes_in_use': in_use,  # 0 where the device does not say
  }
  parts = _parts(run, stepper.state)
  found['parts'] = {name: seconds(call) for name, call in parts.items()}
  return found


class Stepper:
  """The compiled step, called on and on: it is given its state and gives the next."""

  def __init__(self, run: Run, step: train.Step, state: TrainState):
    self._step, self._frozen, self.state = step, run.frozen, state

  def __call__(self, batch: Batch) -> dict[str, jax.Array]:
    """One step, begun; its metrics."""
    self.state, metrics = self._step(self.state, self._frozen, batch)
    return metrics

  def loop(self, steps: int, next_batch: Callable[[int], Batch]) -> None:
    """So many steps, as far ahead of the device as in training, and waits for them."""
    ahead = []
    for i in range(steps):
      ahead.append(self(next_batch(i)))
      if len(ahead) > train.AHEAD:
        jax.block_until_ready(ahead[-train.AHEAD])
    jax.block_until_ready((self.state, ahead))


def _loops(run: Run, stepper: Stepper, batch: Batch) -> tuple[float, float]:
  """A step's time in the loop of training, with one batch and with the data.

  Medians over windows of many steps, of the one and the other kind in turn.
  """
  steps = max(3, min(500, round(WINDOW_S / seconds(lambda: stepper(batch)))))

  def window(next_batch):
    start = time.perf_counter()
    stepper.loop(steps, next_batch)
    return (time.perf_counter() - start) / steps

  pairs = [
    (window(lambda i: batch), window(lambda i: train.batch(run, i))) for _ in range(7)
  ]
  alone, with_data = map(statistics.median, zip(*pairs))
  return alone, with_data


def _parts(run: Run, state: TrainState) -> dict[str, Callable[[], Any]]:
  """What a step is made of, each alone; a step has more or fewer of each."""
  batch, frozen, params = train.batch(run, 0), run.frozen, state.params

  def levels(batch):
    return jnp.linspace(0.01, 10.0, len(batch.x0))

  def keys():
    return streams(jax.random.key(0), 0)

  def network(params, x, c_noise, cond):
    return run.network.apply(params, x, c_noise, cond, key=keys()['dropout'])

  def point(batch):
    t, clocks = levels(batch), run.network.clocks
    return batch.x0, t if clocks == 1 else jnp.stack([t] * clocks, axis=-1)

  def forward(params, batch):
    return network(params, *point(batch), batch.cond)

  def along(params, batch):
    tangents = jax.tree.map(jnp.ones_like, point(batch))
    return jax.jvp(lambda *at: network(params, *at, batch.cond), point(batch), tangents)

  def gradient(params, batch):
    return jax.grad(lambda p: jnp.mean(forward(p, batch) ** 2))(params)

  def update(state):
    updates, opt_state = run.tx.update(state.params, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state

  def averages(state):
    return train.averages(state, state.params, run.ema_rates, run.target_rate)

  def loss(state, frozen, batch):
    target = state.target if run.target_rate else None
    nets = Nets(state.params, target, **frozen._asdict())
    return run.loss(nets, batch, state.step, keys()).loss

  def teacher(params, batch):
    return run.teacher(params, batch.x0, levels(batch), batch.cond)

  def stable_field(reference, batch):
    wanted = {key: run.config.objective[key] for key in ('threshold', 'block')}
    given = (reference, batch.x0, batch.cond, batch.index)
    return fields.stable_denoiser(*given, **wanted)(batch.x0, levels(batch))

  def on(function, *arguments):
    compiled = jax.jit(function)
    return lambda: compiled(*arguments)

  parts = {
    'network, forward': on(forward, params, batch),
    'network, jvp': on(along, params, batch),
    'network, forward and backward': on(gradient, params, batch),
    'objective, forward': on(loss, state, frozen, batch),
    'optimiser': on(update, state),
    'averages': on(averages, state),
  }
  if run.teacher is not None:
    parts['teacher, forward'] = on(teacher, frozen.teacher, batch)
  if frozen.reference is not None and 'threshold' in run.config.objective:
    parts['stable field'] = on(stable_field, frozen.reference, batch)
  return parts


def report(found: dict[str, Any]) -> str:
  """The numbers as Markdown: one table of the whole, one of the parts."""
  gib = 2**30
  rows = {
    'devices': f'{found["devices"]} x {found["device_kind"]}',
    'to trace and lower': f'{found["trace_s"]:.1f} s',
    'to compile, or find in the cache': f'{found["compile_s"]:.1f} s',
    'a step': f'{1e3 * found["step_s"]:.1f} ms',
    'images a second, step alone': f'{found["images_per_s"]:.1f}',
    'images a second, with data': f'{found["loop_images_per_s"]:.1f}',
    'time waiting for data': f'{found["waiting_for_data"]:.1%}',
    'FLOPs a step and device': f'{found["flops_a_device"]:.3g}',
    'FLOP/s a device': f'{found["flops_per_s_a_device"]:.3g}',
    f'of {found["peak_of"]}': f'{found["of_peak"]:.1%}',
    'arguments, temporaries a device': (
      f'{found["argument_bytes"] / gib:.3f}, {found["temporary_bytes"] / gib:.3f} GiB'
    ),
  }
  if found['peak_bytes_in_use']:
    rows['peak memory in use'] = f'{found["peak_bytes_in_use"] / gib:.3f} GiB'
  whole = [{'what': name, 'measured': value} for name, value in rows.items()]
  parts = [
    {
      'part, alone': name,
      'ms': 1e3 * took,
      'of a step': f'{took / found["step_s"]:.1%}',
    }
    for name, took in found['parts'].items()
  ]
  return f'{logs.markdown_table(whole)}\n\n{logs.markdown_table(parts)}'
