"""The training loop, and the iterator over training steps that it is written with."""

import collections
from collections.abc import Callable, Iterator, Mapping
import contextlib
from pathlib import Path
import time
from typing import Any, NamedTuple, cast

import jax

from cmjax.core import Array, Batch, Params, TrainState
from cmjax.runtime import (
  checkpoint,
  logs,
  paths,
  preemption,
  profile,
  provenance,
  sharding,
  tracking,
  watchdog,
)
from cmjax.runtime.batches import batches
from cmjax.runtime.config_json import to_json
from cmjax.runtime.lock import lock
from cmjax.runtime.run import Run
from cmjax.runtime.schedules import values_at
from cmjax.runtime.snapshots import Snapshots
from cmjax.runtime.state import (
  abstract_state,
  check_memory,
  first_state,
  shardings_of_state,
  weights,
)
from cmjax.runtime.window import Window, check_learned, check_skipped
from cmjax.runtime.workdir import check_claim, write_config
from cmjax.train_step import make_train_step

AHEAD = 8  # steps that may be dispatched before they are finished
SHOWN_WAIT = 0.5  # a smaller fraction of the time is not among the progress

# Called with (run, params, step, log, check) every `config.every.NAME_steps` steps (0:
# never) and after the last. `check` raises `preemption.Preempted` after a notice.
Hook = Callable[[Run, Params, int, logs.RunLog, Callable[[], None]], None]


def steps(
  run: Run,
  state: TrainState | None = None,
  data: Iterator[Batch] | None = None,
) -> Iterator[tuple[int, TrainState, dict[str, Array]]]:
  """Trains to the last step of a run; yields (step, state, metrics) after each step.

  Writes nothing, and waits for a step only when `AHEAD` later ones are dispatched. The
  metrics are those of `make_train_step`, on the device.

  Args:
    run: what `run.prepare` returns.
    state: where to continue; by default step 0, with the weights of `init_from`. Its
      buffers are donated, and so are those of each state that is yielded when the next
      one is asked for: copy what is to be kept.
    data: the global batches of the coming steps, with which training ends; by default
      those of the config.

  Raises: UserError if the weights of `init_from` do not fit.
  """
  current: TrainState = first_state(run) if state is None else state
  train_step, start = compiled_step(run), int(current.step)
  dispatched: collections.deque[dict[str, Array]] = collections.deque()
  with contextlib.closing(batches(run, start)) as of_config:
    each = of_config if data is None else data
    for step, batch in zip(range(start + 1, run.total_steps + 1), each, strict=False):
      current, metrics = train_step(current, run.frozen, batch)
      dispatched.append(metrics)
      if len(dispatched) > AHEAD:  # otherwise, batches fill the memory of the devices
        jax.block_until_ready(dispatched.popleft())
      yield step, current, metrics


def compiled_step(run: Run) -> jax.stages.Wrapped:
  """The jitted training step of a run, a `Step` that donates the state."""
  decays = run.ema_decays, run.target_decay
  seed, accumulate = run.config.seed, run.config.accumulate
  on_cpu = run.mesh.devices.flat[0].platform == 'cpu'
  step = make_train_step(run.loss, run.tx, *decays, seed, accumulate, unroll=on_cpu)
  shardings = shardings_of_state(run), sharding.replicated(run.mesh)
  return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def train(
  run: Run,
  workdir: str | Path,
  hooks: Mapping[str, Hook] | None = None,
  span: profile.Span | None = None,
) -> TrainState:
  """Trains to the last step, from the newest intact checkpoint if there is one.

  Writes `config.json`, `starts.jsonl`, `metrics.jsonl`, `pictures/`, `checkpoints/`,
  `snapshots/` and what trackers write into the work directory, and a trace of the steps
  of `span`. After a SIGTERM, saves the current step and returns its state; unfinished
  hooks are repeated when the run resumes.

  Raises: UserError if the directory holds another run or is in use, `init_from` is
    refused, a tracker does not start, or a step of `span` is not trained;
    FloatingPointError after `config.max_skipped_steps` skipped steps, or at
    the end if all steps were skipped or the loss diverged.
  """
  folder = paths.path(workdir)
  sharding.check_same({'config': to_json(run.config)})
  check_claim(folder, run.config)
  profile.check(span, 0, run.total_steps)
  check_memory(run)
  # Before the folder is created, since `first_state` may raise. What decides whether
  # the processes compute together is read by one of them.
  saved = sharding.from_process_0(lambda: checkpoint.any_in(folder))
  first = None if saved else first_state(run)
  with sharding.on_process_0(lock(folder)) as check_lock:
    check_claim(folder, run.config)  # again: another process may have had the lock
    sharding.from_process_0(lambda: write_config(folder, run.config))
    checkpoints = checkpoint.Checkpoints(folder, run.config.keep_checkpoints)
    state, meta = checkpoints.restore(abstract_state(run), logs.say) or (first, {})
    state = cast(TrainState, state)  # `first` is None only if there are checkpoints
    start = int(state.step)
    profile.check(span, start, run.total_steps)
    # Hooks ran after the checkpoint.
    if sharding.from_process_0(lambda: provenance.caught_up(folder)) == start:
      meta = meta | {'due': []}
    logs.say(run.summary(start))
    primary = jax.process_index() == 0
    trackers = tracking.Trackers(run.config, folder, start)
    with (
      sharding.on_process_0(provenance.recorded(folder, start, run.facts())),
      contextlib.closing(checkpoints),
      sharding.on_process_0(trackers.running()),
      contextlib.closing(Snapshots(folder, run.config)) as snapshots,
      contextlib.closing(logs.RunLog(folder, primary, start, trackers.log)) as log,
      contextlib.closing(logs.Progress(start, run.total_steps)) as progress,
      preemption.Notice() as notice,
      contextlib.closing(watchdog.Watchdog(run.config.watchdog, folder)) as watch,
      contextlib.closing(profile.Trace(folder, span)) as trace,
      contextlib.closing(batches(run, start)) as data,
    ):
      writers = _Writers(check_lock, checkpoints, snapshots, log, trackers)
      services = _Services(data, writers, progress, notice, watch, trace)
      state, finished = _loop(run, state, meta, hooks or {}, services)
    if finished and jax.process_index() == 0:
      provenance.mark_caught_up(folder, int(state.step))
    if finished:
      logs.say(f'done: {workdir}')
  return state


def save(run: Run, state: TrainState, workdir: str | Path) -> None:
  """Saves a state that `steps` has yielded, as `train` does, which resumes from it.

  So does `cmjax --workdir=WORKDIR`. The state may be donated as soon as this returns;
  a step that the directory already has is not saved again.

  Args:
    run: the run of the state.
    state: at any step.
    workdir: a new work directory, or that of the same run.

  Raises: UserError if the directory holds another run, is in use or cannot be written.
  """
  folder = paths.path(workdir)
  check_claim(folder, run.config)
  with sharding.on_process_0(lock(folder)):
    sharding.from_process_0(lambda: write_config(folder, run.config))
    keep = run.config.keep_checkpoints
    with contextlib.closing(checkpoint.Checkpoints(folder, keep)) as checkpoints:
      checkpoints.save(state, run.meta())


class _Writers(NamedTuple):
  """What the loop writes to."""

  check_lock: Callable[[], None] | None  # of process 0
  checkpoints: checkpoint.Checkpoints
  snapshots: Snapshots
  log: logs.RunLog
  trackers: tracking.Trackers

  def save(self, state: TrainState, meta: dict[str, Any]) -> None:
    """Saves a checkpoint, after all that a run resumed from it does not repeat."""
    if self.check_lock:
      self.check_lock()
    self.snapshots.wait()
    self.log.flush()
    if jax.process_index() == 0:
      self.trackers.copy()
    self.checkpoints.save(state, meta)


class _Services(NamedTuple):
  """What the loop reads and writes, and what monitors it."""

  data: Iterator[Batch]
  writers: _Writers
  progress: logs.Progress
  notice: preemption.Notice
  watch: watchdog.Watchdog
  trace: profile.Trace


def _loop(
  run: Run,
  first: TrainState,
  meta: Mapping[str, Any],
  hooks: Mapping[str, Hook],
  services: _Services,
) -> tuple[TrainState, bool]:
  """The last state and True; after a preemption notice, the saved state and False."""
  data, writers, progress, notice, watch, trace = services
  log = writers.log
  every, start, total = run.config.every, int(first.step), run.total_steps
  state, window = first, Window(meta.get('window'))
  losses: list[float] = []  # one mean per window
  skipped: list[int] = []  # step numbers

  def save(due: list[str]) -> None:
    watch.pause()
    writers.save(state, run.meta() | {'window': window.partial(), 'due': due})

  def save_and_stop(step: int, due: list[str]) -> tuple[TrainState, bool]:
    save(due)
    logs.say(f'preempted: saved step {step}; repeat the command to resume')
    return state, False

  def awaited() -> Iterator[Batch]:
    for step in range(start + 1, total + 1):
      with watch.doing('data', step), window.waiting_for_data():
        batch = next(data)
      yield batch

  def interrupt() -> None:
    """Excludes what follows from reports of hangs, and earlier time from the speed."""
    watch.pause()
    window.restart_clock()

  def run_hooks(step: int, names: list[str]) -> list[str]:
    """Returns the names of the hooks that are still due after a preemption notice."""
    if names:
      watch.pause()
    for i, name in enumerate(names):
      params = weights(state, run.config.sample_weights)
      try:
        hooks[name](run, params, step, log, notice.check)
      except preemption.Preempted:
        return names[i:]
      window.restart_clock()
    return []

  due = run_hooks(start, [name for name in meta.get('due', ()) if name in hooks])
  if due:
    return save_and_stop(start, due)
  if start < total:
    logs.say('compiling the training step ...')
  start_s = time.monotonic()
  stepping = steps(run, first, awaited())
  for step, state, metrics in trace.around(stepping, start, interrupt):
    window.add(metrics)
    trace.end(step, metrics, interrupt)
    progress.advance()
    if step == start + 1:
      jax.block_until_ready(metrics)
      logs.say(f'first step took {time.monotonic() - start_s:.1f} s with compilation')
      window.restart_clock()
      progress.restart(step)
    last = step == total
    if last or step % every.log_steps == 0:
      skipped_in_window, means = window.close(step, run.config.batch_size)
      skipped += skipped_in_window
      losses.append(means['loss'])
      means['skipped_steps'] = len(skipped)
      with watch.doing('logs', step):
        log.scalars(step, means | values_at(run.schedules, step - 1))
      shown = ('loss', 'grad_norm', 'images_per_s') + ('skipped_steps',) * bool(skipped)
      shown += ('data_wait',) * (means.get('data_wait', 0.0) > SHOWN_WAIT)
      progress.report(step, {key: means[key] for key in shown if key in means})
      check_skipped(skipped, run.config.max_skipped_steps, run.config.seed)
    if every.snapshot_steps and (last or step % every.snapshot_steps == 0):
      watch.pause()
      writers.snapshots.save(step, state, run.meta())
    steps_between = {name: getattr(every, f'{name}_steps') for name in hooks}
    due = [name for name, n in steps_between.items() if n and (last or step % n == 0)]
    if not notice.given():
      due = run_hooks(step, due)
    if due or (not last and notice.given()):
      return save_and_stop(step, due)
    # After the hooks: if a hook at the last step is killed, that step is repeated.
    if last or step % every.checkpoint_steps == 0:
      save([])
    if not last:
      watch.step(step + 1)  # not before the first step, which is compiled
  check_learned(losses, [s for s in skipped if s > start], total - start)
  return state, True
