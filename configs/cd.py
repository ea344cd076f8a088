"""Consistency distillation of a teacher by Heun steps.

Command:   cmjax --config=cd:digits --workdir=runs/cd
             --config.teacher=runs/edm
Hardware:  toy2d, digits: two CPU cores, two minutes; cifar10: not run
Source:    Song et al. 2023, algorithm 2 and table 3: N = 18, RAdam 4e-4, batch 512,
           EMA 0.9999, mu = 0; toy2d, digits: optimiser, EMA, metric, weighting and
           length are cmjax choices
Differs:   cifar10: the squared l2 norm of their ablation, not LPIPS
Expected:  cifar10: FID 3.55 at one evaluation, 2.93 at two, with LPIPS (their table 1)
Measured:  toy2d: error of the map 0.022; digits, width 192:
           0.604 at one evaluation, 0.217 at two (means of three seeds)
"""

from cmjax.configs import parts


def get_config(data='digits'):
  c = parts.distilled(parts.tuned(data))
  c.precond = parts.consistency_precond(0.002)
  c.samplers.two_steps.sigma_min = 0.002
  distance, weighting = parts.pseudo_huber(0.0), parts.weighting('inverse_gap')
  if data == 'cifar10':
    c.total_images = 800_000 * c.batch_size
    c.optimizer = parts.radam(parts.constant(4e-4))
    c.ema = dict(slow=parts.constant(0.9999))
    distance, weighting = parts.squared_l2(), parts.weighting('uniform')
  c.objective = dict(
    fn='cmjax.objectives.consistency:cd',
    pairs=parts.karras_pairs(parts.constant(18.0)),
    distance=distance,
    weighting=weighting,
    solver='heun',
    guidance=1.0,
  )
  return c
