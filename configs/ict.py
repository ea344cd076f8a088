"""Improved consistency training: from data alone.

Command:   cmjax --config=ict:digits --workdir=runs/ict
Data:      cifar10 and imagenet64; with the suffix _deep twice the residual blocks
Hardware:  toy2d, digits: two CPU cores, two minutes; the others: not run; TPUs:
           configs/README.md, "Recipes"
Source:    Song & Dhariwal 2023 (iCT), tables 1 and 4: N(k) from 11 to 1281, RAdam 1e-4;
           cifar10: NCSN++ with a Fourier embedding of scale 0.02, batch 1024, 400k
           iterations, EMA 0.99993, dropout 0.3; imagenet64: ADM without FiLM, batch
           4096, 800k iterations, EMA 0.99997, dropout 0.2 up to 16x16; toy2d, digits:
           N(k) from 11 to 161, optimiser, EMA and length are cmjax choices; horizontal
           flips as in `ct`, a cmjax choice; batch, length, EMA and dropout of
           imagenet64, and both _deep, have not been checked against the paper
Differs:   imagenet64: bfloat16; TFDS's images
Expected:  FID at one and two evaluations: cifar10 2.83, 2.46, _deep 2.51, 2.24;
           imagenet64 4.02, 3.20, _deep 3.25, 2.77 (their tables 2 and 3)
Measured:  toy2d: error of the map 0.039; digits, width 192: 0.427 at one evaluation,
           0.174 at two (means of three seeds)
"""

from cmjax.configs import papers, parts


def get_config(data='digits'):
  data, _, deep = data.partition('_')
  c = papers.on(data)
  c.precond = parts.consistency_precond(0.002)
  if data in ('toy2d', 'digits'):
    c.total_images = 6_000 * c.batch_size
    c.optimizer = parts.radam(parts.cosine(7e-4))
    c.ema = dict(slow=parts.constant(0.998))
    end, c_huber = 160, {'toy2d': 0.00076, 'digits': 0.00432}[data]
  else:
    c.data.flip = True
    c.optimizer = parts.radam(parts.constant(1e-4))
    end = 1280
    if data == 'cifar10':
      c.batch_size, iterations, decay, c_huber = 1024, 400_000, 0.99993, 0.02993
      c.network = parts.ncsnpp(0.3, fourier_scale=0.02, num_blocks=8 if deep else 4)
    else:
      c.batch_size, iterations, decay, c_huber = 4096, 800_000, 0.99997, 0.05986
      c.network.update(film=False, num_blocks=6 if deep else 3)
      c.network.update(dropout=0.2, dropout_resolution=16)
      c.accumulate = 2
      c.samplers.two_steps = parts.two_steps(middle=1.526)
    c.ema = dict(slow=parts.constant(decay))
    c.total_images = iterations * c.batch_size
  c.objective = dict(
    fn='cmjax.objectives.consistency:ict',
    num_scales=dict(fn='cmjax.schedules:doubling_num_scales', start=10, end=end),
    c=c_huber,
    mean=-1.1,
    std=2.0,
    sigma_min=0.002,
    sigma_max=80.0,
    rho=7.0,
  )
  return c
