"""The parts that recipes of papers share, and the list of these recipes."""

from typing import NamedTuple

from cmjax.configs import parts


class Recipe(NamedTuple):
  """A slice of TPUs that a recipe fits on, and what its paper reports."""

  topology: str  # (cmjax choice)
  fid: str = ''  # at one / two evaluations; of diffusion models (evaluations)


# The slices, by size of the network and images (cmjax choice).
_SMALL, _DDPMPP, _ADM64, _ADM256, _XL = (
  'v5e:2x4',
  *(f'v5e:{n}x{n}' for n in (4, 8, 16, 16)),
)

# The recipes of papers on images, by the name and the argument of their config.
RECIPES = {
  'edm:cifar10': Recipe(_DDPMPP, '1.97 (35)'),
  'edm:cifar10_cond': Recipe(_DDPMPP, '1.79 (35)'),
  'edm:cifar10_ncsnpp': Recipe(_DDPMPP, '2.04 (35)'),
  'edm:ffhq64': Recipe(_DDPMPP),
  'edm:imagenet64': Recipe(_ADM64, '1.36 (511)'),
  'edm:lsun_bedroom256': Recipe(_ADM256, '3.57 (79)'),
  'edm:lsun_cat256': Recipe(_ADM256, '6.69 (79)'),
  'edm:imagenet64_s': Recipe(_ADM64, '1.58 (63)'),
  'edm:imagenet64_m': Recipe(_ADM64, '1.43 (63)'),
  'edm:imagenet64_l': Recipe(_ADM64, '1.33 (63)'),
  'edm:imagenet64_xl': Recipe(_ADM64, '1.33 (63)'),
  'cd:cifar10': Recipe(_DDPMPP),
  'cd:cifar10_l1': Recipe(_DDPMPP),
  'cd:cifar10_lpips': Recipe(_DDPMPP, '3.55 / 2.93'),
  'cd:imagenet64': Recipe(_ADM64),
  'cd:imagenet64_l1': Recipe(_ADM64),
  'cd:imagenet64_lpips': Recipe(_ADM64, '6.20 / 4.70'),
  'cd:lsun_bedroom256': Recipe(_ADM256),
  'cd:lsun_bedroom256_l1': Recipe(_ADM256),
  'cd:lsun_bedroom256_lpips': Recipe(_ADM256, '7.80 / 5.22'),
  'cd:lsun_cat256': Recipe(_ADM256),
  'cd:lsun_cat256_l1': Recipe(_ADM256),
  'cd:lsun_cat256_lpips': Recipe(_ADM256, '11.0 / 8.84'),
  'ct:cifar10': Recipe(_DDPMPP),
  'ct:cifar10_l1': Recipe(_DDPMPP),
  'ct:cifar10_lpips': Recipe(_DDPMPP, '8.70 / 5.83'),
  'ct:imagenet64': Recipe(_ADM64),
  'ct:imagenet64_l1': Recipe(_ADM64),
  'ct:imagenet64_lpips': Recipe(_ADM64, '13.0 / 11.1'),
  'ct:lsun_bedroom256': Recipe(_ADM256),
  'ct:lsun_bedroom256_l1': Recipe(_ADM256),
  'ct:lsun_bedroom256_lpips': Recipe(_ADM256, '16.0 / 7.85'),
  'ct:lsun_cat256': Recipe(_ADM256),
  'ct:lsun_cat256_l1': Recipe(_ADM256),
  'ct:lsun_cat256_lpips': Recipe(_ADM256, '20.7 / 11.7'),
  'pd:cifar10': Recipe(_DDPMPP, '8.34 / 5.58'),
  'pd:imagenet64': Recipe(_ADM64, '15.39 / 8.95'),
  'pd:lsun_bedroom256': Recipe(_ADM256),
  'pd:lsun_cat256': Recipe(_ADM256),
  'ict:cifar10': Recipe(_DDPMPP, '2.83 / 2.46'),
  'ict:cifar10_deep': Recipe(_DDPMPP, '2.51 / 2.24'),
  'ict:imagenet64': Recipe(_ADM64, '4.02 / 3.20'),
  'ict:imagenet64_deep': Recipe(_ADM64, '3.25 / 2.77'),
  'ect:cifar10': Recipe(_SMALL, '3.86 / 2.15'),
  'ect:cifar10_1h': Recipe(_SMALL, '2.73 at two'),
  'ect:ffhq64': Recipe(_SMALL),
  'ect:imagenet64': Recipe(_DDPMPP, '5.51 / 3.18'),
  'ect:imagenet64_m': Recipe(_DDPMPP, '3.67 / 2.35'),
  'ect:imagenet64_l': Recipe(_DDPMPP),
  'ect:imagenet64_xl': Recipe(_XL, '2.49 / 1.67'),
  'stable_ct:cifar10': Recipe(_SMALL, '3.11 / 2.05'),
  'stable_ct:cifar10_cond': Recipe(_SMALL, '3.03 / 1.88'),
  'stable_ct:imagenet64': Recipe(_DDPMPP, '5.10 / 3.05'),
  'stable_ct:imagenet64_m': Recipe(_DDPMPP, '3.30 / 2.13'),
  'sct:cifar10': Recipe(_DDPMPP, '2.85 / 2.06'),
  'scd:cifar10': Recipe(_DDPMPP, '3.66 / 2.52'),
  'trigflow:cifar10': Recipe(_DDPMPP, '2.15 (35)'),
  'meanflow:cifar10': Recipe(_DDPMPP, '2.92 at one'),
  'shortcut:cifar10': Recipe(_DDPMPP),
  'continuous_cd:cifar10': Recipe(_DDPMPP),
  'continuous_ct:cifar10': Recipe(_DDPMPP),
  'theorem3:cifar10': Recipe(_DDPMPP),
  'theorem4:cifar10': Recipe(_DDPMPP),
}


def images_of(data: str) -> tuple[int, int]:
  """The size of the images of a recipe's data, and its number of classes."""
  if data.startswith('cifar10'):
    return 32, 10 if data.endswith('_cond') else 0
  return {'ffhq64': (64, 0), 'imagenet64': (64, 1000)}.get(
    data.partition('_')[0], (256, 0)
  )


def on(data: str) -> parts.Config:
  """`parts.on`, also for ffhq64, imagenet64, lsun_bedroom256 and lsun_cat256.

  On these the network computes in bfloat16, recomputes its blocks and shards its state,
  to fit in memory (cmjax choice). The metric is the FID of 50,000 samples; only
  --mode=evaluate needs the weights of its network.
  """
  if data not in _LARGE:
    return parts.on(data)
  c = parts.on('cifar10')
  if data == 'ffhq64':
    c.data = parts.images(64, '')
    c.network = parts.ddpmpp(0.0, channel_mult=(1, 2, 2, 2))
  elif data == 'imagenet64':
    c.data, c.network = parts.imagenet64(flip=True), parts.adm()
  else:
    c.data, c.network = parts.images(256, 'lsun'), parts.adm_lsun()
    c.accumulate = 2
  c.network.update(dtype='bfloat16', remat=True)
  c.mesh.fsdp = True
  c.metrics = dict(inception=parts.fid('edm'))
  c.evaluation.num_samples = 50_000
  return c


_LARGE = ('ffhq64', 'imagenet64', 'lsun_bedroom256', 'lsun_cat256')


def consistency_models(data: str) -> parts.Config:
  """`on`, with network, batch size and EMAs of CD, CT and PD on images.

  Source: Song et al. 2023, table 3 (batch of 2048); openai/consistency_models
  `launch.sh` (EMAs) and openai/consistency_models_cifar10 (NCSN++).
  """
  c = on(data)
  if data == 'cifar10':
    c.data.flip, c.network = True, parts.ncsnpp(dropout=0.0)
    c.ema = dict(slow=parts.constant(0.9999))
  elif data in _LARGE:
    c.batch_size = 2048
    c.metrics = dict(inception=parts.fid('truncate'))
    fast = 0.999 if data == 'imagenet64' else 0.9999
    c.ema = dict(fast=parts.constant(fast), slow=parts.constant(0.9999432189950708))
  return c


def edm2(size: str, dropout: float) -> parts.Config:
  """`on` imagenet64, with EDM2's network of a size: s, m, l or xl; no flips."""
  c = on('imagenet64')
  c.data.flip = False
  c.network = parts.edm2(parts.EDM2[size], dropout)
  c.network.update(dtype='bfloat16', remat=True)
  return c


def split(data: str) -> tuple[str, str]:
  """The data and the metric of `imagenet64_l1`: l1, lpips, or l2 without a suffix."""
  name, _, metric = data.rpartition('_')
  return (name, metric) if metric in ('l1', 'lpips') else (data, 'l2')


def set_metric(c: parts.Config, metric: str) -> None:
  """Sets the distance of an objective; LPIPS needs downloaded weights."""
  if metric == 'lpips':  # pooling: as in the released code of each network
    pooling = 'average' if c.network.fn == 'cmjax.networks.adm:adm' else 'max'
    c.objective.distance = parts.lpips(pooling=pooling)
    c.perceptual = parts.lpips_weights()
  else:
    c.objective.distance = parts.l1() if metric == 'l1' else parts.squared_l2()
