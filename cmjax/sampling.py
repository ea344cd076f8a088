"""Draws samples batch by batch, on all devices."""

from collections.abc import Callable, Collection, Iterator
import functools
from typing import NamedTuple

import jax
import numpy as np

from cmjax.core import Array, Model, Params
from cmjax.data.source import clip, one_hot_labels
from cmjax.runtime import logs, sharding
from cmjax.runtime.reopen import Opened
from cmjax.runtime.run import Run
from cmjax.runtime.sampler_check import sigmas_of
from cmjax.samplers import Sampler

Subject = Run | Opened
Check = Callable[[], None]  # called before each batch; may raise to stop


class Drawn(NamedTuple):
  """Samples of one sampler."""

  x: np.ndarray  # f32[N, ...], clipped to the range of the data
  labels: np.ndarray | None  # i[N], labels that the samples were conditioned on
  evaluations: int  # of the network, per sample


class DrawnBatch(NamedTuple):
  """A batch on the devices, by example; the last one is padded."""

  index: int  # of the batch
  x: Array  # f32[B, ...], not clipped
  labels: Array | None  # i32[B]
  size: int  # samples without the padding


class Draws(NamedTuple):
  """Samples that are drawn when they are iterated over.

  Up to rounding, sample i depends only on `seed` and i: neither on the batch size nor
  on the number of devices.
  """

  subject: Subject
  params: Params
  sampler: Sampler
  num_samples: int
  seed: int

  @property
  def batch_size(self) -> int:
    """Samples per batch, a multiple of the number of devices."""
    size = min(self.subject.config.evaluation.batch_size, self.num_samples)
    return -(-size // self.subject.mesh.size) * self.subject.mesh.size

  @property
  def num_batches(self) -> int:
    """Batches of all samples; the last one is padded."""
    return -(-self.num_samples // self.batch_size)

  def batches(
    self, check: Check = lambda: None, skipped: Collection[int] = ()
  ) -> Iterator[DrawnBatch]:
    """Draws each batch that is not skipped; `check` is called before each."""
    source, mesh, size = self.subject.source, self.subject.mesh, self.batch_size
    sample_batch = _compiled(self.subject.f, self.sampler, source.shape, mesh)
    by_example = sharding.by_example(mesh)
    missing = sorted(set(range(self.num_batches)) - set(skipped))
    for i in logs.counted(missing, size, 'samples'):
      check()
      indices = np.arange(i * size, (i + 1) * size)
      cond, labels = None, labels_of(self.subject, indices)
      if labels is not None:
        cond = sharding.place(one_hot_labels(labels, source.classes), by_example)
        labels = sharding.place(labels.astype(np.int32), by_example)
      indices = sharding.place(indices.astype(np.uint32), by_example)
      x = sample_batch(self.params, jax.random.key(self.seed), indices, cond)
      yield DrawnBatch(i, x, labels, min(size, self.num_samples - i * size))


def draw(
  subject: Subject,
  params: Params,
  sampler: Sampler,
  *,
  num_samples: int,
  seed: int,
  check: Check = lambda: None,
) -> Drawn:
  """Draws samples; up to rounding, sample i depends only on `seed` and i.

  It depends neither on the batch size nor on the number of devices.
  """
  draws = Draws(subject, params, sampler, num_samples, seed)
  copies = jax.jit(lambda x: x, out_shardings=sharding.replicated(subject.mesh))
  x = [np.asarray(copies(x))[:kept] for _, x, _, kept in draws.batches(check)]
  labels = labels_of(subject, np.arange(num_samples))
  x = clip(subject.source, np.concatenate(x))
  return Drawn(x, labels, evaluations(subject, params, sampler))


def labels_of(subject: Subject, index: np.ndarray) -> np.ndarray | None:
  """Labels i[N] of the samples with these indices; None if unconditional.

  Those of the data in order, repeated as needed, or each class in turn, according to
  `config.evaluation.labels`.
  """
  source = subject.source
  if source.labels is None:
    return None
  if subject.config.evaluation.labels == 'balanced':
    return index % source.classes
  return source.labels[index % len(source.labels)]


def evaluations(subject: Subject, params: Params, sampler: Sampler) -> int:
  """Network evaluations per sample, without computing any."""
  source = subject.source
  classes = 0 if source.labels is None else source.classes
  return len(sigmas_of(sampler, subject.f, params, source.shape, classes))


@functools.lru_cache(maxsize=16)
def _compiled(
  f: Model, sampler: Sampler, shape: tuple[int, ...], mesh: jax.sharding.Mesh
) -> Callable[..., Array]:
  _say_once('compiling a sampler ...')

  def sample_batch(params, root, index, cond):
    keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(index)
    return sampler(f, params, keys, cond, shape).x

  return jax.jit(sample_batch, out_shardings=sharding.by_example(mesh))


@functools.cache
def _say_once(line: str) -> None:  # a search compiles dozens
  logs.say(line)
