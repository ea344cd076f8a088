"""EDM: the diffusion model that other models start from, distil or are compared with.

Command:   cmjax --config=edm:digits --workdir=runs/edm
Data:      cifar10 in DDPM++, cifar10_cond with labels, cifar10_ncsnpp in NCSN++;
           imagenet64 in ADM, imagenet64_s, _m, _l, _xl in EDM2; ffhq64, lsun_bedroom256
           and lsun_cat256, which need --config.data.path
Hardware:  toy2d, digits: two CPU cores, a minute; the others: not run; TPUs:
           configs/README.md, "Recipes"
Source:    objective, sampler and noise levels of Karras et al. 2022, table 1; cifar10,
           ffhq64, imagenet64: NVlabs/edm `train.py` and README; lsun: Song et al. 2023,
           table 3 and appendix C, openai/consistency_models `launch.sh`; imagenet64_s
           to _xl: NVlabs/edm2 `train_edm2.py`; toy2d, digits: network, optimiser,
           length cmjax choice
Differs:   cifar10, ffhq64: images are reflected over their whole width before
           augmentation; cifar10_ncsnpp, without augmentation, is the teacher of Song et
           al. 2023, who train it for 400,000 steps with an EMA without ramp-up; lsun:
           no EMA of 0.999; imagenet64: TFDS's images; EDM2: EDM's weighting times the
           learned one; 64x64 and larger: bfloat16
Expected:  digits: pixel Frechet distance <= 0.12, label agreement >= 0.98; FID: cifar10
           1.97, cifar10_cond 1.79, cifar10_ncsnpp 2.04, at 35 evaluations;
           imagenet64 1.36 at 511; lsun_bedroom256 3.57, lsun_cat256 6.69
           at 79; imagenet64_s 1.58, _m 1.43, _l 1.33, _xl 1.33 at 63, with EMAs of
           width 0.075, 0.06, 0.04, 0.04 (--config.sample_relative_std)
Measured:  digits: 0.095 and 0.991 at 35 evaluations (README.md, "Quick start"); 2.04
           bits per dimension of training examples (study `likelihood`)
"""

from cmjax.configs import papers, parts


def get_config(data='digits'):
  data, _, variant = data.partition('_')
  if data == 'lsun':
    c = _lsun(f'lsun_{variant}')
  elif data == 'imagenet64' and variant:
    c = _edm2(variant)
  else:
    c = _edm(data)
  if variant == 'cond':
    c.data.conditional = True
  if variant == 'ncsnpp':
    c.network, c.data.flip = parts.ncsnpp(dropout=0.13), True
    del c.objective.augmentation
  c.precond = parts.edm_precond()
  c.samplers.one_step = parts.one_step()
  c.studies.likelihood = parts.likelihood(data)
  return c


def _objective(mean, std):
  return dict(
    fn='cmjax.objectives.denoise:edm',
    times=parts.lognormal(mean, std),
    sigma_data=0.5,
    label_dropout=0.0,
  )


# NVlabs/edm: batch size, millions of images, learning rate, dropout, half-life of the
# EMA in images, probability of augmentation, steps of the sampler.
_EDM = {
  'cifar10': (512, 200, 1e-3, 0.13, 500_000, 0.12, 18),
  'ffhq64': (256, 200, 2e-4, 0.05, 500_000, 0.15, 40),
  'imagenet64': (4096, 2500, 1e-4, 0.1, 50_000_000, 0.0, 256),
}


def _edm(data):
  c = papers.on(data)
  c.objective = _objective(-1.2, 1.2)
  if data not in _EDM:
    c.samplers = dict(heun=parts.heun())
    c.total_images = 3_000 * c.batch_size
    c.optimizer = parts.adam(parts.cosine(1e-3))
    c.ema = dict(slow=parts.constant(0.998))
    return c
  c.batch_size, millions, rate, dropout, half_life, p, steps = _EDM[data]
  c.network.dropout = dropout
  c.total_images = millions * 1_000_000
  c.data.flip = False  # the augmentation does
  if p:
    c.network.augment = 9
    c.objective = _objective(-1.2, 1.2) | dict(augmentation=parts.augmentation(p))
  c.optimizer = parts.adam(parts.warmup(rate, warmup_images=10_000_000))
  c.ema = dict(slow=parts.half_life(half_life, rampup_ratio=0.05))
  c.samplers = dict(heun=parts.heun(steps))
  if data == 'imagenet64':
    c.accumulate = 2
    fn = 'cmjax.diffusion_samplers:stochastic'
    c.samplers = dict(stochastic=dict(fn=fn, num_steps=steps))
  return c


# NVlabs/edm2: images / 2^20, learning rate, dropout.
_EDM2 = {
  's': (1024, 1e-2, 0.0),
  'm': (2048, 9e-3, 0.1),
  'l': (1024, 8e-3, 0.1),
  'xl': (640, 7e-3, 0.1),
}


def _edm2(size):
  images, rate, dropout = _EDM2[size]
  c = papers.edm2(size, dropout)
  c.network.update(dropout_resolution=64, log_weight=True)
  c.objective = _objective(-0.8, 1.6)
  c.batch_size, c.total_images = 2048, images * 2**20
  if size in ('l', 'xl'):
    c.accumulate = 2
  rate = parts.inverse_root(
    rate, hold_images=35_000 * c.batch_size, rampup_images=10_000_000
  )
  c.optimizer = parts.unit_weights(parts.adam(rate, b2=0.99))
  c.ema = parts.power_emas(0.05, 0.1)
  c.sample_weights = 'power_050'
  c.every.snapshot_steps = 2**23 // c.batch_size
  c.samplers = dict(heun=parts.heun(32))
  return c


def _lsun(data):
  c = papers.consistency_models(data)
  c.objective = _objective(-1.2, 1.2)
  c.network.dropout = 0.1
  iterations = 600_000 if data == 'lsun_bedroom256' else 300_000
  c.total_images = iterations * c.batch_size
  c.optimizer = parts.radam(parts.constant(1e-4))
  c.samplers = dict(heun=parts.heun(40))
  return c
