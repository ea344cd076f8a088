"""What a config and its data, devices, teacher and checkpoint must agree on."""

import shutil

import jax
import numpy as np
import pytest

from cmjax import core, main, samplers, train
from cmjax.data.source import clip
from cmjax.port import write
from cmjax.runtime import batches, checkpoint, pretrained
from cmjax.runtime.config_record import ConfigDict
from cmjax.runtime.reopen import beside, reopen, subject_of
from cmjax.runtime.run import prepare
from cmjax.train_step import make_train_step
from tests.test_train import small

PAIRS = dict(
  fn='cmjax.times:karras_pairs',
  num_scales=dict(fn='cmjax.schedules:constant', value=18.0),
)
METRIC = dict(
  distance=dict(fn='cmjax.distances:pseudo_huber', c=0.01),
  weighting=dict(fn='cmjax.weightings:uniform'),
)
OTHER_LABELS = r'classes, and config\.data has'
DISTILL = dict(fn='cmjax.objectives.consistency:cd', pairs=PAIRS, **METRIC)


@pytest.fixture(scope='module')
def taught(tmp_path_factory, one_device):
  """Runs of a few steps, with labels and without."""
  place = tmp_path_factory.mktemp('taught')
  for name, conditional in (('labels', True), ('none', False)):
    run = prepare(small(data__conditional=conditional), one_device)
    train.train(run, place / name, {})
  return place


def distilling(teacher, **changes):
  return small(objective=DISTILL, teacher=str(teacher), **changes)


def test_a_teacher_reaches_the_objective_as_an_argument(taught, one_device):
  run = prepare(distilling(taught / 'labels'), one_device)
  step = jax.jit(
    make_train_step(run.loss, run.tx, run.ema_decays, run.target_decay, seed=0)
  )

  def first_loss(teacher):
    frozen = core.Frozen(teacher=teacher)
    _, metrics = step(train.first_state(run), frozen, batches.batch(run, 0))
    assert metrics['skipped'] == 0
    return float(metrics['loss'])

  other = jax.tree.map(lambda a: a + 0.3, run.frozen.teacher)
  assert first_loss(run.frozen.teacher) == first_loss(run.frozen.teacher)
  assert first_loss(run.frozen.teacher) != first_loss(other)
  weights = reopen(taught / 'labels').params
  jax.tree.map(np.testing.assert_array_equal, weights, run.frozen.teacher)


def test_an_objective_that_distils_asks_for_a_teacher():
  with pytest.raises(core.UserError, match=r'cd needs a teacher; .*--config\.teacher'):
    prepare(small(objective=DISTILL, batch_size=8))


def test_an_objective_without_a_teacher_takes_none(taught, one_device):
  with pytest.raises(core.UserError, match=r'config\.teacher: .*:edm takes no teacher'):
    prepare(small(teacher=str(taught / 'labels')), one_device)


@pytest.mark.parametrize(('theirs', 'ours'), [('labels', False), ('none', True)])
def test_other_labels_than_a_network_was_trained_with_are_refused(
  theirs, ours, taught, one_device
):
  opened = reopen(taught / theirs)  # by its own config it opens
  assert opened.source.classes == (10 if theirs == 'labels' else 0)
  with pytest.raises(core.UserError, match=OTHER_LABELS):
    reopen(taught / theirs, small(data__conditional=ours))
  with pytest.raises(core.UserError, match=OTHER_LABELS):
    prepare(distilling(taught / theirs, data__conditional=ours), one_device)


def test_images_a_network_cannot_halve_are_refused_with_its_name(one_device):
  network = dict(
    fn='cmjax.networks.songunet:songunet', channels=8, channel_mult=(1,) * 5
  )
  config = small()
  with config.unlocked():
    config.network = network
  with pytest.raises(core.UserError, match=r'config\.network: .*multiples of 16'):
    prepare(config, one_device)


def test_results_of_a_named_checkpoint_lie_in_its_run(taught, tmp_path):
  step = max((taught / 'labels' / 'checkpoints').iterdir())
  assert beside(reopen(step)) == taught / 'labels'
  assert beside(reopen(taught / 'labels')) == taught / 'labels'


def test_an_average_may_not_be_called_as_the_live_weights(one_device):
  config = small()
  with config.unlocked():
    config.ema = dict(online=dict(fn='cmjax.schedules:constant', value=0.9))
  with pytest.raises(core.UserError, match=r'config\.ema\.online'):
    prepare(config, one_device)


# Samplers that must fit the model --------------------------------------------------

ONE_STEP = 'cmjax.samplers:one_step'
AUTO = [
  '--config.samplers.auto.fn=cmjax.guidance:autoguidance',
  '--config.samplers.auto.guidance=100',
  f'--config.samplers.auto.sampler.fn={ONE_STEP}',
  f'--config.samplers.one.fn={ONE_STEP}',
]


def test_a_guide_reaches_autoguidance_from_the_command_line(taught, tmp_path, capsys):
  run = shutil.copytree(taught / 'labels', tmp_path / 'run')
  guide, *_, last = sorted((run / 'checkpoints').iterdir(), key=lambda p: int(p.name))
  argv = [f'--workdir={run}', '--mode=sample', '--config.evaluation.num_pictured=24']
  argv += [*AUTO, f'--config.guide={guide}', '--samplers=auto,one']
  assert main.main(argv) == 0, capsys.readouterr().err
  (folder,) = (run / 'samples').iterdir()
  found = {name: np.load(folder / f'{name}.npz') for name in ('auto', 'one')}
  assert {name: int(a['evaluations']) for name, a in found.items()} == dict(
    auto=2, one=1
  )

  good, bad = (pretrained.load(path) for path in (last, guide))
  seed = jax.random.key(good.config.evaluation.seed)
  keys = jax.vmap(lambda i: jax.random.fold_in(seed, i))(np.arange(24))
  x, sigma = 80 * samplers.normal(keys, 0, good.shape), np.full(24, 80, np.float32)
  cond = jax.nn.one_hot(found['one']['labels'], good.classes)
  y, worse = (model.f(model.params, x, sigma, cond) for model in (good, bad))
  source = reopen(run).source
  # Compiled and plain arithmetic round differently; x is of 80, in float32.
  np.testing.assert_allclose(found['one']['images'], clip(source, y), atol=1e-4)
  guided = clip(source, worse + 100 * (y - worse))
  np.testing.assert_allclose(found['auto']['images'], guided, atol=1e-4)
  # Averages of a few steps differ little, hence a guidance of 100.
  assert np.max(np.abs(guided - clip(source, y))) > 0.01


@pytest.mark.parametrize(
  ('flags', 'told'),
  [
    (AUTO, 'config.samplers.auto: autoguidance needs a model with a guide'),
    ([*AUTO, '--config.guide=NOWHERE'], 'config.guide: NOWHERE: no checkpoints'),
    ([*AUTO, '--config.guide=OTHER'], 'classes, and config.data has'),
    (
      ['--config.samplers.heun.sigma_max=200'],
      'config.samplers.heun: evaluates the network at sigma = 200',
    ),
  ],
)
@pytest.mark.parametrize('mode', ['sample', 'evaluate'])
def test_samplers_that_do_not_fit_are_refused_before_any_compute(
  mode, flags, told, taught, capsys
):
  flags = [flag.replace('OTHER', str(taught / 'none')) for flag in flags]
  assert main.main([f'--workdir={taught / "labels"}', f'--mode={mode}', *flags]) == 2
  captured = capsys.readouterr()
  assert captured.err.count('\n') == 1
  assert told in captured.err
  assert 'compiling' not in captured.out


def test_a_run_in_training_has_no_guide_and_no_noise_above_its_range(one_device):
  auto = dict(fn='cmjax.guidance:autoguidance', guidance=2.0, sampler=dict(fn=ONE_STEP))
  with pytest.raises(core.UserError, match=r'config\.samplers\.x: autoguidance needs'):
    prepare(small(samplers=dict(x=auto)), one_device)
  far = dict(fn=ONE_STEP, sigma_max=200.0)
  with pytest.raises(core.UserError, match=r'config\.samplers\.x: .* sigma = 200'):
    prepare(small(samplers=dict(x=far)), one_device)


def test_two_time_models_are_sampled_at_any_noise_level(one_device):
  run = prepare(small('shortcut.py:digits'), one_device)
  assert run.config.samplers.one_step.sigmas == (1000.0,)


# Subjects of studies ---------------------------------------------------------------


@pytest.fixture(scope='module')
def with_target(tmp_path_factory, one_device):
  """A run with a target network, and its last state."""
  half = dict(fn='cmjax.schedules:constant', value=0.5)
  config = small(target_decay=half, total_images=32 * 5, every__checkpoint_steps=2)
  config.keep_checkpoints = 3
  run = prepare(config, one_device)
  workdir = tmp_path_factory.mktemp('target') / 'run'
  return workdir, run, train.train(run, workdir, {})


def test_a_subject_has_the_target_network_of_its_checkpoint(with_target):
  workdir, _, state = with_target
  subject = subject_of(reopen(workdir))
  jax.tree.map(np.testing.assert_array_equal, subject.nets.target, state.target)
  differ = jax.tree.map(
    lambda a, b: bool(np.any(a != b)), subject.nets.target, subject.nets.online
  )
  assert any(jax.tree.leaves(differ))


def test_a_subject_is_of_the_next_step_and_at_the_end_of_the_last(with_target):
  workdir, _, _ = with_target
  steps = {}
  for step in (2, 4, 5):
    opened = reopen(workdir / 'checkpoints' / str(step))
    steps[step] = subject_of(opened).step
  assert steps == {2: 2, 4: 4, 5: 4}  # of 5 steps, 0 to 4


def test_weights_without_data_are_sampled_by_the_name_of_a_sampler(taught, tmp_path):
  model = pretrained.load(taught / 'labels')
  config = {key: model.config[key] for key in ('network', 'precond')}
  config |= dict(objective={}, sample_weights='online')
  meta = model._replace(config=ConfigDict(config)).meta()
  path = tmp_path / 'w.safetensors'
  write.safetensors(path, jax.tree.map(np.asarray, model.params), meta)
  command = [f'--workdir={path}', '--mode=sample', '--samplers=heun,all']
  command += ['--config.samplers.all.fn=cmjax.samplers:one_step']
  # Labels that are given come before `balanced`.
  command += ['--labels=3,7', '--config.evaluation.labels=balanced']
  assert main.main([*command, '--config.evaluation.num_pictured=3']) == 0
  samples = beside(reopen(path, needs_data=False)) / 'samples' / 'step_00000000'
  assert np.load(samples / 'heun.npz')['labels'].tolist() == [3, 7, 3]
  pictures = sorted(path.name for path in samples.glob('*.png'))
  assert pictures == ['all.png', 'all_2.png', 'heun.png']  # all_2: of both samplers


def test_weights_alone_have_no_target_network_to_study(with_target, tmp_path):
  _, run, state = with_target
  meta = run.meta()
  checkpoint.save_weights(tmp_path, 5, state.params, meta)
  config = ConfigDict(run.config.to_dict() | dict(sample_weights=checkpoint.ONLINE))
  opened = reopen(tmp_path, config)
  with pytest.raises(
    core.UserError, match=r"config\.target_decay: .*no weights 'target'"
  ):
    subject_of(opened)
