"""Progressive distillation: the number of sampling steps is halved stage by stage.

Command:   cmjax --config=pd:digits --workdir=runs/pd
             --config.init_from=runs/edm
Data:      cifar10, imagenet64, lsun_bedroom256, lsun_cat256; init_from as the teacher
           of `cd`, with the same noise_scale
Hardware:  toy2d, digits: two CPU cores, one minute; the others: not run; TPUs:
           configs/README.md, "Recipes"
Source:    Salimans & Ho 2022, algorithm 2; cifar10: openai/consistency_models_cifar10,
           from 4096 steps, Adam 5e-5 falling to zero in each stage of 50,000
           iterations, gradients clipped to 1; toy2d, digits: from 16 steps, stages,
           optimiser and EMA are cmjax choices; imagenet64 and LSUN: stages and
           optimiser of cifar10, network, batch and EMAs of `cd`, a cmjax choice
Differs:   the optimiser's state is kept from stage to stage; stages are equally long;
           theirs with two steps and one step take 100,000 and 150,000 iterations; an
           EMA of 0.9999, theirs has none
Expected:  FID at one and two evaluations: cifar10 8.34, 5.58; imagenet64 15.39, 8.95
           (Song et al. 2023, tables 1 and 2; those of LSUN have not been looked up)
Measured:  toy2d: error of the map 0.099; digits, width 192: 0.997 at one evaluation,
           0.458 at two (means of three seeds)
"""

from cmjax.configs import papers, parts


def get_config(data='digits'):
  toy = data in ('toy2d', 'digits')
  c = parts.tuned(data) if toy else papers.consistency_models(data)
  c.init_from = parts.REQUIRED
  c.precond = parts.edm_precond()
  if toy:
    start, stage_images, peak = 16, c.total_images // 5, 7e-4
  else:
    start, stage_images, peak = 4096, 50_000 * c.batch_size, 5e-5
    c.total_images = 13 * stage_images
    c.grad_clip_norm = 1.0
  c.optimizer = parts.adam(
    dict(fn='cmjax.schedules:stage_decay', peak=peak, stage_images=stage_images)
  )
  c.objective = dict(
    fn='cmjax.objectives.progressive:pd',
    num_steps=dict(
      fn='cmjax.schedules:halving_steps', start=start, stage_images=stage_images
    ),
    distance=parts.squared_l2(),
    weighting=parts.weighting('truncated_snr'),
    sigma_min=0.002,
    sigma_max=80.0,
    rho=7.0,
  )
  c.target_decay = dict(fn='cmjax.schedules:copy_at_stages', stage_images=stage_images)
  return c
