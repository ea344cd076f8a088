"""Easy Consistency Tuning: from diffusion to consistency by shrinking r(t).

Command:   cmjax --config=configs/ect.py:digits --workdir=runs/ect
             --config.init_from=runs/edm
Hardware:  digits: two CPU cores, about three minutes; toy2d one; cifar10: here 20 steps
           of a narrow network on two CPU cores
Source:    Geng et al. 2024 (ECT); cifar10: locuslab/ect `run_ecm.sh`, and cifar10_1h
           `run_ecm_1hour.sh`; toy2d, digits: smooth stages, optimiser and length are
           cmjax choices
Differs:   released networks sample with `--config.precond.sigma_min=0.003`; optax's
           RAdam adds eps after its bias correction, PyTorch's before
Expected:  digits: pixel Frechet distance <= 0.18 at one evaluation, <= 0.12 at two;
           label agreement >= 0.98; cifar10: FID 3.86 at one evaluation, 2.15 at two
           (locuslab/ect README); cifar10_1h: 2.73 at two (abstract of the paper)
Measured:  digits: 0.167 and 0.089, agreement 0.988 and 0.991 (README.md, "Quick start")
"""

import parts


def get_config(data='digits'):
  one_hour = data == 'cifar10_1h'
  c = parts.tuned('cifar10' if one_hour else data)
  c.precond = parts.consistency_precond(0.0)
  if data == 'digits':
    c.total_images = 8_000 * c.batch_size
  gap = dict(q=2.0, stage_images=c.total_images // 8, smooth=True)
  if data not in ('toy2d', 'digits'):
    c.batch_size = 128
    c.network.dropout = 0.2
    c.total_images = 25_600_000
    c.optimizer = parts.radam(parts.constant(1e-4))
    c.ema = dict(slow=parts.constant(0.9999))
    gap = dict(q=2.0, stage_images=3_200_000, smooth=False)
  if one_hour:
    c.total_images = 8_000 * c.batch_size
    c.ema = dict(slow=parts.constant(0.9993))
    gap = dict(q=256.0, stage_images=128_000_000, smooth=False)
  c.objective = dict(
    fn='cmjax.objectives.discrete:ect',
    times=parts.lognormal(-1.1, 2.0),
    gap=parts.shrinking_gap(**gap),
    distance=parts.pseudo_huber(0.0),
    weighting=parts.weighting('inverse_gap'),
    k=8.0,
    b=1.0,
  )
  return c
