"""Consistency training from data alone, with a target network and a growing grid.

Command:   cmjax --config=ct:toy2d --workdir=runs/ct
Data:      as in `cd`, with the same suffixes, without a teacher
Hardware:  toy2d, digits: two CPU cores, two minutes; the others: not run; TPUs:
           configs/README.md, "Recipes"
Source:    Song et al. 2023, algorithm 3 and table 3: N(k) and mu(k) of appendix C, s1 =
           150 (imagenet64: 200), mu0 = 0.9 (the larger images: 0.95), batch 512 or
           2048, 800k iterations (LSUN: 1M); learning rates 4e-4, 1e-4 and 5e-5, EMAs
           and second noise levels: released `launch.sh` (cifar10: that of iCT, a cmjax
           choice); toy2d, digits: N(k) up to 20, metric, weighting, optimiser, EMA and
           length are cmjax choices, and so are l1 and l2 on images
Differs:   table 3 has learning rates of 8e-6 and 1e-5 on imagenet64 and LSUN;
           `launch.sh` starts from the weights of a teacher (--config.init_from), the
           paper from random ones; the rest as in `cd`
Expected:  with LPIPS, FID at one and two evaluations: cifar10 8.70, 5.83; imagenet64
           13.0, 11.1; lsun_bedroom256 16.0, 7.85; lsun_cat256 20.7, 11.7 (their tables)
Measured:  toy2d: error of the map 0.065; digits, width 192: 0.638 at one evaluation,
           0.301 at two (means of three seeds)
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
