"""Makes the golden outputs of PyTorch networks from checkouts of their repositories.

Usage: python -m tests.golden.make FAMILY --checkout=FOLDER [--write]

Needs torch and numpy, and einops for OpenAI's. Prints the relative difference from the
stored output; --write replaces the output. The commits are those of README.md.
"""

import argparse
import json
from pathlib import Path
import sys
import types

import numpy as np
import torch

from tests import recipe

FOLDER = Path(__file__).resolve().parent
EDM = ('ddpmpp', 'ncsnpp', 'adm', 'ecm', 'edm2')
OPENAI = {  # keywords of UNetModel that differ, and sigma_min of the boundary
  'cd_imagenet': (dict(num_classes=5, use_scale_shift_norm=True), 0.002),
  'edm_lsun': (dict(use_scale_shift_norm=False), 0.0),
}


def edm(facts: dict, tensors: dict) -> tuple[torch.nn.Module, dict]:
  """The preconditioned network of NVlabs/edm, NVlabs/edm2 or locuslab/ect."""
  try:
    from training import networks_edm2 as networks  # NVlabs/edm2
  except ImportError:
    from training import networks
  net = getattr(networks, str(facts['class_name']))(**facts['arguments'])
  filters = {k: v for k, v in net.state_dict().items() if k.endswith('resample_filter')}
  net.load_state_dict(tensors | filters, strict=True)  # filters are not weights
  return net.eval(), dict(force_fp32=True)


class Attention(torch.nn.Module):
  """Attention written out, in place of flash-attn's."""

  def __init__(self, embed_dim: int, num_heads: int):
    super().__init__()
    self.num_heads = num_heads

  def forward(self, qkv: torch.Tensor) -> torch.Tensor:
    """[B, 3 C, T] -> [B, C, T]."""
    batch, width, length = qkv.shape
    q, k, v = qkv.reshape(batch, 3, self.num_heads, -1, length).unbind(1)
    scores = torch.einsum('bhct,bhcs->bhts', q, k) / q.shape[2] ** 0.5
    mixed = torch.einsum('bhts,bhcs->bhct', scores.softmax(-1), v)
    return mixed.reshape(batch, width // 3, length)


def openai(family: str, tensors: dict) -> tuple[torch.nn.Module, dict]:
  """D or f of openai/consistency_models, preconditioned as in `karras_diffusion.py`."""
  sys.modules['cm'] = package = types.ModuleType('cm')  # its __init__ needs more
  package.__path__ = [str(Path(sys.path[0]) / 'cm')]
  from cm import unet

  unet.QKVFlashAttention = Attention
  differs, sigma_min = OPENAI[family]
  net = unet.UNetModel(
    image_size=32,
    in_channels=3,
    model_channels=128,
    out_channels=3,
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    channel_mult=(1, 1),
    num_head_channels=64,
    resblock_updown=True,
    **differs,
  )
  net.load_state_dict(tensors, strict=True)

  def denoise(x, sigma, labels):
    rest, norm = sigma - sigma_min, (sigma**2 + 0.25) ** 0.5
    scalings = (0.25 / (rest**2 + 0.25), 0.5 * rest / norm, 1 / norm)
    c_skip, c_out, c_in = (c[:, None, None, None] for c in scalings)
    time = 1000 * 0.25 * torch.log(sigma + 1e-44)
    return c_skip * x + c_out * net(c_in * x, time, y=labels)

  net.eval()
  return denoise, {}


def main() -> None:
  """Makes one family's output, and compares or writes it."""
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('family', choices=(*EDM, *OPENAI))
  flags.add_argument('--checkout', required=True)
  flags.add_argument('--write', action='store_true')
  given = flags.parse_args()
  path = FOLDER / f'{given.family}.npz'
  stored = dict(np.load(path))
  facts = stored | {key: json.loads(str(stored[key])) for key in ('names', 'arguments')}
  sys.path.insert(0, given.checkout)
  tensors = {
    name: np.asarray(recipe.weights(name, tuple(shape)))
    for name, shape in facts['names'].items()
  }
  if given.family == 'edm2':
    tensors = {k: a.astype(np.float16).astype(np.float32) for k, a in tensors.items()}
  tensors = {name: torch.from_numpy(a) for name, a in tensors.items()}
  x, sigma, labels, cond = recipe.inputs(int(facts['size']), 3, int(facts['classes']))
  x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
  made = {}
  with torch.no_grad():
    if given.family in EDM:
      net, more = edm(facts, tensors)
      cond = None if cond is None else torch.from_numpy(cond)
      if given.family == 'edm2':
        more = more | dict(return_logvar=True)
      output = net(x, torch.from_numpy(sigma), cond, **more)
      if given.family == 'edm2':
        output, log_variance = output
        made['log_variance'] = log_variance.numpy().reshape(-1)
    else:
      denoise, _ = openai(given.family, tensors)
      labels = None if labels is None else torch.from_numpy(labels)
      output = denoise(x, torch.from_numpy(sigma), labels)
  made['output'] = output.numpy().transpose(0, 2, 3, 1)
  for key, value in made.items():
    error = np.linalg.norm(value - stored[key]) / np.linalg.norm(stored[key])
    print(f'{given.family} {key}: relative difference {error:.1e}')
  if given.write:
    np.savez_compressed(path, **stored | made)


if __name__ == '__main__':
  main()
