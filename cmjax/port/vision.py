"""Released weights of the perceptual networks: their names and layouts -> ours."""

from collections.abc import Callable, Collection, Mapping
import fnmatch
import hashlib
from pathlib import Path

import jax
import numpy as np

from cmjax.core import Params, Perceptual, UserError, first_line
from cmjax.networks import perceptual
from cmjax.port import names, read

Tensors = Mapping[str, np.ndarray]

# What the files hold beyond what is read from them.
VGG16_UNUSED = ('classifier.*',)
INCEPTION_UNUSED = ('*.num_batches_tracked', 'AuxLogits.*', 'fc.bias')

VGG16_FILE = 'vgg16-397923af.pth'
HEADS_FILE = 'vgg.pth'
INCEPTION_FILE = 'pt_inception-2015-12-05-6726825d.pth'

# Where a released file is to be had, and how its SHA-256 begins.
_RELEASES = {
  VGG16_FILE: ("torchvision's model zoo, download.pytorch.org/models", '397923af'),
  HEADS_FILE: ('the lpips package, lpips/weights/v0.1', ''),
  INCEPTION_FILE: ('the release fid_weights of mseitzer/pytorch-fid', '6726825d'),
}

_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
_ORDER = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}  # OIHW -> HWIO


def vgg16(tensors: Tensors) -> Params:
  """The trunk of `lpips` from torchvision's names: features.0.weight, ...

  Raises: UserError naming every tensor that is missing, unread or of another shape.
  """
  index, layers = 0, {}
  for stage, (depth, _) in enumerate(perceptual.VGG16, start=1):
    for i in range(1, depth + 1):
      layers[f'conv{stage}_{i}'] = index
      index += 2  # a convolution and its ReLU
    index += 1  # the pooling

  def rename(layer, leaf):
    return f'features.{layers[layer]}.{_LEAVES[leaf]}'

  like = _shapes(perceptual.lpips_init)['vgg16']
  return _fill(like, tensors, rename, VGG16_UNUSED, 'VGG16')


def lpips_heads(tensors: Tensors) -> Params:
  """The heads of `lpips` from the lpips package's names: lin0.model.1.weight, ...

  Raises: UserError naming every tensor that is missing, unread or of another shape.
  """

  def rename(stage):
    return f'lin{int(stage.removeprefix("stage")) - 1}.model.1.weight'

  like = _shapes(perceptual.lpips_init)['heads']
  return _fill(like, tensors, rename, (), 'the heads of LPIPS')


def inception(tensors: Tensors) -> Params:
  """The parameters of `inception` from pytorch-fid's names: Mixed_5b.branch1x1.conv...

  Raises: UserError naming every tensor that is missing, unread or of another shape.
  """

  def rename(*path):
    *layers, leaf = path
    if leaf != 'kernel':
      layers.append('bn')
    return '.'.join([*layers, _LEAVES[leaf]])

  like = _shapes(perceptual.inception_init)
  return _fill(like, tensors, rename, INCEPTION_UNUSED, 'Inception')


def load_lpips(vgg: str, heads: str) -> Perceptual:
  """The parameters of `lpips` from torchvision's VGG16 and the lpips package's heads.

  Raises: UserError for a file that is absent, damaged, or does not hold the network.
  """
  trunk = vgg16(_content(vgg, VGG16_FILE))
  heads_params = lpips_heads(_content(heads, HEADS_FILE))
  return Perceptual({'vgg16': trunk, 'heads': heads_params})


def load_inception(path: str) -> Params:
  """The parameters of `inception` from pytorch-fid's file.

  Raises: UserError for a file that is absent, damaged, or does not hold the network.
  """
  return inception(_content(path, INCEPTION_FILE))


def _content(path: str, name: str) -> Tensors:
  source, checksum = _RELEASES[name]
  file = Path(path)
  if not file.is_file():
    raise UserError(f'{path}: no such file; download {name} from {source}')
  if file.name == name:  # else it is the user's own, which may well differ
    with file.open('rb') as stream:
      found = hashlib.file_digest(stream, 'sha256').hexdigest()
    if not found.startswith(checksum):
      raise UserError(
        f'{path}: damaged, its SHA-256 begins with {found[:8]}; download {name} again '
        f'from {source}'
      )
  try:
    tensors = read.tensors(read.read(path).content)
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f'{path}: damaged ({first_line(error)})') from error
  if not tensors:
    raise UserError(f'{path}: holds no tensors by name; download {name} from {source}')
  return tensors


def _shapes(init: Callable[..., Params]) -> Params:
  return jax.eval_shape(init, jax.random.key(0))


def _listed(found: Collection[str]) -> str:
  first = [names.shown(name)[1:-1] for name in sorted(found)[:40]]
  more = len(found) - len(first)
  return ', '.join(first) + (f' and {more} more' if more else '')


def _fill(
  like: Params,
  tensors: Tensors,
  rename: Callable[..., str],
  unused: tuple[str, ...],
  network: str,
) -> Params:
  """The tree `like` with tensors for leaves, as rename(*path of a leaf) names them."""
  wanted = {
    path: rename(*(key.key for key in path))
    for path, _ in jax.tree_util.tree_leaves_with_path(like)
  }
  missing = wanted.values() - tensors.keys()
  if missing:
    raise UserError(f'{network}: missing tensors: {_listed(missing)}')
  unread = tensors.keys() - wanted.values()
  unread = {n for n in unread if not any(fnmatch.fnmatch(n, u) for u in unused)}
  if unread:
    raise UserError(f'{network}: tensors that nothing reads: {_listed(unread)}')

  def fill(path, leaf):
    theirs = np.asarray(tensors[wanted[path]])
    order = _ORDER.get(theirs.ndim, ())
    if tuple(theirs.shape[i] for i in order) != leaf.shape:
      raise UserError(
        f'{network}: {wanted[path]} has the shape {names.shown(theirs.shape)}; '
        'another network?'
      )
    return np.ascontiguousarray(np.transpose(theirs, order))

  return jax.tree_util.tree_map_with_path(fill, like)
