"""Contracts of all objectives, networks, preconditioners and samplers, from one table.

A new member needs one row in its table; a public function without a row fails.
"""

import functools
import importlib
import inspect

import jax
import pytest

from cmjax import (
  augmentation,
  contract_networks,
  contract_objectives,
  contract_samplers,
  contracts,
  core,
  diffusion_samplers,
  distances,
  guidance,
  precond,
  samplers,
  schedules,
  weightings,
)
from cmjax.contract_networks import network_case
from cmjax.contract_objectives import USUAL, objective_case
from cmjax.contract_samplers import PrecondCase, SamplerCase
from cmjax.networks import adm, edm2, mlp, songunet
from cmjax.objectives import (
  consistency,
  continuous,
  denoise,
  flow_map,
  progressive,
  trigflow,
)
from tests.conftest import ROOT

METRIC = dict(
  distance=distances.pseudo_huber(c=0.01), weighting=weightings.inverse_gap()
)
SQUARED = dict(distance=distances.squared_l2(), weighting=weightings.uniform())
WARM = schedules.constant(value=0.5)


def flips(key, x0):
  """The flips of an augmentation, which do not change an image of one value."""
  drawn = augmentation.draw(key, len(x0), 0.5)
  still = ('scale', 'angle', 'stretch', 'shift')
  zeros = {name: jax.numpy.zeros_like(getattr(drawn, name)) for name in still}
  return augmentation.transform(drawn._replace(**zeros), x0)


def of_augmented(f):
  """The model, whose last column of labels the labels of an augmentation change."""

  def model(params, x, sigma, cond, /, *, key=None):
    labels = cond[:, :-9].at[:, -1].add(jax.numpy.sum(cond[:, -9:], axis=1))
    return f(params, x, sigma, labels, key=key)

  return model


# name: how to build it from a model f, which is also the teacher, and from draws
OBJECTIVES = {
  'denoise:edm': lambda f, draws: denoise.edm(f, times=draws.times, label_dropout=0.2),
  'denoise:edm with augmentation': lambda f, draws: denoise.edm(
    of_augmented(f), times=draws.times, augmentation=flips
  ),
  'consistency:ect': lambda f, draws: consistency.ect(
    f, times=draws.times, relative_gap=draws.relative_gap, **METRIC
  ),
  'consistency:ct': lambda f, draws: consistency.ct(f, pairs=draws.pairs, **METRIC),
  'consistency:ict': lambda f: consistency.ict(
    f, num_scales=schedules.constant(value=18.0), c=0.01
  ),
  'consistency:cd': lambda f, draws: consistency.cd(
    f, f, pairs=draws.pairs, guidance=1.5, **METRIC
  ),
  'consistency:stable_ct': lambda f, draws: consistency.stable_ct(
    f,
    times=draws.times,
    relative_gap=draws.relative_gap,
    sigma_threshold=0.3,
    block_size=3,
    edges=(0.4, 2.0),
    **METRIC,
  ),
  'continuous:theorem3': lambda f, draws: continuous.theorem3(
    f, f, times=draws.times, **SQUARED
  ),
  'continuous:theorem4': lambda f, draws: continuous.theorem4(
    f, f, times=draws.times, **SQUARED | dict(distance=distances.pseudo_huber())
  ),
  'continuous:cd': lambda f, draws: continuous.cd(
    f, f, times=draws.times, guidance=1.5, **SQUARED
  ),
  'continuous:ct': lambda f, draws: continuous.ct(f, times=draws.times, **SQUARED),
  'trigflow:sct': lambda f, draws: trigflow.sct(f, times=draws.times, warmup=WARM),
  'trigflow:scd': lambda f, draws: trigflow.scd(
    f, f, times=draws.times, warmup=WARM, guidance=1.5
  ),
  'flow_map:meanflow': lambda f, draws: flow_map.meanflow(
    f, pairs=draws.unit_pairs, guidance=2.0, label_dropout=0.2, marginal_tangent=True
  ),
  'flow_map:shortcut': lambda f: flow_map.shortcut(f, num_steps=8),
  'progressive:pd': lambda f: progressive.pd(
    f, num_steps=schedules.constant(value=4.0), **SQUARED
  ),
}
# Objectives of a family whose model has a form of its own; the others take EDM's.
FORMS = {'trigflow': 'trigflow', 'flow_map': 'two_time'}
# Heun's step needs the field at r: such pairs have r > 0.
NEVER_FROM_ZERO = {'consistency:cd'}
UNET = dict(channels=8, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,))
MLP = dict(width=16, num_blocks=2, embedding=8, noise_scale=4.0)
NCSNPP = dict(embedding='fourier', residual_input=True, taps=(1, 3, 3, 1), augment=2)
# name: the function, the shape of an example, and settings of a small one
NETWORKS = {
  'mlp:mlp': (mlp.mlp, (4, 4, 1), MLP),
  'mlp:mlp of two times': (mlp.mlp, (4, 4, 1), MLP | dict(num_times=2)),
  'songunet:songunet': (songunet.songunet, (8, 8, 3), UNET),
  'songunet:songunet as NCSN++': (songunet.songunet, (8, 8, 3), UNET | NCSNPP),
  'adm:adm': (adm.adm, (8, 8, 3), UNET | dict(head_channels=4)),
  'adm:adm without FiLM': (
    adm.adm,
    (8, 8, 3),
    UNET | dict(head_channels=8, film=False),
  ),
  'edm2:edm2': (edm2.edm2, (8, 8, 3), UNET | dict(head_channels=4)),
}
# Networks whose learned weighting does not start at zero: EDM2's does not either.
WEIGHTED_AT_FIRST = {'edm2:edm2'}
PRECONDITIONERS = {
  'edm': PrecondCase(precond.edm),
  'consistency': PrecondCase(precond.consistency, boundary=0.002),
  'trigflow': PrecondCase(precond.trigflow),
  'two_time': PrecondCase(precond.two_time, num_times=2),
}
SAMPLERS = {
  'one_step': SamplerCase(samplers.one_step(), 1),
  'multistep': SamplerCase(samplers.multistep(sigmas=(80.0, 5.0, 0.8)), 3),
  'phased': SamplerCase(samplers.phased(edges=(1.0, 5.0), skip=0.9), 3),
  'flow_map': SamplerCase(samplers.flow_map(sigmas=(80.0, 1.0)), 2, num_times=2),
  'trigflow': SamplerCase(samplers.trigflow(), 2),
  'published': SamplerCase(samplers.published(name='cd_cifar10'), 2),
  'ode': SamplerCase(diffusion_samplers.ode(num_steps=18), 35),
  'stochastic': SamplerCase(diffusion_samplers.stochastic(num_steps=18), 35),
  'ddim': SamplerCase(diffusion_samplers.ddim(num_steps=18, eta=0.5), 18),
  'dpm_solver': SamplerCase(diffusion_samplers.dpm_solver(num_steps=18), 18),
  # Three of the six noise levels of this grid are in the interval.
  'classifier_free': SamplerCase(
    guidance.classifier_free(
      sampler=diffusion_samplers.ddim(num_steps=6),
      guidance=2.0,
      sigma_low=0.5,
      sigma_high=30.0,
    ),
    9,
    conditional=True,
  ),
  'autoguidance': SamplerCase(
    guidance.autoguidance(sampler=samplers.multistep(sigmas=(80.0, 0.8)), guidance=2.0),
    4,
    guided=True,
  ),
}


def public_functions(module, returns):
  return {
    name
    for name, value in inspect.getmembers(module, inspect.isfunction)
    if value.__module__ == module.__name__
    and inspect.signature(value).return_annotation is returns
    and not name.startswith('_')
  }


def folder_members(folder, returns):
  members = set()
  for path in (ROOT / 'cmjax' / folder).glob('[a-z]*.py'):
    module = importlib.import_module(f'cmjax.{folder}.{path.stem}')
    found = public_functions(module, returns) - {'as_network'}
    members |= {f'{path.stem}:{name}' for name in found}
  return members


def test_every_member_has_a_row():
  assert folder_members('objectives', core.Loss) == {n.split()[0] for n in OBJECTIVES}
  assert folder_members('networks', core.Network) == {n.split()[0] for n in NETWORKS}
  assert public_functions(precond, core.Model) == set(PRECONDITIONERS)
  of_samplers = (samplers, diffusion_samplers, guidance)
  returned = [public_functions(module, samplers.Sampler) for module in of_samplers]
  assert set().union(*returned) == set(SAMPLERS)


def name_of(function):
  return function.__name__


@functools.cache
def objective(name):
  form = FORMS.get(name.partition(':')[0], 'edm')
  from_zero = name not in NEVER_FROM_ZERO
  return objective_case(OBJECTIVES[name], form=form, from_zero=from_zero)


@pytest.mark.parametrize('check', contract_objectives.OBJECTIVE, ids=name_of)
@pytest.mark.parametrize('name', OBJECTIVES)
def test_objective(name, check):
  check(objective(name))


@pytest.mark.parametrize('name', OBJECTIVES)
def test_objective_at_extreme_times_in_bfloat16(name):
  contract_objectives.extreme_times_are_finite(objective(name), 'bfloat16')


@pytest.mark.parametrize(
  'build',
  [
    lambda f, d: consistency.ect(
      f,
      times=USUAL.times,
      relative_gap=USUAL.relative_gap,
      **SQUARED | dict(distance=d),
    ),
    lambda f, d: continuous.theorem3(
      f, f, times=USUAL.times, **SQUARED | dict(distance=d)
    ),
    lambda f, d: continuous.cd(f, f, times=USUAL.times, **SQUARED | dict(distance=d)),
    lambda f, d: progressive.pd(
      f, num_steps=schedules.constant(value=4.0), **SQUARED | dict(distance=d)
    ),
  ],
  ids=['ect', 'theorem3', 'continuous cd', 'pd'],
)
def test_objective_takes_a_distance_with_a_network(build):
  contracts.check_perceptual(build)


@functools.cache
def network(name):
  build, shape, settings = NETWORKS[name]
  uniform = name not in WEIGHTED_AT_FIRST
  return network_case(build, shape, uniform_at_first=uniform, **settings)


# Variants of a network differ neither in their times nor in their attention.
@pytest.mark.parametrize(
  ('name', 'check'),
  [
    pytest.param(name, check, id=f'{name}-{check.__name__}')
    for name in NETWORKS
    for check, needed in contract_networks.NETWORK.items()
    if needed <= inspect.signature(NETWORKS[name][0]).parameters.keys()
    and (' ' not in name or not needed - {'dropout', 'dtype'})
  ],
)
def test_network(name, check):
  check(network(name))


@pytest.mark.parametrize('check', contract_samplers.PRECOND, ids=name_of)
@pytest.mark.parametrize('name', PRECONDITIONERS)
def test_preconditioner(name, check):
  check(PRECONDITIONERS[name])


@pytest.mark.parametrize('check', contract_samplers.SAMPLER, ids=name_of)
@pytest.mark.parametrize('name', SAMPLERS)
def test_sampler(name, check):
  check(SAMPLERS[name])
