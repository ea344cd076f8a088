"""Contracts of objectives."""

from collections.abc import Callable
import inspect
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks, schedules
from cmjax.contract_parts import (
  BATCH,
  CENTRE,
  SHAPE,
  ContractError,
  all_finite,
  all_zero,
  compiled,
  contract,
  difference,
  exact_of_one_point,
  rows_that_differ,
  same,
  small_batch,
  small_model,
  small_reference,
)
from cmjax.core import (
  Batch,
  Key,
  Loss,
  LossOut,
  Model,
  Nets,
  Schedule,
  streams,
)
from cmjax.times import Pairs, Times, karras_pairs, logit_normal_pairs, lognormal

STEP = 7


class Draws(NamedTuple):
  """What an objective under test draws its times from: usual times, or extreme ones."""

  times: Times  # noise levels
  relative_gap: Schedule
  pairs: Pairs  # noise levels r < t
  unit_pairs: Pairs  # times r <= t of the linear process


USUAL = Draws(
  lognormal(mean=-1.1, std=2.0),
  schedules.constant(value=0.1),
  karras_pairs(num_scales=schedules.constant(value=18.0)),
  logit_normal_pairs(equal_fraction=0.5),
)
EXTREMES = ((1e-3, 0.9), (300.0, 0.9), (1e-3, 0.0), (300.0, 0.0))  # t, r / t


class ObjectiveCase(NamedTuple):
  """An objective to check: how to make it, and one whose network has dropout."""

  make: Callable[..., Loss]
  form: str
  from_zero: bool
  loss: Loss
  nets: Nets
  gradient: Callable[[Nets, Batch, dict[str, Key]], tuple[Nets, LossOut]]  # compiled


def built(make: Callable[..., Loss], f: Model, draws: Draws = USUAL) -> Loss:
  """make(f, draws), or make(f) if it does not name `draws`."""
  takes = 'draws' in inspect.signature(make).parameters
  return make(f, draws=draws) if takes else make(f)


def objective_case(
  make: Callable[..., Loss], *, form: str = 'edm', from_zero: bool = True
) -> ObjectiveCase:
  """The case of `check_objective`."""
  checks.choice(('edm', 'trigflow', 'two_time'), form=form)
  f, params = small_model(form, dropout=0.5)
  nets = Nets(params, params, params, reference=small_reference())
  loss = built(make, f)

  def mean(nets, batch, keys):
    out = loss(nets, batch, jnp.int32(STEP), keys)
    if not isinstance(out, LossOut) or 'sigma' not in out.aux:
      raise ContractError("return LossOut(loss, aux), with noise levels aux['sigma']")
    return jnp.mean(out.loss), out

  gradient = compiled(jax.grad(mean, has_aux=True, allow_int=True))
  return ObjectiveCase(make, form, from_zero, loss, nets, gradient)


def keys_of_step(seed: int = 3) -> dict[str, Key]:
  """The random keys of STEP."""
  return streams(jax.random.key(seed), STEP)


def _measured(
  case: ObjectiveCase, batch: Batch | None = None, seed: int = 3
) -> tuple[Nets, LossOut]:
  return case.gradient(case.nets, batch or small_batch(), keys_of_step(seed))


@contract
def losses_are_finite(case: ObjectiveCase) -> None:
  """LossOut(loss, aux) holds one finite f32 per example, and aux has `sigma`."""
  out = _measured(case)[1]
  for name, value in {'loss': out.loss, **out.aux}.items():
    if value.shape != (BATCH,):
      raise ContractError(
        f'{name} has shape {value.shape} for {BATCH} examples; return f32[B]'
      )
  if out.loss.dtype != jnp.float32:
    raise ContractError(f'loss is {out.loss.dtype}; compute it in float32')
  if not all_finite(out.loss):
    raise ContractError(f'loss is {out.loss}; avoid 0 / 0 and overflow')


@contract
def draws_come_from_keys(case: ObjectiveCase) -> None:
  """Equal keys give equal losses, other keys others; no key is used for two draws.

  The network has dropout. The objective is traced twice: a draw of NumPy, or a state
  outside the arguments, is another constant the second time.
  """

  def traced():
    def loss(nets, batch, keys):  # a new function, which is traced again
      return case.loss(nets, batch, jnp.int32(STEP), keys)

    program = jax.make_jaxpr(loss)(case.nets, small_batch(), keys_of_step())
    return re.sub('0x[0-9a-f]+', '', str(program.jaxpr)), program.consts

  try:
    first, again, other = (_measured(case, seed=seed)[1].loss for seed in (3, 3, 4))
    with jax.debug_key_reuse(True):
      (text, values), (text_again, values_again) = traced(), traced()
  except jax.errors.KeyReuseError as error:
    raise ContractError(
      'a key is used for two draws; use each of `keys` for one, or split it'
    ) from error
  if not same(first, again):
    raise ContractError('equal arguments give other losses; draw from `keys` alone')
  if same(first, other):
    raise ContractError('other keys give equal losses; draw from `keys`')
  if text != text_again or not all(map(same, values, values_again)):
    raise ContractError(
      'traced twice, it is not the same program; draw from `keys` with jax.random, and '
      'keep no state'
    )


@contract
def examples_are_independent(case: ObjectiveCase) -> None:
  """The loss of an example depends on that example alone."""
  batch = small_batch()
  changed = batch._replace(x0=batch.x0.at[3].add(0.1))
  rows = rows_that_differ(_measured(case)[1].loss, _measured(case, changed)[1].loss)
  if rows != [3]:
    raise ContractError(
      f'another x0 of example 3 changes the losses of the examples {rows}, not [3]; '
      'compute nothing over the batch'
    )


@contract
def online_alone_is_trained(case: ObjectiveCase) -> None:
  """The gradient of the online network is finite and not zero; others have none."""
  gradient, _ = _measured(case)
  if not all_finite(gradient.online):
    raise ContractError('the gradient is not finite; give norms and divisors a floor')
  if all_zero(gradient.online):
    raise ContractError('the gradient is zero; evaluate f(nets.online, ...)')
  for name in ('target', 'teacher', 'reference'):
    if not all_zero(getattr(gradient, name)):
      raise ContractError(f'nets.{name} has a gradient; use jax.lax.stop_gradient')


@contract
def target_is_a_constant(case: ObjectiveCase) -> None:
  """Without a target network, the target is the stop-gradient of the online one.

  Or ValueError is raised, with 'Nets.target is None'.
  """

  @compiled
  @jax.grad
  def gradient(online):
    nets = case.nets._replace(online=online, target=None)
    return jnp.mean(
      case.loss(nets, small_batch(), jnp.int32(STEP), keys_of_step()).loss
    )

  try:
    alone = gradient(case.nets.online)
  except ValueError as error:
    if 'Nets.target is None' in str(error):
      return  # it needs a target network, and says so
    raise
  error = difference(alone, _measured(case)[0].online)
  if not error <= 1:
    raise ContractError(
      'the gradient without a target network is not that with a copy of the online '
      f'one (by {error:.1g} times what rounding explains); use nets.target_params(), '
      'which stops the gradient'
    )


@contract
def exact_model_has_no_loss(case: ObjectiveCase) -> None:
  """For data that is one point, the loss is zero at the exact model, and only there.

  A denoiser, a consistency function and a flow map are then the same: that point.
  """
  with jax.enable_x64(True):
    loss = built(case.make, exact_of_one_point(case.form))
    batch = small_batch()._replace(x0=jnp.full((BATCH, *SHAPE), CENTRE))
    reference = small_reference()
    reference = reference._replace(examples=jnp.full_like(reference.examples, CENTRE))

    def total(params):
      nets = Nets(params, params, params, reference=reference)
      losses = loss(nets, batch, jnp.int32(STEP), keys_of_step()).loss
      return jnp.sum(losses), losses

    measure = compiled(jax.grad(total, has_aux=True))
    (gradient, exact), (_, other) = measure(1.0), measure(1.1)
    largest, least = float(jnp.max(jnp.abs(exact))), float(jnp.min(other))
  # Measured 1e-10 for pd, whose levels are float32 in any mode; else 1e-27 at most.
  if not largest <= 1e-9:
    raise ContractError(
      f'the loss of the exact model is {largest:.1e}; it must be zero'
    )
  if not np.isfinite(gradient):
    raise ContractError('the gradient at the exact model is not finite; floor norms')
  if not least > 1e-7:
    raise ContractError(
      f'the loss of a wrong model is {least:.1e}; it must be positive'
    )


@contract
def extreme_times_are_finite(case: ObjectiveCase, dtype: str = 'float32') -> None:
  """Loss and gradient are finite for t = 0.001 and 300, and r near t and 0.

  Needs a `make` that takes `draws`. `dtype`: of the network, also 'bfloat16'.
  """
  f, params = small_model(case.form, dtype=dtype)
  at: dict[str, Any] = dict(t=1.0, ratio=0.9)  # read when traced: compiled once

  def pairs(key, n, step):
    return jnp.full(n, at['t']), jnp.full(n, at['ratio'] * at['t'])

  def unit_pairs(key, n, step):
    t = jnp.full(n, jnp.minimum(at['t'], 1.0))
    return t, at['ratio'] * t

  draws = Draws(
    lambda key, n: jnp.full(n, at['t']),
    lambda step: 1.0 - at['ratio'],
    pairs,
    unit_pairs,
  )
  loss = built(case.make, f, draws)

  @compiled
  @jax.value_and_grad
  def mean(params, t, ratio):
    at.update(t=t, ratio=ratio)
    still = jax.lax.stop_gradient(params)
    nets = Nets(params, still, still, reference=small_reference())
    return jnp.mean(loss(nets, small_batch(), jnp.int32(STEP), keys_of_step()).loss)

  for t, ratio in EXTREMES:
    if ratio > 0 or case.from_zero:
      value, gradient = mean(params, t, ratio)
      if not np.isfinite(value) or not all_finite(gradient):
        what = 'gradient' if np.isfinite(value) else 'loss'
        raise ContractError(
          f'the {what} is not finite at t = {t:g}, r = {ratio * t:g} with a network in '
          f'{dtype}; at r = 0 give the network another time and select afterwards'
        )


OBJECTIVE = (
  losses_are_finite,
  draws_come_from_keys,
  examples_are_independent,
  online_alone_is_trained,
  target_is_a_constant,
  exact_model_has_no_loss,
  extreme_times_are_finite,
)
