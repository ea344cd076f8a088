"""One table walks every function that is built from numbers: nonsense is refused."""

import inspect
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import (
  checks,
  core,
  distances,
  oracles,
  precond,
  process,
  samplers,
  schedules,
  studies,
  times,
)
from cmjax.objectives import (
  continuous,
  denoise,
  discrete,
  meanflow,
  progressive,
  trigflow,
)

RUN = dict(batch_size=8, total_images=80)
GRID = dict(sigma_min=0.002, sigma_max=80.0, rho=7.0)
LEVELS = dict(lowest=0.1, highest=10.0, count=2)
STAGES = dict(stage_images=24, batch_size=8)
NETWORK = core.Network(None, None)
DRAW = times.lognormal(mean=0.0, std=1.0)
HALF = schedules.constant(value=0.5)
BINS = schedules.constant(value=18.0)
SQUARED = dict(distance=distances.squared_l2(), weighting=distances.uniform())
PAIRS = times.karras_pairs(bins=BINS)
TRIGFLOW = precond.trigflow(NETWORK)
TWO_TIME = precond.two_time(core.Network(None, None, clocks=2))
TAUGHT = dict(f=None, teacher=None, times=DRAW, **SQUARED)
SUBJECT = dict(subject=studies.Subject(None, core.Nets(None), jnp.ones((3, 2)), None))
ORACLE = oracles.gaussian(np.zeros(2), 1.0)

# Every function with numbers, and values that it takes.
TAKEN = {
  process.trigflow: dict(sigma_data=0.5),
  schedules.constant: dict(value=1.0),
  schedules.cosine: RUN | dict(peak=1.0, warmup_images=8),
  schedules.warmup: dict(peak=1.0, batch_size=8, warmup_images=8),
  schedules.inverse_root: dict(
    peak=1.0, hold_images=16, rampup_images=16, batch_size=8
  ),
  schedules.half_life: dict(half_life_images=80, batch_size=8, rampup_ratio=0.05),
  schedules.power: dict(relative_std=0.1),
  schedules.shrinking_gap: RUN | dict(q=2.0, stage_images=80),
  schedules.adaptive_bins: RUN | dict(start=2, end=10),
  schedules.adaptive_target_rate: RUN | dict(start_rate=0.9, start=2, end=10),
  schedules.doubling_bins: RUN | dict(start=2, end=8),
  schedules.halving_steps: STAGES | dict(start=8),
  schedules.copy_at_stages: STAGES,
  schedules.stage_decay: STAGES | dict(peak=1.0),
  distances.pseudo_huber: dict(c=0.1),
  distances.edm_weighting: dict(sigma_data=0.5),
  precond.edm: dict(network=NETWORK, sigma_data=0.5),
  precond.consistency: dict(network=NETWORK, sigma_data=0.5, sigma_min=0.002),
  precond.trigflow: dict(network=NETWORK, sigma_data=0.5),
  times.lognormal: dict(mean=0.0, std=1.0),
  times.karras_uniform: GRID,
  times.karras_pairs: GRID | dict(bins=BINS),
  times.lognormal_pairs: GRID | dict(bins=BINS, mean=0.0, std=1.0),
  times.ect_pairs: dict(times=DRAW, gap=HALF, k=8.0, b=1.0),
  times.two_times: dict(mean=0.0, std=1.0, equal_share=0.5),
  times.dyadic_times: dict(finest=8, flow_share=0.5),
  samplers.multistep: dict(times=(80.0, 1.0), sigma_min=0.002),
  samplers.one_step: dict(sigma_max=80.0),
  samplers.ode: GRID | dict(steps=18),
  samplers.phased: dict(edges=(1.0,), sigma_max=80.0, skip=0.9),
  denoise.edm: dict(f=None, times=DRAW, sigma_data=0.5, label_dropout=0.1),
  discrete.ect: dict(f=None, times=DRAW, gap=HALF, k=8.0, b=1.0, **SQUARED),
  discrete.ict: GRID | dict(f=None, bins=BINS, c=0.1, mean=0.0, std=1.0),
  discrete.cd: dict(f=None, teacher=None, pairs=PAIRS, guidance=1.0, **SQUARED),
  discrete.stable_ct: dict(
    f=None, times=DRAW, gap=HALF, threshold=1.0, block=8, k=8.0, b=1.0, **SQUARED
  ),
  continuous.theorem3: TAUGHT | dict(guidance=1.0),
  continuous.theorem4: TAUGHT | dict(guidance=1.0, distance=distances.l1()),
  continuous.cd: TAUGHT | dict(guidance=1.0),
  trigflow.sct: dict(f=TRIGFLOW, times=DRAW, warmup=HALF, normaliser=0.1),
  trigflow.scd: dict(
    f=TRIGFLOW, teacher=None, times=DRAW, warmup=HALF, normaliser=0.1, guidance=1.0
  ),
  meanflow.meanflow: dict(
    f=TWO_TIME,
    pairs=times.two_times(),
    power=1.0,
    c=0.01,
    guidance=2.0,
    label_dropout=0.1,
  ),
  meanflow.shortcut: dict(f=TWO_TIME, finest=8, flow_share=0.5),
  progressive.pd: GRID | dict(f=None, steps=BINS, **SQUARED),
  studies.map_error: SUBJECT
  | LEVELS
  | dict(oracle=ORACLE, samples=4, s=0.002, steps=4),
  studies.tangents: SUBJECT | LEVELS | dict(samples=4, draws=4, subset=2),
  studies.normalised_bias: SUBJECT | LEVELS | dict(c=0.0, samples=4, draws=4),
  studies.gradient_noise: SUBJECT | dict(bins=2, batches=2),
  studies.jvp_precision: SUBJECT | dict(samples=4),
  studies.discrete_limit: SUBJECT | dict(samples=4, sigma_min=0.01, sigma_max=10.0),
}
ANY_SIGN = {'mean', 'value', 'k', 'b', 'guidance'}
MAY_BE_ZERO = ANY_SIGN | {
  *('peak', 'warmup_images', 'rampup_images', 'rampup_ratio', 'c', 'power'),
  *('threshold', 'label_dropout', 'equal_share', 'flow_share', 'sigma_min'),
}
# Exceptions: a zero that ends a grid or divides, and one that says "not known".
NOT_ZERO = {(meanflow.meanflow, 'c')}
NOT_ZERO |= {(f, 'sigma_min') for f, taken in TAKEN.items() if 'sigma_max' in taken}
ZERO = {(schedules.shrinking_gap, 'total_images')}
COUNTS = {
  *('start', 'end', 'finest', 'steps', 'block', 'count', 'samples', 'draws', 'subset'),
  *('bins', 'batches'),
}


def name_of(function):
  return f'{function.__module__.rpartition(".")[2]}:{function.__name__}'


NUMBERS = [
  pytest.param(function, name, id=f'{name_of(function)} {name}')
  for function, taken in TAKEN.items()
  for name, value in taken.items()
  if isinstance(value, (int, float))
]
MODULES = (
  *(process, schedules, distances, precond, times, samplers, studies, continuous),
  *(denoise, discrete, meanflow, progressive, trigflow),
)
BUILT = {
  *(process.Process, core.Schedule, distances.Distance, distances.Weighting),
  *(core.Model, times.Times, times.Pairs, samplers.Sampler, core.Loss, studies.Study),
}


def test_every_number_of_every_builder_is_in_the_table():
  there = {m.__name__ for m in MODULES}
  for function in itertools.chain.from_iterable(vars(m).values() for m in MODULES):
    own = inspect.isfunction(function) and function.__module__ in there
    if not own or function.__name__.startswith('_'):
      continue
    signature = inspect.signature(function)
    if signature.return_annotation in BUILT:
      kinds = {name: p.annotation for name, p in signature.parameters.items()}
      numbers = {name for name, kind in kinds.items() if kind in (int, float)}
      assert numbers <= set(TAKEN.get(function, ())), name_of(function)


@pytest.mark.parametrize('function', TAKEN, ids=name_of)
def test_the_values_of_the_table_are_taken(function):
  if function.__module__ != studies.__name__:  # a study computes
    function(**TAKEN[function])


@pytest.mark.parametrize(('function', 'name'), NUMBERS)
def test_numbers_that_cannot_work_are_refused_by_name(function, name):
  bad = [math.nan, math.inf, -math.inf]
  if name not in ANY_SIGN:
    bad.append(-1)
  if (name not in MAY_BE_ZERO or (function, name) in NOT_ZERO) and (
    (function, name) not in ZERO
  ):
    bad.append(0)
  if name in COUNTS:
    bad += [10**10, 2.5]
  for value in bad:
    with pytest.raises(ValueError, match=rf'\b{name}\b') as error:
      function(**TAKEN[function] | {name: value})
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('function', 'name', 'bad'),
  [
    (samplers.multistep, 'times', (math.nan,)),
    (samplers.multistep, 'times', (math.inf, 1.0)),
    (samplers.flow_map, 'times', (80.0, math.nan)),
    (samplers.phased, 'edges', (math.nan,)),
    (samplers.phased, 'edges', (1.0, math.inf)),
    (discrete.stable_ct, 'edges', (math.nan,)),
    (discrete.stable_ct, 'edges', (2.0, 1.0)),
    (studies.jvp_precision, 'steps', (0.0,)),
    (studies.jvp_precision, 'steps', (math.nan,)),
    (studies.jvp_precision, 'steps', ()),
    (studies.discrete_limit, 'points', (1,)),
    (studies.discrete_limit, 'points', ()),
  ],
)
def test_sequences_that_cannot_work_are_refused_by_name(function, name, bad):
  with pytest.raises(ValueError, match=name):
    function(**TAKEN.get(function, {}) | {name: bad})


@pytest.mark.parametrize('function', [times.karras_pairs, samplers.ode, progressive.pd])
def test_grids_that_do_not_descend_are_refused(function):
  with pytest.raises(ValueError, match='needs sigma_min < sigma_max'):
    function(**TAKEN[function] | dict(sigma_min=80.0))


@pytest.mark.parametrize('value', ['0.5', None, 10**400])
def test_what_is_no_number_is_refused(value):
  with pytest.raises(ValueError, match='sigma must be finite and above 0, got '):
    checks.positive(sigma=value)
