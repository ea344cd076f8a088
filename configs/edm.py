"""EDM: the diffusion model that other models start from, distil or are compared with.

Command:   cmjax --config=edm:digits --workdir=runs/edm
Hardware:  toy2d, digits: two CPU cores, a minute; cifar10: not trained to the end
Source:    objective, sampler and noise levels of Karras et al. 2022, table 1; cifar10:
           NVlabs/edm `train.py`; toy2d, digits: network, optimiser, length cmjax choice
Differs:   cifar10: images are reflected over their whole width before augmentation
Expected:  digits: pixel Frechet distance <= 0.12, label agreement >= 0.98; cifar10: FID
           1.97 at 35 evaluations, with augmentation (NVlabs/edm README)
Measured:  digits: 0.095 and 0.991 at 35 evaluations (README.md, "Quick start"); 2.04
           bits per dimension of training examples (study `likelihood`)
"""

from cmjax.configs import parts


def get_config(data='digits'):
  c = parts.on(data)
  c.precond = parts.edm_precond()
  of_images = dict(augmentation=parts.augmentation(0.12)) if data == 'cifar10' else {}
  c.objective = dict(
    fn='cmjax.objectives.denoise:edm',
    times=parts.lognormal(-1.2, 1.2),
    sigma_data=0.5,
    label_dropout=0.0,
    **of_images,
  )
  if data == 'cifar10':
    c.data = parts.cifar10(flip=False)  # the augmentation does
    c.network.update(dropout=0.13, augment=9)
    c.total_images = 200_000_000
    c.optimizer = parts.adam(parts.warmup(1e-3, warmup_images=10_000_000))
    c.ema = dict(slow=parts.half_life(500_000, rampup_ratio=0.05))
  else:
    c.total_images = 3_000 * c.batch_size
    c.optimizer = parts.adam(parts.cosine(1e-3))
    c.ema = dict(slow=parts.constant(0.998))
  c.samplers = dict(heun=parts.heun(), one_step=parts.one_step())
  c.studies.likelihood = parts.likelihood(data)
  return c
