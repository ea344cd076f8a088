"""Configs without their files: blank images, zeros for LPIPS, a teacher of shapes."""

from typing import Any, cast

from jax.sharding import Mesh

from cmjax.core import Model, Network, UserError
from cmjax.data.source import Source
from cmjax.runtime import build, pretrained
from cmjax.runtime.config_record import REQUIRED, Config, ConfigDict


def blanked(config: Config, text: str) -> Config:
  """The config with images of `--blank`, and zeros for files that are not given.

  Raises: UserError if `text` is not SIZE,CHANNELS,CLASSES.
  """
  numbers = text.split(',')
  if len(numbers) != 3 or not all(n.isdecimal() for n in numbers):
    raise UserError('--blank: must be SIZE,CHANNELS,CLASSES, such as 64,3,1000')
  size, channels, classes = map(int, numbers)
  data = dict(
    fn='cmjax.data.blank:blank', size=size, channels=channels, classes=classes
  )
  changes: dict[str, Any] = {'data': data}
  if REQUIRED in config.perceptual.values():
    changes['perceptual'] = dict(fn='cmjax.port.vision:blank_lpips')
  return config.replace(**changes)


def blank_teacher(config: Config, mesh: Mesh, source: Source) -> pretrained.Pretrained:
  """A denoiser of EDM with the network of the config, and shapes for its weights."""
  network = cast(Network, build.build(config.network, 'config.network', Network))
  precond = ConfigDict(dict(fn='cmjax.precond:edm', sigma_data=0.5))
  f = build.build(precond, 'config.teacher', Model, network=network)
  shape, classes = source.shape, source.classes
  params = pretrained.abstract_params(network, shape, classes, mesh)
  own = ConfigDict(config.to_dict() | {'precond': precond.to_dict()})
  return pretrained.Pretrained(f, params, own, 0, shape, classes)
