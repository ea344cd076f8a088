"""A table of all functions with numeric arguments: invalid values are refused."""

import inspect
import itertools
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import (
  checks,
  core,
  diffusion_samplers,
  distances,
  guidance,
  oracles,
  precond,
  process,
  samplers,
  schedules,
  times,
  weightings,
)
from cmjax.objectives import (
  consistency,
  continuous,
  denoise,
  flow_map,
  progressive,
  trigflow,
)
from cmjax.studies.discrete_limit import discrete_limit
from cmjax.studies.gradient_noise import gradient_noise
from cmjax.studies.jvp_precision import jvp_precision
from cmjax.studies.likelihood import likelihood
from cmjax.studies.map_error import map_error
from cmjax.studies.study import Study, Subject
from cmjax.studies.tangents import normalised_bias, tangents

RUN = dict(batch_size=8, total_images=80)
GRID = dict(sigma_min=0.002, sigma_max=80.0, rho=7.0)
GUIDANCE = dict(
  sampler=samplers.one_step(), guidance=2.0, sigma_low=0.1, sigma_high=5.0
)
LEVELS = dict(sigma_min=0.1, sigma_max=10.0, num_sigmas=2)
STAGES = dict(stage_images=24, batch_size=8)
NETWORK = core.Network(None, None)
DRAW = times.lognormal(mean=0.0, std=1.0)
HALF = schedules.constant(value=0.5)
NUM_SCALES = schedules.constant(value=18.0)
SQUARED = dict(distance=distances.squared_l2(), weighting=weightings.uniform())
PAIRS = times.karras_pairs(num_scales=NUM_SCALES)
TRIGFLOW = precond.trigflow(NETWORK)
TWO_TIME = precond.two_time(core.Network(None, None, num_times=2))
DISTILLATION = dict(f=None, teacher=None, times=DRAW, **SQUARED)
SUBJECT = dict(subject=Subject(None, core.Nets(None), jnp.ones((3, 2)), None))
ORACLE = oracles.gaussian(np.zeros(2), 1.0)

# Every function with numeric arguments, and valid values of them.
VALID = {
  process.trigflow: dict(sigma_data=0.5),
  schedules.constant: dict(value=1.0),
  schedules.cosine: RUN | dict(peak=1.0, warmup_images=8),
  schedules.warmup: dict(peak=1.0, batch_size=8, warmup_images=8),
  schedules.inverse_root: dict(
    peak=1.0, hold_images=16, rampup_images=16, batch_size=8
  ),
  schedules.half_life: dict(half_life_images=80, batch_size=8, rampup_ratio=0.05),
  schedules.power: dict(relative_std=0.1),
  schedules.relative_gap: RUN | dict(q=2.0, stage_images=80),
  schedules.adaptive_num_scales: RUN | dict(start=2, end=10),
  schedules.adaptive_decay: RUN | dict(start_decay=0.9, start=2, end=10),
  schedules.doubling_num_scales: RUN | dict(start=2, end=8),
  schedules.halving_steps: STAGES | dict(start=8),
  schedules.copy_at_stages: STAGES,
  schedules.stage_decay: STAGES | dict(peak=1.0),
  distances.pseudo_huber: dict(c=0.1),
  weightings.edm: dict(sigma_data=0.5),
  precond.edm: dict(network=NETWORK, sigma_data=0.5),
  precond.consistency: dict(network=NETWORK, sigma_data=0.5, sigma_min=0.002),
  precond.trigflow: dict(network=NETWORK, sigma_data=0.5),
  times.lognormal: dict(mean=0.0, std=1.0),
  times.karras_uniform: GRID,
  times.karras_pairs: GRID | dict(num_scales=NUM_SCALES),
  times.lognormal_pairs: GRID | dict(num_scales=NUM_SCALES, mean=0.0, std=1.0),
  times.ect_pairs: dict(times=DRAW, relative_gap=HALF, k=8.0, b=1.0),
  times.logit_normal_pairs: dict(mean=0.0, std=1.0, equal_fraction=0.5),
  times.dyadic_pairs: dict(num_steps=8, flow_fraction=0.5),
  samplers.multistep: dict(sigmas=(80.0, 1.0), sigma_min=0.002),
  samplers.one_step: dict(sigma_max=80.0),
  samplers.trigflow: dict(angles=(1.1,), sigma_data=0.5, sigma_max=80.0),
  diffusion_samplers.ode: GRID | dict(num_steps=18),
  diffusion_samplers.ddim: GRID | dict(num_steps=18, eta=0.5),
  diffusion_samplers.dpm_solver: GRID | dict(num_steps=18),
  diffusion_samplers.stochastic: GRID
  | dict(num_steps=18, churn=1.0, churn_min=0.1, churn_max=50.0, noise_scale=1.0),
  guidance.classifier_free: GUIDANCE,
  guidance.autoguidance: GUIDANCE,
  samplers.phased: dict(edges=(1.0,), sigma_max=80.0, skip=0.9),
  denoise.edm: dict(f=None, times=DRAW, sigma_data=0.5, label_dropout=0.1),
  consistency.ect: dict(f=None, times=DRAW, relative_gap=HALF, k=8.0, b=1.0, **SQUARED),
  consistency.ict: GRID | dict(f=None, num_scales=NUM_SCALES, c=0.1, mean=0.0, std=1.0),
  consistency.cd: dict(f=None, teacher=None, pairs=PAIRS, guidance=1.0, **SQUARED),
  consistency.stable_ct: dict(
    f=None,
    times=DRAW,
    relative_gap=HALF,
    sigma_threshold=1.0,
    block_size=8,
    k=8.0,
    b=1.0,
    **SQUARED,
  ),
  continuous.theorem3: DISTILLATION | dict(guidance=1.0),
  continuous.theorem4: DISTILLATION | dict(guidance=1.0, distance=distances.l1()),
  continuous.cd: DISTILLATION | dict(guidance=1.0),
  trigflow.sct: dict(f=TRIGFLOW, times=DRAW, warmup=HALF, normaliser=0.1),
  trigflow.scd: dict(
    f=TRIGFLOW, teacher=None, times=DRAW, warmup=HALF, normaliser=0.1, guidance=1.0
  ),
  flow_map.meanflow: dict(
    f=TWO_TIME,
    pairs=times.logit_normal_pairs(),
    power=1.0,
    c=0.01,
    guidance=2.0,
    label_dropout=0.1,
  ),
  flow_map.shortcut: dict(f=TWO_TIME, num_steps=8, flow_fraction=0.5),
  progressive.pd: GRID | dict(f=None, num_steps=NUM_SCALES, **SQUARED),
  map_error: SUBJECT
  | LEVELS
  | dict(oracle=ORACLE, num_samples=4, s=0.002, num_steps=4),
  tangents: SUBJECT | LEVELS | dict(num_samples=4, num_draws=4, subset_size=2),
  normalised_bias: SUBJECT | LEVELS | dict(c=0.0, num_samples=4, num_draws=4),
  gradient_noise: SUBJECT | dict(num_bins=2, num_batches=2),
  jvp_precision: SUBJECT | dict(num_samples=4),
  discrete_limit: SUBJECT | dict(num_samples=4, sigma_min=0.01, sigma_max=10.0),
  likelihood: SUBJECT
  | dict(num_levels=2, num_samples=2, num_probes=1, sigma_min=0.002, sigma_max=80.0),
}
ANY_SIGN = {'mean', 'value', 'k', 'b', 'guidance'}
MAY_BE_ZERO = ANY_SIGN | {
  *('eta', 'churn', 'churn_min', 'noise_scale', 'sigma_low'),
  *('peak', 'warmup_images', 'rampup_images', 'rampup_ratio', 'c', 'power'),
  *('sigma_threshold', 'label_dropout', 'equal_fraction', 'flow_fraction', 'sigma_min'),
  *('num_levels', 'num_probes'),
}
# Exceptions: zeros that are invalid, and a zero that means "unknown".
NOT_ZERO = {(flow_map.meanflow, 'c')}
NOT_ZERO |= {(f, 'sigma_min') for f, taken in VALID.items() if 'sigma_max' in taken}
ZERO = {(schedules.relative_gap, 'total_images')}
COUNTS = {
  *('start', 'end', 'num_steps', 'block_size', 'num_sigmas', 'num_samples'),
  *('num_draws', 'subset_size', 'num_bins', 'num_batches', 'num_levels', 'num_probes'),
}


def name_of(function):
  return f'{function.__module__.rpartition(".")[2]}:{function.__name__}'


NUMBERS = [
  pytest.param(function, name, id=f'{name_of(function)} {name}')
  for function, taken in VALID.items()
  for name, value in taken.items()
  if isinstance(value, (int, float))
]
STUDIES = [
  *('discrete_limit', 'gradient_noise', 'jvp_precision', 'likelihood', 'map_error'),
  'tangents',
]
MODULES = (
  *(process, schedules, distances, weightings, precond, times, samplers, continuous),
  *(diffusion_samplers, guidance),
  *(denoise, consistency, flow_map, progressive, trigflow),
  *(sys.modules[f'cmjax.studies.{name}'] for name in STUDIES),
)
BUILT = {
  *(process.Process, core.Schedule, distances.Distance, weightings.Weighting),
  *(core.Model, times.Times, times.Pairs, samplers.Sampler, core.Loss, Study),
}


def test_every_number_of_every_builder_is_in_the_table():
  names = {m.__name__ for m in MODULES}
  for function in itertools.chain.from_iterable(vars(m).values() for m in MODULES):
    defined = inspect.isfunction(function) and function.__module__ in names
    if not defined or function.__name__.startswith('_'):
      continue
    signature = inspect.signature(function)
    if signature.return_annotation in BUILT:
      kinds = {name: p.annotation for name, p in signature.parameters.items()}
      numbers = {name for name, kind in kinds.items() if kind in (int, float)}
      assert numbers <= set(VALID.get(function, ())), name_of(function)


@pytest.mark.parametrize('function', VALID, ids=name_of)
def test_the_values_of_the_table_are_valid(function):
  if not function.__module__.startswith('cmjax.studies.'):  # a study computes
    function(**VALID[function])


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
      function(**VALID[function] | {name: value})
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('function', 'name', 'bad'),
  [
    (samplers.multistep, 'sigmas', (math.nan,)),
    (samplers.multistep, 'sigmas', (math.inf, 1.0)),
    (samplers.flow_map, 'sigmas', (80.0, math.nan)),
    (samplers.phased, 'edges', (math.nan,)),
    (samplers.phased, 'edges', (1.0, math.inf)),
    (consistency.stable_ct, 'edges', (math.nan,)),
    (consistency.stable_ct, 'edges', (2.0, 1.0)),
    (jvp_precision, 'widths', (0.0,)),
    (jvp_precision, 'widths', (math.nan,)),
    (jvp_precision, 'widths', ()),
    (discrete_limit, 'num_scales', (1,)),
    (discrete_limit, 'num_scales', ()),
    (likelihood, 'num_steps', (0,)),
    (likelihood, 'num_steps', ()),
  ],
)
def test_sequences_that_cannot_work_are_refused_by_name(function, name, bad):
  with pytest.raises(ValueError, match=name):
    function(**VALID.get(function, {}) | {name: bad})


@pytest.mark.parametrize(
  'function', [times.karras_pairs, diffusion_samplers.ode, progressive.pd]
)
def test_grids_that_do_not_descend_are_refused(function):
  with pytest.raises(ValueError, match='needs sigma_min < sigma_max'):
    function(**VALID[function] | dict(sigma_min=80.0))


@pytest.mark.parametrize('value', ['0.5', None, 10**400])
def test_values_that_are_not_numbers_are_refused(value):
  with pytest.raises(ValueError, match='sigma must be finite and above 0, got '):
    checks.positive(sigma=value)
