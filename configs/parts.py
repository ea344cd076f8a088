"""The parts of configs: functions that return dicts."""

from typing import Any

from ml_collections import ConfigDict

from cmjax.core import UserError

REQUIRED = '?'  # must be given: --config.KEY=VALUE
# The data sets that every config takes: --config=OBJECTIVE:DATA.
DATA = ('toy2d', 'digits', 'cifar10')
# Data sets that only one config takes, besides the recipes of papers.py.
MORE_DATA = {
  'ect': ('cifar10_cond',),
  'stable_ct': ('toy2d_phased', 'digits_phased', 'cifar10_phased'),
}


Config = Any  # a ConfigDict; type checkers do not know the types of its values


def on(data: str, **network) -> Config:
  """Data, network, samplers and metrics of toy2d, digits or cifar10.

  `network` sets keywords of the network. Samples are drawn with the weights of the EMA
  `slow`, which the config defines.
  """
  if data not in DATA:
    raise UserError(f'no data {data!r}; known: {", ".join(DATA)}')
  c = base()
  c.sample_weights = 'slow'
  c.samplers = dict(one_step=one_step(), two_steps=two_steps())
  c.metrics = pixel_metrics()
  c.every.picture_steps = 1_000
  if data == 'toy2d':
    c.batch_size = 256
    c.data = dict(
      fn='cmjax.data.points:points', oracle=ring(), num_samples=50_000, seed=0
    )
    c.network = toy_network() | network
    c.evaluation.num_pictured = 2_000
  elif data == 'digits':
    c.batch_size = 128
    c.data = digits()
    c.network = digits_network() | network
    c.metrics = digits_metrics()
    c.evaluation.num_samples = 1797
  else:
    c.batch_size = 512
    c.data = cifar10(flip=False)
    c.network = ddpmpp(dropout=0.0) | network
    c.every.picture_steps = 5_000
    c.every.checkpoint_steps = 5_000
  c.studies = studies(data)
  return c


def tuned(data: str, **network) -> Config:
  """`on`, for a student that starts from a diffusion model.

  On toy2d and digits, RAdam with a learning rate falling to zero over 3,000 steps
  (cmjax choice).
  """
  c = on(data, **network)
  c.init_from = REQUIRED
  if data != 'cifar10':
    c.total_images = 3_000 * c.batch_size
    c.optimizer = radam(cosine(7e-4))
    c.ema = dict(slow=constant(0.998))
  return c


def distilled(c: Config) -> Config:
  """The config with a teacher, from whose weights the student starts."""
  c.teacher = REQUIRED
  c.init_from = c.get_ref('teacher') + ''  # follows the teacher unless it is given
  return c


def base() -> Config:
  """Every key of the top level; a config fills in the parts."""
  return ConfigDict(
    dict(
      seed=0,  # of initial weights, data order and training noise
      batch_size=256,  # over all devices
      accumulate=1,  # parts of a batch in sequence, to save memory
      total_images=0,  # length of the run; steps = total_images / batch_size
      grad_clip_norm=0.0,  # global norm; 0 is off
      max_skipped_steps=100,  # steps with NaN or infinity before a run stops
      init_from='',  # work directory or checkpoint to start from
      teacher='',  # the same, for objectives that distil a teacher
      guide='',  # the same: a worse version of the model, for guidance:autoguidance
      sample_weights='online',  # or the name of an EMA
      # > 0: once trained, an EMA of this width is computed from the snapshots
      sample_relative_std=0.0,
      # With fsdp, the state is sharded over the devices.
      mesh=dict(fn='cmjax.runtime.sharding:mesh', fsdp=False, num_slices=1),
      data={},
      loader=dict(  # of data on disk; the batches do not depend on it
        workers=0,  # processes that decode; 0: only threads of the trainer
        threads=8,  # of each process
        ahead=4,  # batches
      ),
      network={},
      precond={},
      objective={},
      optimizer={},
      target_decay={},  # of the target network; empty: stop-gradient of online
      reference={},  # examples kept on the device to average over
      perceptual={},  # weights of the network of a perceptual distance
      ema={},
      samplers={},
      metrics={},
      studies={},
      trackers=dict(tensorboard=dict(fn='cmjax.runtime.trackers:tensorboard')),
      evaluation=dict(
        num_samples=10_000,
        batch_size=512,
        seed=1,  # pictures, and metrics in training, use this one alone
        num_seeds=3,  # seed, seed + 1, ...
        labels='data',  # of the data in order; balanced: each class in turn
        num_pictured=100,
      ),
      search=dict(
        sampler='',  # whose key is searched; empty: the first that has it
        key='sigmas',  # or any number of the sampler, such as skip, or guidance
        metric='',  # such as pixel_frechet; empty: the first of the config
        maximise=False,
        low=0.0,  # range of the key, and for sigmas of the noise levels;
        high=0.0,  # both 0 for sigmas: from 0.002 to the first of the sampler
        num_steps=2,  # for sigmas: each number of steps up to this one
        max_evaluations=15,  # per noise level, or number
        num_samples=10_000,
        seed=1_000_000,  # apart from the seeds of evaluation
      ),
      every=dict(  # 0: never; all but logs also at the end
        log_steps=100,
        picture_steps=0,
        evaluate_steps=0,
        checkpoint_steps=1000,
        snapshot_steps=0,  # of the EMAs of `power_emas`; none is deleted
      ),
      watchdog=dict(  # of training steps that hang, in seconds
        report_s=20.0,  # or ten times the longest step, if that is more
        stop_s=600.0,  # ends the process with exit code 75; 0: never
      ),
      keep_checkpoints=2,
    )
  )


def digits(conditional: bool = True) -> dict:
  """The 1,797 images of digits that come with scikit-learn."""
  return dict(fn='cmjax.data.digits:digits', conditional=conditional)


def cifar10(flip: bool, conditional: bool = False) -> dict:
  """CIFAR-10 from TFDS; empty data_dir: that of CMJAX_DATA_DIR, else TFDS's own."""
  return dict(
    fn='cmjax.data.tfds:tfds',
    name='cifar10',
    split='train',
    data_dir='',
    conditional=conditional,
    flip=flip,
    display_name='CIFAR-10',
  )


def imagenet64(flip: bool = False) -> dict:
  """ImageNet at 64x64 with its 1,000 labels from TFDS; 16 GB, which stay on disk."""
  return dict(
    fn='cmjax.data.tfds:tfds',
    name='imagenet_resized/64x64',
    split='train',
    data_dir='',
    conditional=True,
    flip=flip,
    display_name='ImageNet 64x64 (resized, TFDS)',
  )


def images(size: int, crop: str, flip: bool = True) -> dict:
  """Images without labels, as a folder or a zip file that must be given."""
  return dict(
    fn='cmjax.data.files:from_path',
    path=REQUIRED,
    conditional=False,
    flip=flip,
    size=size,
    crop=crop,
  )


def ring() -> dict:
  """Six equal Gaussians on a circle (cmjax choice)."""
  return dict(fn='cmjax.oracles:ring', modes=6, radius=0.7, std=0.08)


def digits_network() -> dict:
  """A residual MLP of 1.7 M parameters (cmjax choice)."""
  return _mlp(width=384, num_blocks=4, noise_scale=100.0)


def toy_network() -> dict:
  """A residual MLP of 0.2 M parameters (cmjax choice)."""
  return _mlp(width=128, num_blocks=3, noise_scale=20.0)


def _mlp(width: int, num_blocks: int, noise_scale: float) -> dict:
  return dict(
    fn='cmjax.networks.mlp:mlp',
    width=width,
    num_blocks=num_blocks,
    embedding=128,
    dropout=0.0,
    noise_scale=noise_scale,
    num_times=1,
    log_weight=False,
    dtype='float32',
  )


_UNET = dict(
  noise_scale=1.0,
  num_times=1,
  log_weight=False,
  dtype='float32',  # or bfloat16
  attention_implementation='exact',  # or chunked, fused
  remat=False,
)


def ddpmpp(dropout: float, channel_mult: tuple[int, ...] = (2, 2, 2)) -> dict:
  """DDPM++ for 32x32 images, 55.7 M parameters; NVlabs/edm `train.py`.

  For 64x64 images channel_mult is (1, 2, 2, 2): 61.8 M parameters.
  """
  return dict(
    fn='cmjax.networks.songunet:songunet',
    channels=128,
    channel_mult=channel_mult,
    num_blocks=4,
    attention_resolutions=(16,),
    dropout=dropout,
    **_UNET,
  )


def ncsnpp(dropout: float, fourier_scale: float = 16.0, num_blocks: int = 4) -> dict:
  """NCSN++ of 56.4 M parameters for 32x32 images; iCT has a Fourier scale of 0.02."""
  return ddpmpp(dropout) | dict(
    num_blocks=num_blocks,
    embedding='fourier',
    residual_input=True,
    taps=(1, 3, 3, 1),
    noise_scale=fourier_scale / 16.0,  # the frequencies are drawn with 16
  )


def adm(film: bool = True, num_blocks: int = 3) -> dict:
  """ADM for ImageNet 64x64: 295.9 M parameters."""
  return dict(
    fn='cmjax.networks.adm:adm',
    channels=192,
    channel_mult=(1, 2, 3, 4),
    num_blocks=num_blocks,
    attention_resolutions=(32, 16, 8),
    film=film,
    dropout=0.0,
    dropout_resolution=1024,
    **_UNET,
  )


def adm_lsun() -> dict:
  """ADM for LSUN 256x256: 526.3 M parameters; openai/consistency_models `launch.sh`."""
  channel_mult = (1, 1, 2, 2, 4, 4)
  return adm(film=False, num_blocks=2) | dict(channels=256, channel_mult=channel_mult)


# Channels of EDM2 by size: 280.2 M, 497.8 M, 777.5 M and 1,119.3 M parameters.
EDM2 = {'s': 192, 'm': 256, 'l': 320, 'xl': 384}


def edm2(channels: int, dropout: float) -> dict:
  """EDM2 for 64x64 images, of `EDM2` channels."""
  return dict(
    fn='cmjax.networks.edm2:edm2',
    channels=channels,
    channel_mult=(1, 2, 3, 4),
    num_blocks=3,
    attention_resolutions=(16, 8),
    dropout=dropout,
    dropout_resolution=16,
    **_UNET,
  )


def augmentation(p: float) -> dict:
  """EDM's, for a network with `augment=9`; p: 0.12 CIFAR-10, 0.15 FFHQ and AFHQ."""
  return dict(fn='cmjax.augmentation:edm', p=p)


def edm_precond() -> dict:
  """EDM's denoiser."""
  return dict(fn='cmjax.precond:edm', sigma_data=0.5)


def consistency_precond(sigma_min: float) -> dict:
  """A consistency function with its boundary at sigma_min; ECT trains with 0."""
  return dict(fn='cmjax.precond:consistency', sigma_data=0.5, sigma_min=sigma_min)


def trigflow_precond() -> dict:
  """sCM's denoiser and consistency function in one."""
  return dict(fn='cmjax.precond:trigflow', sigma_data=0.5)


def two_time_precond() -> dict:
  """The flow map between two times of MeanFlow."""
  return dict(fn='cmjax.precond:two_time')


def studies(data: str) -> dict:
  """The studies of --mode=study; on toy2d also the error against the exact map."""
  sigmas = dict(sigma_min=0.01, sigma_max=80.0, num_sigmas=12)
  parts: dict[str, dict] = dict(
    tangents=dict(
      fn='cmjax.studies.tangents:tangents',
      num_samples=64,
      num_draws=32,
      subset_size=256,
      **sigmas,
    ),
    normalised_bias=dict(
      fn='cmjax.studies.tangents:normalised_bias',
      num_samples=64,
      num_draws=64,
      **sigmas,
    ),
    gradient_noise=dict(
      fn='cmjax.studies.gradient_noise:gradient_noise', num_bins=8, num_batches=16
    ),
    jvp_precision=dict(fn='cmjax.studies.jvp_precision:jvp_precision', num_samples=32),
    discrete_limit=dict(
      fn='cmjax.studies.discrete_limit:discrete_limit', num_samples=64
    ),
  )
  if data == 'toy2d':
    parts['map_error'] = dict(
      fn='cmjax.studies.map_error:map_error', oracle=ring(), num_samples=1024, **sigmas
    )
  return parts


def likelihood(data: str) -> dict:
  """The study of the log-likelihood, for models that are denoisers."""
  return dict(
    fn='cmjax.studies.likelihood:likelihood',
    num_levels={'toy2d': 0, 'digits': 17}.get(data, 256),
    num_steps=(8, 16, 32),
    num_samples=128,
    num_probes=0 if data == 'toy2d' else 4,
  )


def trigflow_network(data: str) -> dict:
  """Keywords of a network conditioned on an angle (noise scale: cmjax choice)."""
  return {} if data == 'cifar10' else dict(noise_scale=10.0)


def two_time_network(data: str) -> dict:
  """Keywords of a network of two times in [0, 1] (noise scale: cmjax choice)."""
  return trigflow_network(data) | dict(num_times=2)


def lognormal(mean: float, std: float) -> dict:
  """ln t ~ N(mean, std^2)."""
  return dict(fn='cmjax.times:lognormal', mean=mean, std=std)


def karras_uniform() -> dict:
  """Times of an infinitely fine Karras grid."""
  return dict(fn='cmjax.times:karras_uniform', sigma_min=0.002, sigma_max=80.0, rho=7.0)


def karras_pairs(num_scales: dict) -> dict:
  """Neighbours on a Karras grid whose size is the schedule `num_scales`."""
  return dict(
    fn='cmjax.times:karras_pairs',
    num_scales=num_scales,
    sigma_min=0.002,
    sigma_max=80.0,
    rho=7.0,
  )


def relative_gap(q: float, stage_images: int, smooth: bool) -> dict:
  """ECT's relative gap between t and r."""
  return dict(
    fn='cmjax.schedules:relative_gap', q=q, stage_images=stage_images, smooth=smooth
  )


def unit_weights(optimizer: dict) -> dict:
  """An optimiser that keeps EDM2's weights at unit magnitude."""
  return dict(fn='cmjax.optimizers:unit_weights', optimizer=optimizer)


def squared_l2() -> dict:
  """The squared Euclidean distance, summed."""
  return dict(fn='cmjax.distances:squared_l2')


def pseudo_huber(c: float) -> dict:
  """The metric of iCT; with c = 0 the unsquared l2 norm, the metric of ECT."""
  return dict(fn='cmjax.distances:pseudo_huber', c=c)


def l1() -> dict:
  """The l1 distance, summed."""
  return dict(fn='cmjax.distances:l1')


def lpips(resize: int = 224, pooling: str = 'max') -> dict:
  """LPIPS, for a config with `perceptual=lpips_weights()`."""
  return dict(fn='cmjax.networks.lpips:lpips', pooling=pooling, resize=resize)


def lpips_weights() -> dict:
  """Downloaded weights of LPIPS; see cmjax/port/README.md, "Perceptual networks"."""
  return dict(fn='cmjax.port.vision:load_lpips', vgg=REQUIRED, heads=REQUIRED)


def weighting(name: str) -> dict:
  """A weighting of `cmjax.weightings` that takes no keywords."""
  return dict(fn=f'cmjax.weightings:{name}')


def adam(learning_rate: dict, b2: float = 0.999) -> dict:
  """Adam with its usual decays."""
  return dict(fn='optax:adam', learning_rate=learning_rate, b1=0.9, b2=b2, eps=1e-8)


def radam(learning_rate: dict, b2: float = 0.999) -> dict:
  """RAdam with its usual decays; optax adds eps after its bias correction."""
  return dict(fn='optax:radam', learning_rate=learning_rate, b1=0.9, b2=b2, eps=1e-8)


def constant(value: float) -> dict:
  """A constant schedule, of a learning rate or of the decay of an EMA."""
  return dict(fn='cmjax.schedules:constant', value=value)


def cosine(peak: float, warmup_images: int = 0) -> dict:
  """Warm-up, then half a cosine to zero at the end of the run."""
  return dict(fn='cmjax.schedules:cosine', peak=peak, warmup_images=warmup_images)


def inverse_root(peak: float, hold_images: int, rampup_images: int = 0) -> dict:
  """Constant, then falling as one over the square root of the images, as in EDM2."""
  rampup = dict(rampup_images=rampup_images) if rampup_images else {}
  return rampup | dict(
    fn='cmjax.schedules:inverse_root', peak=peak, hold_images=hold_images
  )


def warmup(peak: float, warmup_images: int) -> dict:
  """Linear warm-up, then constant."""
  return dict(fn='cmjax.schedules:warmup', peak=peak, warmup_images=warmup_images)


def half_life(half_life_images: int, rampup_ratio: float = 0.0) -> dict:
  """The decay of an EMA with a half-life in images, as in EDM."""
  return dict(
    fn='cmjax.schedules:half_life',
    half_life_images=half_life_images,
    rampup_ratio=rampup_ratio,
  )


def power_emas(*relative_stds: float) -> dict:
  """EMAs of EDM2; those of 0.05 and 0.1 are named `power_050` and `power_100`."""
  return {
    f'power_{round(1000 * std):03d}': dict(fn='cmjax.schedules:power', relative_std=std)
    for std in relative_stds
  }


def heun(num_steps: int = 18) -> dict:
  """EDM's deterministic sampler: 18 steps, 35 evaluations."""
  return dict(
    fn='cmjax.diffusion_samplers:ode',
    num_steps=num_steps,
    solver='heun',
    sigma_min=0.002,
    sigma_max=80.0,
    rho=7.0,
  )


def one_step() -> dict:
  """One evaluation at sigma_max."""
  return dict(fn='cmjax.samplers:one_step', sigma_max=80.0)


def two_steps(sigma_min: float = 0.0, middle: float = 0.821) -> dict:
  """Two evaluations; iCT and ECT: 0.821 for CIFAR-10, 1.526 for ImageNet-64."""
  return dict(fn='cmjax.samplers:multistep', sigmas=(80.0, middle), sigma_min=sigma_min)


def pixel_metrics() -> dict:
  """Frechet distance on pixels: not an FID."""
  return dict(frechet=dict(fn='cmjax.metrics.pixels:pixel_frechet'))


def fid(quantisation: str) -> dict:
  """FID against all data, by the weights that `path` names in the current folder.

  quantisation: 'edm', or 'truncate' as OpenAI; see cmjax/metrics/README.md.
  """
  network = dict(
    fn='cmjax.port.vision:inception_features',
    path='pt_inception-2015-12-05-6726825d.pth',
    resize='tensorflow1',
  )
  return dict(
    fn='cmjax.metrics.features:distances', network=network, quantisation=quantisation
  )


def digits_metrics() -> dict:
  """`pixel_metrics`, and the agreement of a classifier with the labels."""
  return pixel_metrics() | dict(labels=dict(fn='cmjax.metrics.pixels:label_agreement'))
