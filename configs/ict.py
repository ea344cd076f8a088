"""Improved consistency training: from data alone.

Command:   cmjax --config=ict:digits --workdir=runs/ict
Hardware:  toy2d, digits: two CPU cores, two minutes; cifar10: not run
Source:    Song & Dhariwal 2023 (iCT), tables 1 and 4: N(k) from 11 to 1281, RAdam 1e-4,
           batch 1024, EMA 0.99993, dropout 0.3; toy2d, digits: N(k) from 11 to 161,
           optimiser, EMA and length are cmjax choices
Differs:   cifar10: DDPM++ instead of NCSN++ with a Fourier embedding of scale 0.02
Expected:  cifar10: FID 2.83 at one evaluation, 2.46 at two (their table 2)
Measured:  toy2d: error of the map 0.039; digits, width 192:
           0.427 at one evaluation, 0.174 at two (means of three seeds)
"""

from cmjax.configs import parts


def get_config(data='digits'):
  c = parts.on(data)
  c.precond = parts.consistency_precond(0.002)
  if data == 'cifar10':
    c.batch_size = 1024
    c.network.dropout = 0.3
    c.total_images = 400_000 * c.batch_size
    c.optimizer = parts.radam(parts.constant(1e-4))
    c.ema = dict(slow=parts.constant(0.99993))
    end, c_huber = 1280, 0.02993
  else:
    c.total_images = 6_000 * c.batch_size
    c.optimizer = parts.radam(parts.cosine(7e-4))
    c.ema = dict(slow=parts.constant(0.998))
    end, c_huber = 160, {'toy2d': 0.00076, 'digits': 0.00432}[data]
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
