"""Consistency training from data alone, with a target network and a growing grid.

Command:   cmjax --config=ct:toy2d --workdir=runs/ct
Hardware:  toy2d, digits: two CPU cores, two minutes; cifar10: not run
Source:    Song et al. 2023, algorithm 3 and table 3: N(k) and mu(k) of appendix C up to
           150, RAdam 4e-4, batch 512, EMA 0.9999; toy2d, digits: N(k) up to 20, metric,
           weighting, optimiser, EMA and length are cmjax choices
Differs:   cifar10: the squared l2 norm of their ablation, not LPIPS
Expected:  cifar10: FID 8.70 at one evaluation, 5.83 at two, with LPIPS (their table 1)
Measured:  toy2d: error of the map 0.065; digits, width 192:
           0.638 at one evaluation, 0.301 at two (means of three seeds)
"""

from cmjax.configs import parts


def get_config(data='digits'):
  c = parts.on(data)
  c.precond = parts.consistency_precond(0.002)
  c.samplers.two_steps.sigma_min = 0.002
  if data == 'cifar10':
    c.total_images = 800_000 * c.batch_size
    c.optimizer = parts.radam(parts.constant(4e-4))
    c.ema = dict(slow=parts.constant(0.9999))
    curve = dict(start=2, end=150)
    distance, weighting = parts.squared_l2(), parts.weighting('uniform')
  else:
    c.total_images = 6_000 * c.batch_size
    c.optimizer = parts.adam(parts.cosine(1e-3))
    c.ema = dict(slow=parts.constant(0.998))
    curve = dict(start=2, end=20)
    distance, weighting = parts.pseudo_huber(0.03), parts.weighting('inverse_gap')
  num_scales = dict(fn='cmjax.schedules:adaptive_num_scales', **curve)
  c.objective = dict(
    fn='cmjax.objectives.consistency:ct',
    pairs=parts.karras_pairs(num_scales),
    distance=distance,
    weighting=weighting,
  )
  c.target_decay = dict(
    fn='cmjax.schedules:adaptive_decay',
    start_decay=0.9,
    as_released=False,
    **curve,
  )
  return c
