"""Stable Consistency Tuning: ECT along the averaged path of a reference set.

Command:   cmjax --config=stable_ct:digits --workdir=runs/stable_ct
             --config.init_from=runs/edm
Data:      cifar10, cifar10_cond with labels; imagenet64 in EDM2-S, and _m; init_from as
           in `ect`
Hardware:  toy2d, digits: two CPU cores, one to two minutes; the others: not run;
           TPUs: configs/README.md, "Recipes"
Source:    Wang et al. 2024 (Stable Consistency Tuning): target, 1 / (t - r), the rest
           as in `ect`; smooth stages, c and the threshold, 3 sqrt(features / 3072),
           below which the posterior is one example, are cmjax choices
Differs:   imagenet64: 256 reference images of each class (3.1 GB on each chip), not all
Expected:  FID at one and two evaluations: cifar10 3.11, 2.05; cifar10_cond 3.03, 1.88;
           imagenet64 5.10, 3.05; imagenet64_m 3.30, 2.13 (their table)
Measured:  toy2d: error of the map 0.043; digits, width 192: 0.457 at one evaluation,
           0.178 at two (means of three seeds)
"""

from cmjax.configs import ect, parts


def get_config(data='digits'):
  data, phased, _ = data.partition('_phased')
  c = ect.get_config(data)
  imagenet = data.startswith('imagenet64')
  per_class = 2_000 if data == 'toy2d' else 256 if imagenet else 0  # 0: all
  c.reference = dict(fn='cmjax.data.reference:reference', per_class=per_class, seed=0)
  with c.unlocked():
    c.objective.fn = 'cmjax.objectives.consistency:stable_ct'
    c.objective.sigma_threshold = {'toy2d': 0.08, 'digits': 0.43}.get(
      data, 6.0 if imagenet else 3.0
    )
    c.objective.block_size = 256
    c.objective.edges = (0.3, 1.5, 8.0) if phased else ()
  c.objective.relative_gap.smooth = True
  c.objective.distance = parts.pseudo_huber(0.06 if imagenet else 0.0)
  c.objective.weighting = parts.weighting('inverse_gap')
  if phased:
    c.samplers = dict(
      four_steps=dict(
        fn='cmjax.samplers:phased',
        edges=c.objective.edges,
        sigma_max=80.0,
        skip=0.9,
      )
    )
  return c
