"""One step of training: gradient, update, averages and metrics."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

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
  streams,
)

Step = Callable[[TrainState, Frozen, Batch], tuple[TrainState, dict[str, Array]]]


def make_train_step(
  loss: Loss,
  tx: optax.GradientTransformation,
  ema_decays: Mapping[str, Schedule],
  target_decay: Schedule | None,
  seed: int,
  accumulate: int = 1,
  *,
  unroll: bool = False,
) -> Step:
  """One optimiser step on the global batch: gradient, update, averages and metrics.

  The gradient is the mean over `accumulate` parts of the batch, which are processed in
  sequence with independent random keys: in a compiled loop or, with `unroll`, one after
  the other, which takes longer to compile. On CPUs, XLA runs gradients of convolutions
  in a compiled loop about ten times slower.

  A step with a loss, gradient or update that is not finite is skipped: it changes
  nothing but the step number, and its metric `skipped` is 1. All metrics are f32[];
  `loss_q1` to `loss_q4` are means over the quarters of the batch in order of sigma.
  """
  root = jax.random.key(seed)

  def train_step(state, frozen, batch):
    def mean_loss(params, part, keys):
      target = state.target if target_decay else None
      nets = Nets(params, target, **frozen._asdict())
      out = loss(nets, part, state.step, keys)
      return jnp.mean(out.loss), out

    keys = streams(root, state.step)
    gradient_of = jax.grad(mean_loss, has_aux=True)
    if accumulate > 1:
      gradient_of = _in_parts(gradient_of, accumulate, unroll)
    gradient, out = gradient_of(state.params, batch, keys)
    mean = jnp.mean(out.loss)
    norm = optax.tree.norm(gradient)
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    update_norm = optax.tree.norm(updates)
    params = optax.apply_updates(state.params, updates)
    target, ema = averages(state, params, ema_decays, target_decay)
    updated = TrainState(state.step, params, target, ema, opt_state)
    finite = jnp.isfinite(mean) & jnp.isfinite(norm) & jnp.isfinite(update_norm)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), updated, state)
    metrics = {'loss': mean, 'grad_norm': norm, 'update_norm': update_norm}
    metrics['skipped'] = 1.0 - finite
    metrics |= {f'mean_{name}': jnp.mean(v) for name, v in out.aux.items()}
    metrics |= _loss_by_quarter(out.loss, out.aux['sigma'])
    return new._replace(step=state.step + 1), metrics

  return train_step


Gradient = Callable[[Params, Batch, Mapping[str, Key]], tuple[Params, LossOut]]


def _in_parts(gradient_of: Gradient, num_parts: int, unroll: bool) -> Gradient:
  """The mean gradient over the parts of a batch, and the loss of each example."""

  def in_parts(params, batch, keys):
    def add_part(total, indexed):
      i, part = indexed
      if unroll:  # otherwise, all parts may be in memory at the same time
        total, part = jax.lax.optimization_barrier((total, part))
      part_keys = {name: jax.random.fold_in(key, i) for name, key in keys.items()}
      gradient, out = gradient_of(params, part, part_keys)
      return jax.tree.map(lambda a, b: a + b / num_parts, total, gradient), out

    def split(a):  # row r of part i is row r * num_parts + i: no row changes its device
      return jnp.swapaxes(jnp.reshape(a, (-1, num_parts, *a.shape[1:])), 0, 1)

    zeros = jax.tree.map(jnp.zeros_like, params)
    parts = (jnp.arange(num_parts), jax.tree.map(split, batch))
    gradient, out = jax.lax.scan(add_part, zeros, parts, unroll=unroll)
    return gradient, jax.tree.map(lambda a: jnp.reshape(a.T, -1), out)

  return in_parts


def averages(
  state: TrainState,
  params: Params,
  ema_decays: Mapping[str, Schedule],
  target_decay: Schedule | None,
) -> tuple[Params, dict[str, Params]]:
  """The target network and the EMAs after an update to `params`."""

  def average(old, decay):  # optax.incremental_update rounds differently
    weight = 1.0 - decay(state.step)
    return jax.tree.map(lambda a, p: a + weight * (p - a), old, params)

  target = None if target_decay is None else average(state.target, target_decay)
  return target, {k: average(old, ema_decays[k]) for k, old in state.ema.items()}


def _loss_by_quarter(loss: Array, sigma: Array) -> dict[str, Array]:
  quarter = jnp.argsort(jnp.argsort(sigma)) * 4 // len(sigma)
  means = {}
  for i in range(4):
    total = jnp.sum(jnp.where(quarter == i, loss, 0.0))
    means[f'loss_q{i + 1}'] = total / jnp.maximum(jnp.sum(quarter == i), 1)
  return means
