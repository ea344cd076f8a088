"""Makes the golden images of EDM's augmentation from a checkout of NVlabs/edm.

Usage: python -m tests.golden.make_augmentation --checkout=FOLDER [--write]

Needs torch, numpy, scipy and requests. Prints the largest difference from the stored
images; --write replaces them. `draws` has a row per image: flip_x, flip_y, scale,
angle, stretch, direction and shift as `cmjax.augmentation.Transforms`.
"""

import argparse
from pathlib import Path
import sys

import numpy as np
import torch

PATH = Path(__file__).resolve().parent / 'augmentation.npz'
SIZE, P = (8, 3, 12, 10), 0.6  # images, channels, height, width
ON = ('xflip', 'yflip', 'scale', 'rotate_frac', 'aniso', 'translate_frac')


def made(checkout: str) -> dict[str, np.ndarray]:
  """Images, the transforms that were drawn, and what EDM makes of them."""
  sys.path.insert(0, checkout)
  from training import augment

  drawn: list[np.ndarray] = []

  def recorded(function):
    def call(*args, **kwargs):
      value = function(*args, **kwargs)
      drawn.append(value.numpy().reshape(-1, SIZE[0]).astype(np.float32))
      return value

    return call

  for name in ('rand', 'randn', 'randint'):
    setattr(torch, name, recorded(getattr(torch, name)))
  torch.manual_seed(3)
  x0 = np.random.default_rng(0).uniform(-1, 1, SIZE).astype(np.float32)
  pipe = augment.AugmentPipe(p=P, **dict.fromkeys(ON, 1) | dict(xflip=1e8))
  images, labels = pipe(torch.from_numpy(x0))

  flip_x, _, flip_y, on_y, scale, on_scale, turn, on_turn, *rest = drawn
  stretch, direction, on_stretch, on_direction, shift, on_shift = rest
  circle = np.float32(np.pi)
  rows = [
    flip_x,
    flip_y * (on_y < P),
    scale * (on_scale < P),
    (turn * 2 - 1) * circle * (on_turn < P),
    stretch * (on_stretch < P),
    (direction * 2 - 1) * circle * (on_direction < 0.5),
    shift * (on_shift < P),
  ]
  return {
    'x0': x0.transpose(0, 2, 3, 1),
    'draws': np.concatenate(rows).T.astype(np.float32),
    'output': images.numpy().transpose(0, 2, 3, 1),
    'labels': labels.numpy(),
  }


def main() -> None:
  """Makes the images, and compares or writes them."""
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--checkout', required=True)
  flags.add_argument('--write', action='store_true')
  given = flags.parse_args()
  arrays = made(given.checkout)
  if PATH.exists():
    stored = np.load(PATH)
    print(max(float(np.abs(arrays[k] - stored[k]).max()) for k in arrays))
  if given.write:
    np.savez_compressed(PATH, **arrays)


if __name__ == '__main__':
  main()
