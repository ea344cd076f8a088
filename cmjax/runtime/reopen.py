"""Reopens trained weights, of a run or of a file, with their config and data."""

from collections.abc import Iterable
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.core import Model, Nets, Params, UserError
from cmjax.data.source import Source, all_x0, batch_at, one_hot, placeholder
from cmjax.guidance import GuidedParams, WithGuide
from cmjax.runtime import checkpoint, logs, paths, pretrained, sharding, storage
from cmjax.runtime.build import build, build_each, build_model, check_part, is_part
from cmjax.runtime.config import read
from cmjax.runtime.config_json import read_json
from cmjax.runtime.config_record import Config, ConfigDict, checked, completed
from cmjax.runtime.run import build_objective, check_fits
from cmjax.runtime.sampler_check import check_samplers
from cmjax.samplers import Sampler
from cmjax.studies.study import Subject


class Opened(NamedTuple):
  """Trained weights, ready to be sampled."""

  config: Config  # completed with defaults if the weights were stored without data
  mesh: jax.sharding.Mesh
  source: Source  # without examples if the weights were stored without data
  f: Model
  samplers: dict[str, Sampler]
  params: Params
  step: int
  path: str = ''  # the work directory, or the file of weights
  trust: Iterable[str] = ()


def reopen(
  path: str | Path,
  config: ConfigDict | None = None,
  overrides: Iterable[tuple[str, str]] = (),
  trust: Iterable[str] = (),
  *,
  needs_data: bool = True,
) -> Opened:
  """Opens the newest intact checkpoint of a run, or a file of weights.

  Weights stored without samplers get the usual ones for their model. Without
  `needs_data`, a file of weights, and a run whose data cannot be read, are opened with
  `placeholder`.

  Args:
    path: as for `pretrained.load`.
    config: as for `pretrained.load`; that of the run if None.
    overrides: dotted keys of the config and the texts of their values.
    trust: packages whose functions a config that came with weights may name.
    needs_data: whether data that cannot be read is an error.

  Raises: UserError if there are no weights, they are of another network, or data is
    needed and cannot be read.
  """
  mesh = sharding.data_mesh()
  model = pretrained.load(
    path, config=config, overrides=overrides, trust=trust, mesh=mesh, say=logs.say
  )
  has_data = 'data' in model.config
  if needs_data and not has_data:
    raise UserError(
      f'{path} holds weights without data; give --config=NAME with data, such as '
      'edm:cifar10'
    )
  whole = checked(completed(model.config), weights_alone=not has_data)
  source = None
  if needs_data or (has_data and paths.is_dir(paths.path(path))):
    try:
      source = build(whole.data, 'config.data', Source)
    except UserError as error:
      if needs_data:
        raise
      logs.say(f'opened without its data: {error}')
    else:
      check_fits(path, model, source)
  source = source or placeholder(model.shape, model.classes, model.data)
  samplers = build_each(whole.samplers, 'config.samplers', Sampler)
  rest = (model.f, samplers, model.params, model.step, str(path), trust)
  return Opened(whole, mesh, source, *rest)


def reopen_for(
  path: str,
  name: str,
  overrides: Iterable[tuple[str, str]],
  trust: Iterable[str],
  *,
  needs_data: bool = True,
) -> Opened:
  """`reopen` by the flags of a command: --workdir, --config, --config.KEY, --trust."""
  if not path:
    raise UserError('give --workdir=DIR, the folder of the run')
  config = read(name, trust) if name else None
  return reopen(path, config, overrides, trust, needs_data=needs_data)


SEARCHED = 'searched'  # folder beside the weights, of the samplers that were searched


def for_sampling(opened: Opened, names: str = '') -> Opened:
  """The weights with the samplers of these names, and with `config.guide` if given.

  Args:
    opened: the weights.
    names: samplers of the config or of an earlier --mode=search, separated by commas;
      empty for all of the config.

  Raises: UserError if there is no such sampler, it does not fit the model, or the guide
    is of other data.
  """
  if names:
    opened = _with_samplers(opened, names)
  config, source = opened.config, opened.source
  if config.guide:
    checkpoint.check_there(config.guide, 'config.guide')
    guide = pretrained.load(
      config.guide, trust=opened.trust, mesh=opened.mesh, say=logs.say
    )
    check_fits(config.guide, guide, source)
    params = GuidedParams(opened.params, guide.params)
    opened = opened._replace(f=WithGuide(opened.f, guide.f), params=params)
  check_sampled(opened)
  return opened


def check_sampled(opened: Opened) -> None:
  """Raises UserError naming the sampler that the model cannot be sampled with."""
  source = opened.source
  classes = 0 if source.labels is None else source.classes
  model = (opened.f, opened.params, source.shape, classes)
  check_samplers(opened.samplers, *model, opened.config.objective)


def _with_samplers(opened: Opened, names: str) -> Opened:
  folder = beside(opened) / SEARCHED
  searched = {path.stem: path for path in sorted(folder.glob('*.json'))}
  parts = {}
  for name in names.split(','):
    if name in opened.config.samplers:
      parts[name] = opened.config.samplers[name]
    elif name in searched:
      parts[name] = read_json(searched[name], opened.trust).get('sampler')
      check_part(parts[name], f'{searched[name]}: sampler')
    else:
      known = ', '.join([*opened.config.samplers, *searched])
      raise UserError(f'--samplers: no sampler {name!r}; known: {known}')
  # Not `config.replace`, which would refuse weights that were stored without data.
  config = dataclasses.replace(opened.config, samplers=ConfigDict(parts))
  samplers = build_each(ConfigDict(parts), '--samplers', Sampler)
  in_order = {name: samplers[name] for name in parts}
  return opened._replace(config=config, samplers=in_order)


def beside(opened: Opened) -> Path:
  """The folder for the results of a run, or of a file of weights."""
  path = paths.path(opened.path)
  if path.parent.name in storage.FOLDERS:  # old steps are deleted, results are not
    return path.parent.parent
  return path if paths.is_dir(path) else path.with_name(f'{path.name}.results')


def facts(opened: Opened, **results: Any) -> dict[str, Any]:
  """Results with their data, step and whole config, for JSON."""
  origin = {'data': opened.source.name, 'step': opened.step}
  return origin | results | {'config': opened.config.to_dict()}


def subject_of(opened: Opened) -> Subject:
  """A trained model with its data, its objective and its teacher, for a study.

  The target network is that of the checkpoint; the objective is that of the next step,
  or of the last step at the end of a run.

  Raises: UserError if its teacher cannot be read, or the checkpoint has no target
    network although the config has a `target_decay`.
  """
  config, source, mesh = opened.config, opened.source, opened.mesh
  loss, frozen, teacher = build_objective(config, mesh, source, opened.f, opened.trust)
  target = None
  if is_part(config.target_decay):
    try:
      target = checkpoint.read_weights(
        opened.path, opened.step, checkpoint.TARGET, opened.params
      )
    except UserError as error:
      raise UserError(
        f'config.target_decay: a study needs the target network; {error}'
      ) from error
  everything = np.arange(len(source.examples))

  def in_dtype(dtype):
    network = config.network.to_dict() | {'dtype': dtype}
    return build_model(config.replace(network=network))[1]

  return Subject(
    f=opened.f,
    nets=Nets(opened.params, target, **frozen._asdict()),
    x0=jnp.asarray(all_x0(source, 'a study')),
    cond=None if source.labels is None else jnp.asarray(one_hot(source, everything)),
    batch=lambda step: batch_at(source, config.seed, step, config.batch_size),
    loss=loss,
    teacher=teacher,
    in_dtype=in_dtype if 'dtype' in config.network else None,
    step=min(opened.step, config.total_steps - 1),
  )
