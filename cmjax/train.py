"""The training step, the state, and the one loop: where all pieces are glued."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import math
from pathlib import Path
import time
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import optax

from cmjax import checkpoint, data, logs, preemption, pretrained, sharding, watchdog
from cmjax import config as configs
from cmjax import workdir as workdirs
from cmjax.core import (
  Array,
  Batch,
  Frozen,
  Key,
  Loss,
  LossOut,
  Nets,
  Params,
  Schedule,
  TrainState,
  UserError,
  streams,
)
from cmjax.run import Run

Step = Callable[[TrainState, Frozen, Batch], tuple[TrainState, dict[str, Array]]]
# Looks at the weights while training: (run, params, step, log, check), as often as
# `config.every.NAME_steps` says, and once more at the end; 0 means never. What takes
# long calls `check()` now and then, which raises `preemption.Stop` to end it.
Hook = Callable[[Run, Params, int, logs.RunLog, Callable[[], None]], None]


def make_train_step(
  loss: Loss,
  tx: optax.GradientTransformation,
  ema_rates: Mapping[str, Schedule],
  target_rate: Schedule | None,
  seed: int,
  accumulate: int = 1,
) -> Step:
  """One update, for the global batch: value, gradient, optimiser, averages, metrics.

  The gradient is the mean over `accumulate` parts of the batch, taken one after
  another, each with random numbers of its own.
  A step whose loss, gradient or update is not finite changes nothing but the step
  number, and counts as `skipped`. Metrics are f32[] each; `loss_q1` to `loss_q4` are
  means over the quarters of the batch by t, cleanest first.
  """
  root = jax.random.key(seed)

  def train_step(state, frozen, batch):
    def value(params, part, keys):
      target = state.target if target_rate else None
      nets = Nets(params, target, **frozen._asdict())
      out = loss(nets, part, state.step, keys)
      return jnp.mean(out.loss), out

    keys = streams(root, state.step)
    gradient, out = _gradient(value, accumulate, state.params, batch, keys)
    mean = jnp.mean(out.loss)
    norm = optax.tree.norm(gradient)
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    update_norm = optax.tree.norm(updates)
    params = optax.apply_updates(state.params, updates)
    target, ema = averages(state, params, ema_rates, target_rate)
    new = TrainState(state.step, params, target, ema, opt_state)
    finite = jnp.isfinite(mean) & jnp.isfinite(norm) & jnp.isfinite(update_norm)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    metrics = {'loss': mean, 'grad_norm': norm, 'update_norm': update_norm}
    metrics['skipped'] = 1.0 - finite
    metrics |= {f'mean_{name}': jnp.mean(v) for name, v in out.aux.items()}
    metrics |= _by_quartile(out.loss, out.aux['t'])
    return kept._replace(step=state.step + 1), metrics

  return train_step


def _gradient(
  value: Callable[..., tuple[Array, LossOut]],
  parts: int,
  params: Params,
  batch: Batch,
  keys: Mapping[str, Key],
) -> tuple[Params, LossOut]:
  """The mean gradient over the parts of a batch, and what each example gave."""
  gradient_of = jax.grad(value, has_aux=True)
  if parts == 1:
    return gradient_of(params, batch, keys)

  def add_part(total, part):
    i, rows = part
    own = {name: jax.random.fold_in(key, i) for name, key in keys.items()}
    gradient, out = gradient_of(params, rows, own)
    return jax.tree.map(lambda a, b: a + b / parts, total, gradient), out

  def split(a):  # example r of part i is r * parts + i: none leaves its device
    return jnp.swapaxes(jnp.reshape(a, (-1, parts, *a.shape[1:])), 0, 1)

  zeros = jax.tree.map(jnp.zeros_like, params)
  each = (jnp.arange(parts), jax.tree.map(split, batch))
  gradient, out = jax.lax.scan(add_part, zeros, each)
  return gradient, jax.tree.map(lambda a: jnp.reshape(a.T, -1), out)


def averages(
  state: TrainState,
  params: Params,
  ema_rates: Mapping[str, Schedule],
  target_rate: Schedule | None,
) -> tuple[Params, dict[str, Params]]:
  """The target network and every EMA, moved towards `params`."""
  target = _averaged(state.target, params, target_rate, state.step)
  ema = {
    name: _averaged(tree, params, ema_rates[name], state.step)
    for name, tree in state.ema.items()
  }
  return target, ema


def _averaged(
  average: Params, params: Params, rate: Schedule | None, step: Array
) -> Params:
  if rate is None:
    return None
  move = 1.0 - rate(step)
  return jax.tree.map(lambda a, p: a + move * (p - a), average, params)


def _by_quartile(loss: Array, t: Array) -> dict[str, Array]:
  quarter = jnp.argsort(jnp.argsort(t)) * 4 // len(t)
  means = {}
  for i in range(4):
    inside = quarter == i
    total = jnp.sum(jnp.where(inside, loss, 0.0))
    means[f'loss_q{i + 1}'] = total / jnp.maximum(jnp.sum(inside), 1)
  return means


def init_state(
  params: Params,
  tx: optax.GradientTransformation,
  ema_names: tuple[str, ...],
  with_target: bool,
) -> TrainState:
  """The state of step 0; under `jit`, so that no two leaves share a buffer."""

  def copy():
    return jax.tree.map(jnp.copy, params)

  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=copy(),
    target=copy() if with_target else None,
    ema={name: copy() for name in ema_names},
    opt_state=tx.init(params),
  )


def train(run: Run, workdir: str | Path, hooks: Mapping[str, Hook]) -> TrainState:
  """Trains to the end of the run, from its newest whole checkpoint if there is one.

  The work directory receives `config.json`, `metrics.jsonl`, `tensorboard/`,
  `pictures/` and `checkpoints/`. After a SIGTERM the step is ended and saved, and its
  state returned; what was left to do of the hooks is done when the run goes on.

  Raises: UserError if the directory holds another run or is in use, or weights do not
    fit; FloatingPointError after `config.max_skipped_steps` steps that were not finite,
    or if the run ends without having learned.
  """
  folder = Path(workdir)
  sharding.check_same({'config': configs.to_json(run.config)})
  workdirs.check_claim(folder, run.config)
  check_memory(run)
  # Made before any folder is: weights to start from may be refused.
  first = None if checkpoint.any_in(folder) else first_state(run)
  with _locked(folder):
    workdirs.check_claim(folder, run.config)  # again: it may have been taken meanwhile
    if jax.process_index() == 0:
      workdirs.write_config(folder, run.config)
    checkpoints = checkpoint.Checkpoints(folder, run.config.keep_checkpoints)
    state, meta = checkpoints.restore(abstract_state(run), logs.say) or (first, {})
    start = int(state.step)
    if workdirs.caught_up(folder) == start:  # the hooks that its checkpoint lacks
      meta = meta | {'due': []}
    logs.say(_opening(run, start))
    with (
      contextlib.closing(checkpoints),
      contextlib.closing(logs.RunLog(folder, jax.process_index() == 0, start)) as log,
      contextlib.closing(logs.Progress(start, run.total_steps)) as progress,
      preemption.Notice() as notice,
      contextlib.closing(watchdog.Watchdog()) as watch,
    ):
      state, ended = _loop(
        run, state, meta, checkpoints, log, progress, hooks, notice, watch
      )
    if ended and jax.process_index() == 0:
      workdirs.mark_caught_up(folder, int(state.step))
    if ended:
      logs.say(f'done: {workdir}')
  return state


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  """The lock of the work directory, held by the first process for all."""
  with contextlib.ExitStack() as stack:
    refusal = ''
    if jax.process_index() == 0:
      try:
        stack.enter_context(workdirs.lock(folder))
      except (UserError, OSError) as error:  # the others are to know before it ends
        refusal = str(error)
    if not sharding.all_true(not refusal):
      raise UserError(refusal or f'{folder}: process 0 could not lock it')
    yield


def check_memory(run: Run) -> None:
  """Raises UserError for a state that this machine cannot hold, before it is made."""
  if jax.devices()[0].platform != 'cpu':
    return  # the device raises an error that can be caught
  held = sharding.bytes_held(abstract_state(run)) * jax.local_device_count()
  there = sharding.host_memory()
  if held > there:
    raise UserError(
      f'config.network: parameters, averages and optimiser state take '
      f'{held / 2**30:,.0f} GiB, and this machine has {there / 2**30:,.0f}; make the '
      'network smaller, or split the state: config.mesh.fsdp=True'
    )


def compiled_step(run: Run) -> Step:
  """The training step of a run, compiled at its first call; the state is donated."""
  step = make_train_step(
    run.loss,
    run.tx,
    run.ema_rates,
    run.target_rate,
    run.config.seed,
    run.config.accumulate,
  )
  everywhere = sharding.replicated(run.mesh)
  return jax.jit(step, donate_argnums=0, out_shardings=(_places(run), everywhere))


def _loop(
  run: Run,
  state: TrainState,
  meta: Mapping[str, Any],
  checkpoints: checkpoint.Checkpoints,
  log: logs.RunLog,
  progress: logs.Progress,
  hooks: Mapping[str, Hook],
  notice: preemption.Notice,
  watch: watchdog.Watchdog,
) -> tuple[TrainState, bool]:
  """The state at the end, or where a notice came; whether it is the end."""
  every, start, total = run.config.every, int(state.step), run.total_steps
  step_fn = compiled_step(run)
  window, losses, lost = _Window(meta.get('window')), [], []

  def save(due: list[str]) -> None:
    watch.rest()
    checkpoints.save(state, run.meta() | {'window': window.partial(), 'due': due})

  def stop(step: int, due: list[str]) -> tuple[TrainState, bool]:
    save(due)
    logs.say(f'asked to stop: saved step {step}; the same command goes on from there')
    return state, False

  def look(step: int, names: list[str]) -> list[str]:
    """Runs hooks, and returns the names of those that a notice kept from their end."""
    if names:
      watch.rest()
    for i, name in enumerate(names):
      params = weights(state, run.config.sample_weights)
      try:
        hooks[name](run, params, step, log, notice.check)
      except preemption.Stop:
        return names[i:]
      window.restart_clock()
    return []

  due = look(start, [name for name in meta.get('due', ()) if name in hooks])
  if due:
    return stop(start, due)
  if start < total:
    logs.say('compiling the training step ...')
  begun = time.monotonic()
  for step in range(start + 1, total + 1):
    watch.step(step)
    state, metrics = step_fn(state, run.frozen, batch(run, step - 1))
    window.add(metrics)
    progress.advance()
    if step == start + 1:
      jax.block_until_ready(metrics)
      logs.say(f'compiled and made the first step in {time.monotonic() - begun:.1f} s')
      window.restart_clock()
      watch.rest()
      progress.restart(step)
    last = step == total
    if last or step % every.log_steps == 0:
      skipped, means = window.close(step, run.config.batch_size)
      lost += skipped
      losses.append(means['loss'])
      means['skipped_steps'] = len(lost)
      log.scalars(step, means | _scheduled(run, step - 1))
      shown = _SHOWN + ('skipped_steps',) * bool(lost)
      progress.report(step, {key: means[key] for key in shown if key in means})
      _stop_if_lost(run, lost)
    often = {name: every[f'{name}_steps'] for name in hooks}
    due = [name for name, n in often.items() if n and (last or step % n == 0)]
    if not notice.given():
      due = look(step, due)
    if due or (not last and notice.given()):
      return stop(step, due)
    # After the hooks: a run that is killed in its last one has a step left to do.
    if last or step % every.checkpoint_steps == 0:
      save([])
  _check_learned(losses, [s for s in lost if s > start], total - start)
  return state, True


AHEAD = 8  # steps that may be dispatched before they are done
_SHOWN = ('loss', 'grad_norm', 'images_per_s')


class _Window:
  """The metrics since the last report, left on the device until then.

  `begun` is the `partial` window of a run that goes on, so that its next row averages
  over as many steps as it would have without the stop.
  """

  def __init__(self, begun: Mapping[str, Any] | None = None):
    begun = begun or {}
    self._rows = []
    self._count = begun.get('steps', 0)
    self._sums = dict(begun.get('sums', {}))
    self._skipped = list(begun.get('skipped', ()))
    self.restart_clock()

  def add(self, metrics: dict[str, Array]) -> None:
    self._rows.append(metrics)
    self._timed += 1
    if len(self._rows) > AHEAD:  # or batches pile up on the devices
      jax.block_until_ready(self._rows[-AHEAD])

  def restart_clock(self) -> None:
    """Leaves what was not training out of images_per_s."""
    self._since, self._timed = time.monotonic(), 0

  def partial(self) -> dict[str, Any]:
    """What is to be saved of it, for JSON."""
    self._take_rows()
    return {'steps': self._count, 'sums': self._sums, 'skipped': self._skipped}

  def close(self, step: int, batch_size: int) -> tuple[list[int], dict[str, float]]:
    """The skipped steps up to `step`, and means with images_per_s; a new window."""
    self._take_rows()
    seconds = time.monotonic() - self._since
    means = {name: total / self._count for name, total in self._sums.items()}
    if self._timed:
      means['images_per_s'] = self._timed * batch_size / seconds
    first = step - self._count + 1
    skipped = [first + i for i in self._skipped]
    self._count, self._sums, self._skipped = 0, {}, []
    self.restart_clock()
    return skipped, means

  def _take_rows(self) -> None:
    for row in jax.device_get(self._rows):
      if row.pop('skipped') > 0:
        self._skipped.append(self._count)
      for name, value in row.items():
        self._sums[name] = self._sums.get(name, 0.0) + float(value)
      self._count += 1
    self._rows = []


def _check_learned(losses: list[float], lost: list[int], steps: int) -> None:
  """Refuses to call a run done that went nowhere.

  Raises: FloatingPointError if no step was kept, or the loss rose beyond all bounds.
  """
  if steps and len(lost) == steps:
    raise FloatingPointError(
      f'all {steps} steps had a loss, gradient or update that is not finite, and '
      'nothing was learned; lower the learning rate, or look at the data'
    )
  known = [loss for loss in losses if math.isfinite(loss)]  # without lost steps
  if known and known[-1] > MOST_RISE * max(abs(known[0]), 1.0):
    raise FloatingPointError(
      f'the loss rose from {known[0]:.4g} to {known[-1]:.4g}: the run diverged; '
      'start again in a new --workdir with a lower learning rate, or with '
      'config.grad_clip_norm'
    )


MOST_RISE = 1e4  # of a loss over a run; schedules of the gap change it by far less


def weights(state: TrainState, name: str) -> Params:
  """The parameters called `online`, or the EMA of that name."""
  return state.params if name == checkpoint.ONLINE else state.ema[name]


def batch(run: Run, step: int) -> Batch:
  """The global batch of a step, on the devices; each process places its share."""
  size = run.config.batch_size
  rows = sharding.rows_here(run.mesh, size)
  host = data.batch_at(run.source, run.config.seed, step, size, rows)
  return sharding.place_rows(host, rows, size, run.mesh)


def _scheduled(run: Run, step: int) -> dict[str, float]:
  return {
    name.removeprefix('config.'): float(schedule(step))
    for name, schedule in run.schedules.items()
  }


def _stop_if_lost(run: Run, lost: list[int]) -> None:
  if len(lost) > run.config.max_skipped_steps:
    raise FloatingPointError(
      f'{len(lost)} steps had a loss, gradient or update that is not finite, the last '
      f'from batch {lost[-1] - 1} of config.seed {run.config.seed}; nothing of them '
      'was kept. Go on from here in a new --workdir by --config.init_from, with a '
      'lower learning rate or a config.grad_clip_norm'
    )


def _opening(run: Run, start: int) -> str:
  size = sum(a.size for a in jax.tree.leaves(run.abstract_params()))
  begun = f'goes on from step {start:,}' if start else 'starts'
  return (
    f'{run.source.name}: {len(run.source.examples):,} examples; {size:,} parameters; '
    f'{run.total_steps:,} steps of {run.config.batch_size} on {run.mesh.size} '
    f'{jax.devices()[0].platform} device(s); {begun}'
  )


# Preconditionings that agree up to a small change of c_skip and c_out.
_ONE_FORM = {'cmjax.precond:edm', 'cmjax.precond:consistency'}


def _random_params(run: Run) -> Params:
  key = jax.random.fold_in(jax.random.key(run.config.seed), zlib.crc32(b'init'))
  inputs = pretrained.example_inputs(
    run.source.shape, run.source.classes, run.network.clocks
  )
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), inputs)
  return run.network.init(key, *zeros)


def _state_of(run: Run, params: Params) -> TrainState:
  return init_state(params, run.tx, tuple(run.ema_rates), run.target_rate is not None)


def abstract_state(run: Run) -> TrainState:
  """Shapes, dtypes and places of the whole state, without computing any."""
  return sharding.abstract(
    run.mesh, jax.eval_shape(lambda: _state_of(run, _random_params(run)))
  )


def _places(run: Run) -> TrainState:
  return jax.tree.map(lambda a: a.sharding, abstract_state(run))


def random_state(run: Run) -> TrainState:
  """The state of step 0, with random weights."""

  def create():
    return _state_of(run, _random_params(run))

  return jax.jit(create, out_shardings=_places(run))()


def first_state(run: Run) -> TrainState:
  """Random weights, or those of `config.init_from`.

  Raises: UserError if there are none there, or they are of another network.
  """
  if not run.config.init_from:
    return random_state(run)
  like = run.abstract_params()
  params, theirs = pretrained.load_weights(run.config.init_from, like, logs.say)
  changed = configs.differences(theirs, run.config)
  form = 'config.precond.fn'
  if form in changed and not {theirs.precond.fn, run.config.precond.fn} <= _ONE_FORM:
    raise UserError(
      f'config.init_from: {run.config.init_from} was trained through '
      f'{theirs.precond.fn}, and weights mean something else through '
      f'{run.config.precond.fn}; start from a model of that form'
    )
  for key in ('config.precond.sigma_data', 'config.network.noise_scale'):
    if key in changed:
      logs.say(f'note: {key} is not that of init_from: {changed[key]}')
  places = _places(run)
  return jax.jit(lambda params: _state_of(run, params), out_shardings=places)(params)
