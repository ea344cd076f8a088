"""The records within a config, and what they declare about their keys."""

import dataclasses
from typing import Annotated, NamedTuple

from ml_collections import ConfigDict

MAX_STEPS = 2**31 - 1  # a step is an int32


class Bounds(NamedTuple):
  """The least and the greatest value of a number."""

  low: float
  high: float


class MayChange(NamedTuple):
  """Marks a key that may change when a run resumes; of a part, only some keys may."""

  keys: tuple[str, ...] = ()  # empty: all


MAY_CHANGE = MayChange()


class OneOf(NamedTuple):
  """The texts that a key may have."""

  choices: tuple[str, ...]


Count = Annotated[int, Bounds(1, 2**24)]
Seed = Annotated[int, Bounds(0, 2**32 - 1)]  # jax drops higher bits
Steps = Annotated[int, Bounds(1, MAX_STEPS)]
StepsOrNever = Annotated[int, Bounds(0, MAX_STEPS)]
Part = Annotated[ConfigDict, 'part']  # a dict with `fn`
OptionalPart = Annotated[ConfigDict, 'optional part']  # may be empty
Parts = Annotated[ConfigDict, 'parts']  # a dict of parts, named by the user


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
  """The samples that metrics measure, and those that pictures show."""

  num_samples: Annotated[int, Bounds(2, 2**24)]
  batch_size: Count
  seed: Seed
  num_seeds: Annotated[int, Bounds(1, 1000)]
  labels: Annotated[str, OneOf(('data', 'balanced'))]
  num_pictured: Annotated[int, Bounds(1, 2**16)]


@dataclasses.dataclass(frozen=True, slots=True)
class Search:
  """What `--mode=search` varies, and the metric that it improves."""

  sampler: str
  key: str
  metric: str
  maximise: bool
  low: float
  high: float
  num_steps: Annotated[int, Bounds(2, 100)]
  max_evaluations: Annotated[int, Bounds(3, 1000)]
  num_samples: Annotated[int, Bounds(2, 2**24)]
  seed: Seed


@dataclasses.dataclass(frozen=True, slots=True)
class Loader:
  """How batches of data on disk are read ahead; without effect on the batches."""

  workers: Annotated[int, Bounds(0, 1024)]
  threads: Annotated[int, Bounds(1, 1024)]
  ahead: Annotated[int, Bounds(1, 1024)]


@dataclasses.dataclass(frozen=True, slots=True)
class Every:
  """Intervals, in steps, of what a run does besides training; 0: never."""

  log_steps: Steps
  picture_steps: StepsOrNever
  evaluate_steps: StepsOrNever
  checkpoint_steps: Steps
  snapshot_steps: StepsOrNever


@dataclasses.dataclass(frozen=True, slots=True)
class Watchdog:
  """When a training step that hangs is reported, and when it ends the process."""

  report_s: Annotated[float, Bounds(0.1, 1e9)]
  stop_s: Annotated[float, Bounds(0.0, 1e9)]
