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

from cmjax.configs import papers, parts


def get_config(data='digits'):
  data, metric = papers.split(data)
  toy = data in ('toy2d', 'digits')
  c = parts.tuned(data) if toy else papers.consistency_models(data)
  c = parts.distilled(c)
  c.precond = parts.consistency_precond(0.002)
  c.samplers.two_steps = parts.two_steps(0.002, _middle(data, metric))
  c.objective = dict(
    fn='cmjax.objectives.consistency:cd',
    pairs=parts.karras_pairs(parts.constant(18.0)),
    distance=parts.pseudo_huber(0.0),
    weighting=parts.weighting('inverse_gap' if toy else 'uniform'),
    solver='heun',
    guidance=1.0,
  )
  if toy:
    return c
  papers.set_metric(c, metric)
  if data == 'cifar10':
    rate, iterations = (2e-4 if metric == 'l1' else 4e-4), 800_000
  else:
    rate, iterations = (8e-6 if data == 'imagenet64' else 1e-5), 600_000
    c.objective.pairs.num_scales.value = 40.0
    c.target_decay = parts.constant(0.95)
  c.optimizer = parts.radam(parts.constant(rate))
  c.total_images = iterations * c.batch_size
  return c


def _middle(data, metric):
  """The noise level of the second step: released scripts and notebook."""
  if data.startswith('lsun'):
    return 4.366 if metric == 'lpips' else 3.520
  return {'cifar10': 0.585, 'imagenet64': 1.382}.get(data, 0.821)
