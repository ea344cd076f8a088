"""The user's own data: images in a folder or a zip file, or arrays in `.npz` files."""

from cmjax.core import UserError
from cmjax.data import archives, images
from cmjax.data.disk import examples_of
from cmjax.data.reading import local, reading
from cmjax.data.shards import read_shards
from cmjax.data.source import Source, image_source


def from_path(
  *,
  path: str,
  conditional: bool = False,
  flip: bool = False,
  size: int = 0,
  crop: str = '',
  memory_gib: float = 4.0,
) -> Source:
  """Images from a folder or a zip file, or images or points from `.npz` files.

  Args:
    path: one of these.
      - A folder of images, searched recursively, symbolic links included; they are
        converted to RGB. The class of an image is the sub-folder of `path` it is in, or
        what `dataset.json` states.
      - A `.zip` of images, as NVlabs/edm `dataset_tool.py` writes it; the same.
      - An `.npz` with `images`: uint8[N, H, W, C], or f32[N, H, W, C] or f32[N, D] in
        [-1, 1]; with `conditional`, also `labels` i[N], counted from 0.
      - A folder of such `.npz`, which follow each other in the order of their names.
    conditional: whether to read the classes.
    flip: whether to mirror each image left to right with probability 1/2.
    size: of the squares that images become, in pixels; 0: all have one size already.
    crop: how they become squares: edm, adm or lsun, as `images.Resize` explains; empty:
      they are squares.
    memory_gib: the images stay in memory, and their decoded copy in a cache, if they
      take at most so many GiB (2**30 bytes); else they are decoded as they are used.
      The batches are the same.

  Raises: UserError if the path has no images, they differ in size, values leave
    [-1, 1], labels are missing, or the images do not fit into memory.
  """
  if not path.strip():
    raise UserError('config.data.path: is empty; give a folder, an .npz or a .zip file')
  data = local(path, 'config.data.path')
  resize = images.resize_of(size, crop)
  names, arrays = [], []
  if data.is_dir():
    with reading(f'config.data.path: cannot read {data}'):
      names = images.image_files(data, 'config.data.path')
      arrays = [] if names else sorted(data.glob('*.npz'))
    if not names and not arrays:
      raise UserError(
        f'config.data.path: no image in {data}; looked for '
        f'{sorted(images.IMAGE_SUFFIXES)}, and no .npz'
      )
  elif data.suffix == '.npz' and data.is_file():
    arrays = [data]
  elif not (data.suffix == '.zip' and data.is_file()):
    raise UserError(
      f'config.data.path: {path!r} is neither a folder nor an .npz or .zip file'
    )
  if arrays:
    if size:
      raise UserError(
        'config.data.size: arrays of .npz files are used as they are; set it to 0'
      )
    examples, labels = read_shards(arrays, conditional, memory_gib)
  else:
    if names:
      reader, labels = archives.read_folder(data, names, conditional, resize)
    else:
      reader, labels = archives.read_zip(data, conditional, resize)
    what = f'config.data.path: the images of {data}'
    examples = examples_of(reader, memory_gib, what)
  if flip and len(examples.shape) != 4:
    raise UserError(
      f'config.data.flip: {path} has points, and only images can be flipped'
    )
  classes = 0 if labels is None else int(labels.max()) + 1
  return image_source(data.name, examples, labels, classes, flip)
