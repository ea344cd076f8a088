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

from cmjax.configs import papers, parts


def get_config(data='digits'):
  data, metric = papers.split(data)
  c = papers.consistency_models(data)
  c.precond = parts.consistency_precond(0.002)
  c.samplers.two_steps = parts.two_steps(0.002, _MIDDLE.get(data, 0.821))
  paper = data in _PAPER
  if paper:
    end, start_decay, iterations, rate = _PAPER[data]
    c.optimizer = parts.radam(parts.constant(rate))
  else:
    end, start_decay, iterations = 20, 0.9, 6_000
    c.optimizer = parts.adam(parts.cosine(1e-3))
    c.ema = dict(slow=parts.constant(0.998))
  c.total_images = iterations * c.batch_size
  curve = dict(start=2, end=end)
  num_scales = dict(fn='cmjax.schedules:adaptive_num_scales', **curve)
  c.objective = dict(
    fn='cmjax.objectives.consistency:ct',
    pairs=parts.karras_pairs(num_scales),
    distance=parts.pseudo_huber(0.03),
    weighting=parts.weighting('uniform' if paper else 'inverse_gap'),
  )
  if paper:
    papers.set_metric(c, metric)
  c.target_decay = dict(
    fn='cmjax.schedules:adaptive_decay',
    start_decay=start_decay,
    as_released=False,
    **curve,
  )
  return c


# s1, mu0, iterations, learning rate.
_PAPER = {
  'cifar10': (150, 0.9, 800_000, 4e-4),
  'imagenet64': (200, 0.95, 800_000, 1e-4),
  'lsun_bedroom256': (150, 0.95, 1_000_000, 5e-5),
  'lsun_cat256': (150, 0.95, 1_000_000, 5e-5),
}
# The noise level of the second step: released scripts.
_MIDDLE = {'imagenet64': 1.913, 'lsun_bedroom256': 3.991, 'lsun_cat256': 5.249}
