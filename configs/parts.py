"""Parts that configs are made of: functions that return dicts."""

from ml_collections import ConfigDict

from cmjax.core import UserError

REQUIRED = '?'  # must be given: --config.KEY=VALUE


# What every objective has a config for: --config=OBJECTIVE:DATA.
DATA = ('toy2d', 'digits', 'cifar10')


def on(data: str, **network) -> ConfigDict:
  """Data, network, samplers and metrics of toy2d, digits or cifar10.

  `network` sets keywords of the network. Weights to sample from are those of an EMA
  called `slow`, which the config gives.
  """
  if data not in DATA:
    raise UserError(f'no data {data!r}; there are {", ".join(DATA)}')
  c = base()
  c.sample_weights = 'slow'
  c.samplers = dict(one_step=one_step(), two_steps=two_steps())
  c.metrics = pixel_metrics()
  c.every.picture_steps = 1_000
  if data == 'toy2d':
    c.batch_size = 256
    c.data = dict(fn='cmjax.data:points', oracle=ring(), samples=50_000, seed=0)
    c.network = toy_network() | network
    c.evaluation.pictured = 2_000
  elif data == 'digits':
    c.batch_size = 128
    c.data = digits()
    c.network = digits_network() | network
    c.metrics = digits_metrics()
    c.evaluation.samples = 1797
  else:
    c.batch_size = 512
    c.data = cifar10(flip=False)
    c.network = ddpmpp(dropout=0.0) | network
    c.every.picture_steps = 5_000
    c.every.checkpoint_steps = 5_000
  c.studies = studies(data)
  return c


def tuned(data: str, **network) -> ConfigDict:
  """`on`, for a student that starts from a diffusion model and, off CIFAR-10, is short.

  RAdam falling to zero over 3,000 steps is a cmjax choice.
  """
  c = on(data, **network)
  c.init_from = REQUIRED
  if data != 'cifar10':
    c.total_images = 3_000 * c.batch_size
    c.optimizer = radam(cosine(7e-4))
    c.ema = dict(slow=constant(0.998))
  return c


def distilled(c: ConfigDict) -> ConfigDict:
  """The config with a --config.teacher, from whose weights its student starts."""
  c.teacher = REQUIRED
  c.init_from = c.get_ref('teacher') + ''  # follows it until it is given itself
  return c


def base() -> ConfigDict:
  """Every key of the top level; a config fills in the parts."""
  return ConfigDict(
    dict(
      seed=0,  # of initial weights, data order and training noise
      batch_size=256,  # over all devices
      accumulate=1,  # parts of a batch, one after another: less memory
      total_images=0,  # length of the run; steps = total_images / batch_size
      grad_clip_norm=0.0,  # global norm; 0 is off
      max_skipped_steps=100,  # steps that are not finite, in one start, before it stops
      init_from='',  # work directory or checkpoint whose weights to start from
      teacher='',  # the same, for objectives that distil a teacher
      sample_weights='online',  # or the name of an EMA
      mesh=dict(fn='cmjax.sharding:mesh', fsdp=False, slices=1),  # fsdp splits state
      data={},
      network={},
      precond={},
      objective={},
      optimizer={},
      target_rate={},  # EMA rate of the target network; empty: stop-gradient of online
      reference={},  # examples kept on the device, to average over
      perceptual={},  # weights of a network that a distance compares features of
      ema={},
      samplers={},
      metrics={},
      studies={},
      evaluation=dict(samples=10_000, batch_size=512, seed=1, pictured=100),
      every=dict(  # 0 is never; pictures, evaluations and checkpoints also at the end
        log_steps=100, picture_steps=0, evaluate_steps=0, checkpoint_steps=1000
      ),
      keep_checkpoints=2,
    )
  )


def digits(conditional: bool = True) -> dict:
  """The 1,797 real digits inside scikit-learn."""
  return dict(fn='cmjax.data:digits', conditional=conditional)


def cifar10(flip: bool) -> dict:
  """CIFAR-10 by TFDS; data_dir is TFDS's own, or the variable CMJAX_DATA_DIR."""
  return dict(
    fn='cmjax.data:tfds',
    name='cifar10',
    split='train',
    data_dir='',
    conditional=False,
    flip=flip,
    quoted_as='CIFAR-10',
  )


def imagenet64() -> dict:
  """ImageNet at 64x64 with its 1,000 labels by TFDS, in memory: 16 GB."""
  return dict(
    fn='cmjax.data:tfds',
    name='imagenet_resized/64x64',
    split='train',
    data_dir='',
    conditional=True,
    flip=False,
    quoted_as='ImageNet 64x64 (resized, TFDS)',
  )


def ring() -> dict:
  """Six equal Gaussians on a circle (cmjax choice)."""
  return dict(fn='cmjax.oracles:ring', modes=6, radius=0.7, std=0.08)


def digits_network() -> dict:
  """A residual MLP of 1.7 M parameters (cmjax choice)."""
  return _mlp(width=384, blocks=4, noise_scale=100.0)


def toy_network() -> dict:
  """A residual MLP of 0.2 M parameters (cmjax choice)."""
  return _mlp(width=128, blocks=3, noise_scale=20.0)


def _mlp(width: int, blocks: int, noise_scale: float) -> dict:
  return dict(
    fn='cmjax.networks.mlp:mlp',
    width=width,
    blocks=blocks,
    embedding=128,
    dropout=0.0,
    noise_scale=noise_scale,
    clocks=1,
    log_weight=False,
    dtype='float32',
  )


def ddpmpp(dropout: float) -> dict:
  """DDPM++ of 55.7 M parameters for 32x32 images; NVlabs/edm `train.py`."""
  return dict(
    fn='cmjax.networks.songunet:songunet',
    channels=128,
    channel_mult=(2, 2, 2),
    blocks=4,
    attention=(16,),
    dropout=dropout,
    noise_scale=1.0,
    clocks=1,
    log_weight=False,
    dtype='float32',  # or bfloat16
    attend='exact',  # or chunked, fused
    remat=False,
  )


def edm2(channels: int, dropout: float) -> dict:
  """EDM2 for 64x64 images: 192 channels are S, 280.2 M parameters; 384 XL, 1,119 M."""
  return dict(
    fn='cmjax.networks.edm2:edm2',
    channels=channels,
    channel_mult=(1, 2, 3, 4),
    blocks=3,
    attention=(16, 8),
    dropout=dropout,
    dropout_resolution=16,
    noise_scale=1.0,
    clocks=1,
    log_weight=False,
    attend='exact',
    remat=False,
    dtype='float32',
  )


def edm_precond() -> dict:
  """EDM's denoiser."""
  return dict(fn='cmjax.precond:edm', sigma_data=0.5)


def consistency_precond(sigma_min: float) -> dict:
  """A consistency function with its boundary at sigma_min; 0 in ECT's training."""
  return dict(fn='cmjax.precond:consistency', sigma_data=0.5, sigma_min=sigma_min)


def trigflow_precond() -> dict:
  """sCM's one form of denoiser and consistency function."""
  return dict(fn='cmjax.precond:trigflow', sigma_data=0.5)


def two_time_precond() -> dict:
  """MeanFlow's map between two times."""
  return dict(fn='cmjax.precond:two_time')


def studies(data: str) -> dict:
  """What --mode=study looks at; the exact map where the data has one."""
  levels = dict(lowest=0.01, highest=80.0, count=12)
  found = dict(
    tangents=dict(
      fn='cmjax.studies:tangents', samples=64, draws=32, subset=256, **levels
    ),
    normalised_bias=dict(
      fn='cmjax.studies:normalised_bias', samples=64, draws=64, **levels
    ),
    gradient_noise=dict(fn='cmjax.studies:gradient_noise', bins=8, batches=16),
    jvp_precision=dict(fn='cmjax.studies:jvp_precision', samples=32),
    discrete_limit=dict(fn='cmjax.studies:discrete_limit', samples=64),
  )
  if data == 'toy2d':
    found['map_error'] = dict(
      fn='cmjax.studies:map_error', oracle=ring(), samples=1024, **levels
    )
  return found


def trigflow_network(data: str) -> dict:
  """Keywords of a network whose clock is an angle (noise scales: cmjax choice)."""
  return {} if data == 'cifar10' else dict(noise_scale=10.0)


def two_time_network(data: str) -> dict:
  """Keywords of a network of two clocks in [0, 1] (noise scales: cmjax choice)."""
  return trigflow_network(data) | dict(clocks=2)


def lognormal(mean: float, std: float) -> dict:
  """The logarithm of t is N(mean, std^2)."""
  return dict(fn='cmjax.times:lognormal', mean=mean, std=std)


def karras_uniform() -> dict:
  """Where the pairs of an endless Karras grid lie."""
  return dict(fn='cmjax.times:karras_uniform', sigma_min=0.002, sigma_max=80.0, rho=7.0)


def karras_pairs(bins: dict) -> dict:
  """Neighbours of a Karras grid of as many points as the schedule `bins` says."""
  return dict(
    fn='cmjax.times:karras_pairs', bins=bins, sigma_min=0.002, sigma_max=80.0, rho=7.0
  )


def shrinking_gap(q: float, stage_images: int, smooth: bool) -> dict:
  """ECT's relative gap between t and r."""
  return dict(
    fn='cmjax.schedules:shrinking_gap', q=q, stage_images=stage_images, smooth=smooth
  )


def unit_weights(optimizer: dict) -> dict:
  """An optimiser that keeps EDM2's weights at unit magnitude."""
  return dict(fn='cmjax.optimizers:unit_weights', optimizer=optimizer)


def squared_l2() -> dict:
  """The squared Euclidean distance, summed."""
  return dict(fn='cmjax.distances:squared_l2')


def pseudo_huber(c: float) -> dict:
  """The metric of iCT; with c = 0, of ECT, the unsquared l2 norm."""
  return dict(fn='cmjax.distances:pseudo_huber', c=c)


def lpips(resize: int = 224) -> dict:
  """LPIPS, for a config that also has `perceptual=lpips_weights()`."""
  return dict(fn='cmjax.networks.perceptual:lpips', pooling='max', resize=resize)


def lpips_weights() -> dict:
  """Weights of LPIPS, the user's to download; README, "Perceptual networks"."""
  return dict(fn='cmjax.port.vision:load_lpips', vgg=REQUIRED, heads=REQUIRED)


def weighting(name: str) -> dict:
  """A weighting of `cmjax.distances` that takes no keywords."""
  return dict(fn=f'cmjax.distances:{name}')


def adam(learning_rate: dict, b2: float = 0.999) -> dict:
  """Adam with its usual rates."""
  return dict(fn='optax:adam', learning_rate=learning_rate, b1=0.9, b2=b2, eps=1e-8)


def radam(learning_rate: dict, b2: float = 0.999) -> dict:
  """RAdam with its usual rates; optax adds eps after its bias correction."""
  return dict(fn='optax:radam', learning_rate=learning_rate, b1=0.9, b2=b2, eps=1e-8)


def constant(value: float) -> dict:
  """The same at every step: a learning rate, or an EMA's share kept."""
  return dict(fn='cmjax.schedules:constant', value=value)


def cosine(peak: float, warmup_images: int = 0) -> dict:
  """Warm-up, then half a cosine to zero at the end of the run."""
  return dict(fn='cmjax.schedules:cosine', peak=peak, warmup_images=warmup_images)


def inverse_root(peak: float, hold_images: int) -> dict:
  """Constant, then falling as one over the root of the images: EDM2's."""
  return dict(fn='cmjax.schedules:inverse_root', peak=peak, hold_images=hold_images)


def warmup(peak: float, warmup_images: int) -> dict:
  """Linear warm-up, then constant."""
  return dict(fn='cmjax.schedules:warmup', peak=peak, warmup_images=warmup_images)


def half_life(half_life_images: int, rampup_ratio: float = 0.0) -> dict:
  """EMA by its half-life, as EDM counts it."""
  return dict(
    fn='cmjax.schedules:half_life',
    half_life_images=half_life_images,
    rampup_ratio=rampup_ratio,
  )


def heun() -> dict:
  """EDM's deterministic sampler: 18 steps, 35 evaluations."""
  return dict(
    fn='cmjax.samplers:ode',
    steps=18,
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
  return dict(fn='cmjax.samplers:multistep', times=(80.0, middle), sigma_min=sigma_min)


def pixel_metrics() -> dict:
  """Frechet distance on pixels: not an FID."""
  return dict(frechet=dict(fn='cmjax.evaluate:pixel_frechet'))


def digits_metrics() -> dict:
  """The above, and agreement of a classifier with the labels asked for."""
  return pixel_metrics() | dict(labels=dict(fn='cmjax.evaluate:label_agreement'))
