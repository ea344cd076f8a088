"""Types and functions that all modules share: batches, models, losses, random keys."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NewType, Protocol
import zlib

import jax
import jax.numpy as jnp

Array = jax.Array
Key = jax.Array
Params = Any
Perceptual = NewType('Perceptual', object)  # parameters of a perceptual network
Schedule = Callable[[Array], Array]  # step i32[] -> f32[]
Denoiser = Callable[[Array, Array], Array]  # (x f32[B, ...], sigma f32[B]) -> E[x0 | x]
Field = Callable[[Array, Array], Array]  # (x f32[B, ...], t f32[B]) -> dx/dt
Solver = Callable[[Field, Array, Array, Array], Array]  # (field, x, t, r) -> x_r


MAX_ERROR_LENGTH = 600  # characters


class UserError(ValueError):
  """An error in the user's input, in one line: where, what is wrong, what to do.

  A message of more than MAX_ERROR_LENGTH characters is shortened in the middle.
  """

  def __init__(self, text: str):
    line = ' '.join(str(text).split())
    if len(line) > MAX_ERROR_LENGTH:
      half = MAX_ERROR_LENGTH // 2
      line = f'{line[:half]} [...] {line[-half:]}'
    super().__init__(line)


class RetryError(UserError):
  """A service does not answer; the same command may succeed later."""


class Batch(NamedTuple):
  """A batch of training examples."""

  x0: Array  # f32[B, ...] data; images in [-1, 1]
  cond: Array | None  # f32[B, K] one-hot labels; a dropped label is all zeros
  indices: Array | None = None  # i32[B] positions of the examples in the data set


class Noisy(NamedTuple):
  """Noisy examples x_t, and the other inputs of a network."""

  x: Array  # f32[B, ...] x_t
  t: Array  # f32[B] times of the objective's process
  cond: Array | None  # f32[B, K] one-hot labels
  key: Key | None  # for dropout; None disables it


class Nets(NamedTuple):
  """The parameters of an objective; gradients are with respect to `online` only."""

  online: Params
  target: Params = None  # None: the stop-gradient of `online`
  teacher: Params = None
  perceptual: Params = None  # of the network inside a perceptual distance
  reference: Params = None  # a `fields.Reference`

  def target_params(self) -> Params:
    """theta^-: those of the target network, or the stop-gradient of `online`."""
    return jax.lax.stop_gradient(self.online if self.target is None else self.target)


class Frozen(NamedTuple):
  """Constants of a training step; passed to it, so that jit does not embed them."""

  teacher: Params = None
  perceptual: Params = None
  reference: Params = None


class LossOut(NamedTuple):
  """The loss of each example, not averaged, and metrics of each example to log."""

  loss: Array  # f32[B]
  aux: Mapping[str, Array]  # f32[B] each; `sigma` is always included


class TrainState(NamedTuple):
  """The state of training that cannot be recomputed."""

  step: Array  # i32[]
  params: Params
  target: Params  # None if the target is the stop-gradient of `params`
  ema: dict[str, Params]
  opt_state: Any


class Network(NamedTuple):
  """A raw network F as pure functions.

  c_noise is f32[B], or f32[B, num_times] if num_times > 1.
  """

  init: Callable[..., Params]  # (key, x, c_noise, cond) -> params
  apply: Callable[..., Array]  # (params, x, c_noise, cond, *, key=None) -> F
  num_times: int = 1
  # A learned loss weighting: (params, c_noise) -> log w f32[B].
  log_weight: Callable[..., Array] | None = None


# Keys of the network's parameters: the learned weighting, and the layer that takes
# the labels of an augmentation.
LOG_WEIGHT = 'log_weight'
MAP_AUGMENT = 'map_augment'


class Model(Protocol):
  """A preconditioned network: a denoiser D or a consistency function f."""

  def __call__(
    self,
    params: Params,
    x: Array,
    sigma: Array,
    cond: Array | None,
    /,
    *,
    key: Key | None = None,
  ) -> Array:
    """x f32[B, ...] with noise levels sigma f32[B] > 0 -> f32[B, ...].

    x is on the VE process, x0 + sigma z. Dropout is active only if a key is given.
    """
    ...


class Loss(Protocol):
  """An objective: a pure function of the global batch."""

  def __call__(
    self, nets: Nets, batch: Batch, step: Array, keys: Mapping[str, Key], /
  ) -> LossOut:
    """Draws times and noise from `keys` and returns one loss per example."""
    ...


# Names of the random keys of a step.
STREAMS = ('time', 'noise', 'dropout', 'label', 'augmentation')


def streams(root: Key, step: Array | int) -> dict[str, Key]:
  """The random keys of one step by name; they depend on root and step only."""
  at_step = jax.random.fold_in(root, step)
  return {
    name: jax.random.fold_in(at_step, zlib.crc32(name.encode())) for name in STREAMS
  }


def first_line(error: Exception) -> str:
  """The first line of an error's message, at most 160 characters."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def unused(path: Path, suffix: str = '', taken: Collection[str] = ()) -> Path:
  """`path` + suffix; if it exists, `path`_N + suffix with the smallest free N >= 2.

  Names in `taken`, which are without the suffix, count as existing.
  """
  candidate, number = path.with_name(path.name + suffix), 2
  while candidate.exists() or candidate.name.removesuffix(suffix) in taken:
    candidate, number = path.with_name(f'{path.name}_{number}{suffix}'), number + 1
  return candidate


def drop_labels(cond: Array | None, key: Key, fraction: float) -> Array | None:
  """One-hot labels f32[B, K], set to zero in a random fraction of the rows.

  Raises: ValueError if fraction > 0 and there are no labels.

  Source: Ho & Salimans 2022 (classifier-free guidance), algorithm 1.
  """
  if fraction == 0:
    return cond
  if cond is None:
    raise ValueError(f'label_dropout={fraction} needs labels, and cond is None')
  keep = jax.random.bernoulli(key, 1.0 - fraction, (len(cond), 1))
  return jnp.where(keep, cond, 0.0)


def expand(t: Array, x: Array) -> Array:
  """t f32[B] -> f32[B, 1, ...], of the rank of x f32[B, ...], to broadcast over it."""
  return jnp.reshape(t, t.shape + (1,) * (x.ndim - t.ndim))


def sum_features(x: Array) -> Array:
  """f32[B, ...] -> f32[B]: the sum over all axes but the first."""
  return jnp.sum(x, axis=tuple(range(1, x.ndim)))
