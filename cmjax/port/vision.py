"""Released weights of LPIPS and Inception: their names and layouts -> ours."""

from collections.abc import Callable, Collection, Mapping
import fnmatch
import hashlib
from pathlib import Path

import jax
import numpy as np

from cmjax import checks
from cmjax.core import Array, Params, Perceptual, UserError, first_line
from cmjax.metrics.feature_network import INCEPTION, FeatureNetwork
from cmjax.networks import inception, lpips
from cmjax.port import names, read

Tensors = Mapping[str, np.ndarray]

# Tensors of the files that are ignored.
VGG16_UNUSED = ('classifier.*',)
INCEPTION_UNUSED = ('*.num_batches_tracked', 'AuxLogits.*', 'fc.bias')

VGG16_FILE = 'vgg16-397923af.pth'
HEADS_FILE = 'vgg.pth'
INCEPTION_FILE = 'pt_inception-2015-12-05-6726825d.pth'

# Where to download each file, and the first digits of its SHA-256.
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
_ORDER = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}  # by number of axes; OIHW -> HWIO


def vgg16_params(tensors: Tensors) -> Params:
  """The parameters of VGG16 from torchvision's names: features.0.weight, ...

  Raises: UserError naming tensors that are missing, unknown or of another shape.
  """
  index, layers = 0, {}
  for stage, (depth, _) in enumerate(lpips.VGG16, start=1):
    for i in range(1, depth + 1):
      layers[f'conv{stage}_{i}'] = index
      index += 2  # a convolution and its ReLU
    index += 1  # the pooling

  def rename(layer, leaf):
    return f'features.{layers[layer]}.{_LEAVES[leaf]}'

  like = _shapes(lpips.init)['vgg16']
  return _fill(like, tensors, rename, VGG16_UNUSED, 'VGG16')


def heads_params(tensors: Tensors) -> Params:
  """The heads of `lpips` from the lpips package's names: lin0.model.1.weight, ...

  Raises: UserError naming tensors that are missing, unknown or of another shape.
  """

  def rename(stage):
    return f'lin{int(stage.removeprefix("stage")) - 1}.model.1.weight'

  like = _shapes(lpips.init)['heads']
  return _fill(like, tensors, rename, (), 'the heads of LPIPS')


def inception_params(tensors: Tensors) -> Params:
  """The parameters of `inception` from pytorch-fid's names: Mixed_5b.branch1x1.conv...

  Raises: UserError naming tensors that are missing, unknown or of another shape.
  """

  def rename(*path):
    *layers, leaf = path
    if leaf != 'kernel':
      layers.append('bn')
    return '.'.join([*layers, _LEAVES[leaf]])

  like = _shapes(inception.init)
  return _fill(like, tensors, rename, INCEPTION_UNUSED, 'Inception')


def load_lpips(vgg: str, heads: str) -> Perceptual:
  """The parameters of `lpips` from torchvision's VGG16 and the lpips package's heads.

  Raises: UserError if a file is missing, damaged, or holds another network.
  """
  vgg16 = vgg16_params(_load(vgg, VGG16_FILE))
  return Perceptual({'vgg16': vgg16, 'heads': heads_params(_load(heads, HEADS_FILE))})


def blank_lpips() -> Perceptual:
  """Zeros in the shapes of `load_lpips`, for compiling a step without its files."""

  def zeros(a):
    return np.broadcast_to(np.zeros((), a.dtype), a.shape)  # takes no memory

  return Perceptual(jax.tree.map(zeros, _shapes(lpips.init)))


def load_inception(path: str) -> Params:
  """The parameters of `inception` from pytorch-fid's file.

  Raises: UserError if a file is missing, damaged, or holds another network.
  """
  return inception_params(_load(path, INCEPTION_FILE))


def inception_features(*, path: str, resize: str = 'half_pixel') -> FeatureNetwork:
  """The Inception network of 2015-12-05 from pytorch-fid's file, for metrics.

  Pool f32[B, 2048] for FID, spatial f32[B, 17, 17, 7] for sFID, logits f32[B, 1008]
  without the bias for the Inception Score. `resize` is the alignment of pixels:
  'half_pixel' as pytorch-fid, 'tensorflow1' as the graph itself, torch-fidelity, EDM
  and OpenAI. Their numbers are not comparable.

  Raises: UserError if the file is missing, damaged, or holds another network;
    ValueError if `resize` is unknown.
  """
  checks.choice(inception.RESIZE, resize=resize)

  def apply(params: Params, images: Array) -> dict[str, Array]:
    return inception.inception(params, images, resize=resize)._asdict()

  conventions = {'weights': Path(path).name, 'resize': resize}
  size = (299, 299, 3)
  return FeatureNetwork(
    INCEPTION, load_inception(path), apply, size, conventions=conventions
  )


def _load(path: str, name: str) -> Tensors:
  """The tensors of the file at `path`, which should be the release `name`."""
  source, checksum = _RELEASES[name]
  file = Path(path)
  if not file.is_file():
    raise UserError(f'{path}: no such file; download {name} from {source}')
  if file.name == name:  # a renamed file may have been changed on purpose
    with file.open('rb') as stream:
      digest = hashlib.file_digest(stream, 'sha256').hexdigest()
    if not digest.startswith(checksum):
      raise UserError(
        f'{path}: damaged, its SHA-256 begins with {digest[:8]}; download {name} again '
        f'from {source}'
      )
  try:
    tensors = read.tensors(read.read(path).content)
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f'{path}: damaged ({first_line(error)})') from error
  if not tensors:
    raise UserError(f'{path}: contains no named tensors; download {name} from {source}')
  return tensors


def _shapes(init: Callable[..., Params]) -> Params:
  return jax.eval_shape(init, jax.random.key(0))


def _listed(tensor_names: Collection[str]) -> str:
  first = [names.short_repr(name)[1:-1] for name in sorted(tensor_names)[:40]]
  more = len(tensor_names) - len(first)
  return ', '.join(first) + (f' and {more} more' if more else '')


def _fill(
  like: Params,
  tensors: Tensors,
  rename: Callable[..., str],
  unused: tuple[str, ...],
  network: str,
) -> Params:
  """Fills the tree `like`; rename(*path) is the name of the tensor of a leaf."""
  name_of = {
    path: rename(*(key.key for key in path))
    for path, _ in jax.tree_util.tree_leaves_with_path(like)
  }
  missing = name_of.values() - tensors.keys()
  if missing:
    raise UserError(f'{network}: missing tensors: {_listed(missing)}')
  unknown = tensors.keys() - name_of.values()
  unknown = {n for n in unknown if not any(fnmatch.fnmatch(n, u) for u in unused)}
  if unknown:
    raise UserError(f'{network}: unknown tensors: {_listed(unknown)}')

  def fill(path, leaf):
    tensor = np.asarray(tensors[name_of[path]])
    order = _ORDER.get(tensor.ndim, ())
    if tuple(tensor.shape[i] for i in order) != leaf.shape:
      raise UserError(
        f'{network}: {name_of[path]} has the shape {names.short_repr(tensor.shape)}; '
        'is it a file of another network?'
      )
    return np.ascontiguousarray(np.transpose(tensor, order))

  return jax.tree_util.tree_map_with_path(fill, like)
