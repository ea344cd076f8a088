"""MeanFlow: the average velocity between two times, from data alone.

Command:   cmjax --config=meanflow:digits --workdir=runs/meanflow
Hardware:  toy2d, digits: two CPU cores, two minutes; cifar10: not run
Source:    Geng et al. 2025 (MeanFlow); cifar10: their py-meanflow, logit-normal
           (-2, 2), r = t in a quarter of the batch, p = 0.75, dropout 0.2, Adam 6e-4,
           batch 1024, 16,000 epochs; toy2d, digits: (-0.4, 1), three quarters and p = 1
           of their ImageNet runs; optimiser, EMA and length are cmjax choices
Differs:   cifar10: without EDM's augmentation
Expected:  cifar10: FID 2.92 at one evaluation (their table 3)
Measured:  toy2d: error of the map 0.082; digits, width 192:
           0.570 at one evaluation, 0.192 at two (means of three seeds)
"""

from cmjax.configs import parts


def get_config(data='digits'):
  c = parts.on(data, **parts.two_time_network(data))
  c.precond = parts.two_time_precond()
  c.samplers.two_steps = dict(fn='cmjax.samplers:flow_map', sigmas=(80.0, 0.821))
  draw, power = dict(mean=-0.4, std=1.0, equal_fraction=0.75), 1.0
  if data == 'cifar10':
    c.batch_size = 1024
    c.network.dropout = 0.2
    c.total_images = 16_000 * 50_000
    c.optimizer = parts.adam(parts.constant(6e-4))
    c.ema = dict(slow=parts.constant(0.9999))
    draw, power = dict(mean=-2.0, std=2.0, equal_fraction=0.25), 0.75
  else:
    c.total_images = 6_000 * c.batch_size
    c.optimizer = parts.adam(parts.cosine(1e-3))
    c.ema = dict(slow=parts.constant(0.998))
  c.objective = dict(
    fn='cmjax.objectives.flow_map:meanflow',
    pairs=dict(fn='cmjax.times:logit_normal_pairs', **draw),
    power=power,
    c=0.01,
    guidance=1.0,
    label_dropout=0.0,
    marginal_tangent=False,
  )
  return c
