"""The vocabulary every other module speaks: values, protocols and key streams."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NewType, Protocol
import zlib

import jax
import jax.numpy as jnp

Array = jax.Array
Key = jax.Array
Params = Any
Perceptual = NewType('Perceptual', object)  # parameters of a network of features
Schedule = Callable[[Array], Array]  # step i32[] -> f32[]
Denoiser = Callable[[Array, Array], Array]  # (x f32[B, ...], t f32[B]) -> E[x0 | x_t]
Field = Callable[[Array, Array], Array]  # (x f32[B, ...], t f32[B]) -> dx/dt
Solver = Callable[[Field, Array, Array, Array], Array]  # (field, x, t, r) -> x_r


MOST_LETTERS = 600  # of an error


class UserError(ValueError):
  """A mistake in what the user gave: one line that says what, where and the way out.

  A longer value than a line can hold is cut in its middle.
  """

  def __init__(self, text: str):
    line = ' '.join(str(text).split())
    if len(line) > MOST_LETTERS:
      half = MOST_LETTERS // 2
      line = f'{line[:half]} [...] {line[-half:]}'
    super().__init__(line)


class Batch(NamedTuple):
  """Examples as the objectives see them."""

  x0: Array  # f32[B, ...] data; images in [-1, 1]
  cond: Array | None  # f32[B, K] one-hot label, or zeros where it is dropped
  index: Array | None = None  # i32[B] which examples of the source these are


class Nets(NamedTuple):
  """The parameters an objective may use; only `online` is differentiated."""

  online: Params
  target: Params = None  # None: the stop-gradient of `online`
  teacher: Params = None
  perceptual: Params = None
  reference: Params = None

  def fixed(self) -> Params:
    """theta^-: the target network's, or the stop-gradient of `online`."""
    return jax.lax.stop_gradient(self.online if self.target is None else self.target)


class Frozen(NamedTuple):
  """What a step reads and never changes: an argument of it, never a closure."""

  teacher: Params = None
  perceptual: Params = None
  reference: Params = None


class LossOut(NamedTuple):
  """One number an example, not averaged, and what is worth logging beside it."""

  loss: Array  # f32[B]
  aux: Mapping[str, Array]  # f32[B] each; `t` is always there


class TrainState(NamedTuple):
  """Everything that cannot be recomputed, and nothing else."""

  step: Array  # i32[]
  params: Params
  target: Params  # None where the objective uses stop-gradient of `params`
  ema: dict[str, Params]
  opt_state: Any


class Network(NamedTuple):
  """A raw network F as pure functions.

  c_noise is f32[B], or f32[B, clocks] for a network of several times.
  """

  init: Callable[..., Params]  # (key, x, c_noise, cond) -> params
  apply: Callable[..., Array]  # (params, x, c_noise, cond, *, key=None) -> F
  clocks: int = 1
  log_weight: Callable[..., Array] | None = None  # (params, c_noise) -> f32[B], learned


LOG_WEIGHT = 'log_weight'  # the parameters of a network's learned weighting


class Model(Protocol):
  """A preconditioned network: a denoiser D or a consistency function f."""

  def __call__(
    self,
    params: Params,
    x: Array,
    t: Array,
    cond: Array | None,
    *,
    key: Key | None = None,
  ) -> Array:
    """f32[B, ...] at noise levels f32[B] -> f32[B, ...]; dropout only under a key."""


class Loss(Protocol):
  """An objective, pure and written for the global batch."""

  def __call__(
    self, nets: Nets, batch: Batch, step: Array, keys: Mapping[str, Key]
  ) -> LossOut:
    """Draws times and noise from `keys`, and returns one loss an example."""


STREAMS = ('time', 'noise', 'dropout', 'label')


def streams(root: Key, step: Array | int) -> dict[str, Key]:
  """The step's keys by name: nothing random is ever saved."""
  at_step = jax.random.fold_in(root, step)
  return {
    name: jax.random.fold_in(at_step, zlib.crc32(name.encode())) for name in STREAMS
  }


def first_line(error: Exception) -> str:
  """What an error says, in one line of at most 160 characters."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def unused(path: Path, suffix: str = '') -> Path:
  """The path itself, or with the first number that no file or folder has yet."""
  candidate, number = path.with_name(path.name + suffix), 2
  while candidate.exists():
    candidate, number = path.with_name(f'{path.name}_{number}{suffix}'), number + 1
  return candidate


def drop_labels(cond: Array | None, key: Key, share: float) -> Array | None:
  """One-hot labels f32[B, K], zeros in that share of the rows: no label.

  Raises: ValueError for a share above zero without labels.

  Source: Ho & Salimans 2022 (classifier-free guidance), algorithm 1.
  """
  if share == 0:
    return cond
  if cond is None:
    raise ValueError(f'label_dropout={share} needs labels; the data has none')
  kept = jax.random.bernoulli(key, 1.0 - share, (len(cond), 1))
  return jnp.where(kept, cond, 0.0)


def expand(t: Array, x: Array) -> Array:
  """f32[B] -> f32[B, 1, ...] with the rank of x f32[B, ...]."""
  return jnp.reshape(t, t.shape + (1,) * (x.ndim - t.ndim))


def sum_features(x: Array) -> Array:
  """f32[B, ...] -> f32[B], summed over all but the first axis."""
  return jnp.sum(x, axis=tuple(range(1, x.ndim)))
