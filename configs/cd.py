"""Consistency distillation of a teacher by Heun steps.

Command:   cmjax --config=cd:digits --workdir=runs/cd
             --config.teacher=runs/edm
Data:      cifar10; imagenet64; lsun_bedroom256 and lsun_cat256, which need
           --config.data.path; each with the squared l2 norm, or with the suffix _l1 or
           _lpips, whose weights are config.perceptual.vgg and heads. The teacher has
           the same network: a run of edm:cifar10_ncsnpp, edm:imagenet64,
           edm:lsun_bedroom256 or edm:lsun_cat256, or OpenAI's released edm_* files,
           whose .pt files also need --config.network.noise_scale=1000, with which they
           were trained
Hardware:  toy2d, digits: two CPU cores, two minutes; the others: not run; TPUs:
           configs/README.md, "Recipes"
Source:    Song et al. 2023, algorithm 2 and table 3: N = 18 or 40, mu = 0 or 0.95,
           RAdam 4e-4 (l1: 2e-4), 8e-6 and 1e-5, batch 512 or 2048, 800k or 600k
           iterations; openai/consistency_models_cifar10 and openai/consistency_models
           `launch.sh`: networks, EMAs, second noise levels (lsun_cat256: that of
           lsun_bedroom256; cifar10: of LPIPS; l1: of l2; cmjax choices); toy2d, digits:
           optimiser, EMA, metric, weighting and length are cmjax choices, and so is l1
           on imagenet64 and lsun
Differs:   l1 and l2 are summed, not averaged, over pixels; `launch.sh` has a batch of
           256 on LSUN; its ImageNet64 and LSUN runs use float16, these bfloat16, and
           its third EMA, 0.9999 or 0.99994, is left out; ImageNet is TFDS's, not
           cropped
Expected:  with LPIPS, FID at one and two evaluations: cifar10 3.55, 2.93; imagenet64
           6.20, 4.70; lsun_bedroom256 7.80, 5.22; lsun_cat256 11.0, 8.84 (their tables
           1 and 2); for l1 and l2 there are only curves
Measured:  toy2d: error of the map 0.022; digits, width 192: 0.604 at one evaluation,
           0.217 at two (means of three seeds)
"""

from cmjax.configs import papers, parts


def get_config(data='digits'):
  data, metric = papers.split(data)
  toy = data in ('toy2d', 'digits')
  c = parts.tuned(data) if toy else papers.consistency_models(data)
  c = parts.distilled(c)
  c.precond = parts.consistency_precond(0.002)
  c.samplers.two_steps = parts.two_steps(0.002, _middle(data, metric))
  num_scales = 18.0 if toy or data == 'cifar10' else 40.0
  c.objective = dict(
    fn='cmjax.objectives.consistency:cd',
    pairs=parts.karras_pairs(parts.constant(num_scales)),
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
    c.target_decay = parts.constant(0.95)
  c.optimizer = parts.radam(parts.constant(rate))
  c.total_images = iterations * c.batch_size
  return c


def _middle(data, metric):
  """The noise level of the second step: released scripts and notebook."""
  if data.startswith('lsun'):
    return 4.366 if metric == 'lpips' else 3.520
  return {'cifar10': 0.585, 'imagenet64': 1.382}.get(data, 0.821)
