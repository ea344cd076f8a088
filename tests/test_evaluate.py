"""Samples by index, and metrics of the data itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import (
  core,
  data_features,
  diffusion_samplers,
  evaluation,
  oracles,
  pictures,
  samplers,
  sampling,
)
from cmjax.data.digits import digits
from cmjax.data.points import points
from cmjax.data.source import as_x0
from cmjax.metrics.metric import Metric
from cmjax.metrics.pixels import label_agreement, pixel_frechet
from cmjax.runtime import feature_store, sharding
from cmjax.runtime.config import read
from cmjax.runtime.reopen import Opened
from tests.conftest import ROOT


def opened(source, f, mesh, batch_size=64, **named):
  config = read(ROOT / 'configs' / 'edm.py:digits')
  config.evaluation.batch_size = batch_size
  config.evaluation.num_samples = 50
  return Opened(config, mesh, source, f, named, None, 0)


def labelled(params, x, t, cond, *, key=None):
  """A model that paints the label into the first pixel, over the noise."""
  number = jnp.argmax(cond, axis=1).astype(x.dtype) / 100
  return (x / core.expand(t, x)).at[:, 0, 0, 0].set(number)


def test_a_sample_depends_on_its_index_and_the_seed_alone(one_device):
  source = digits()
  sampler = samplers.one_step()

  def draw(mesh, batch_size, num_samples, seed=3):
    subject = opened(source, labelled, mesh, batch_size)
    return sampling.draw(subject, None, sampler, num_samples=num_samples, seed=seed)

  # Labels of the data in order begin with 0, 1, ..., 9, as their positions do.
  source = source._replace(labels=source.labels[::-1].copy())
  first = draw(one_device, 64, 40)
  for other in (draw(one_device, 7, 40), draw(sharding.data_mesh(), 16, 40)):
    np.testing.assert_allclose(other.x, first.x, atol=1e-6)  # fused differently
  np.testing.assert_allclose(draw(one_device, 64, 10).x, first.x[:10], atol=1e-6)
  assert not np.allclose(draw(one_device, 64, 40, seed=4).x, first.x)
  np.testing.assert_array_equal(first.labels, source.labels[:40])
  # The network is given the label that is reported.
  painted = np.rint(100 * first.x[:, 0, 0, 0]).astype(int)
  np.testing.assert_array_equal(painted, first.labels)


def test_drawing_again_does_not_trace_again(one_device):
  traces = []

  def counted(params, x, t, cond, *, key=None):
    traces.append(len(x))
    return labelled(params, x, t, cond)

  subject, sampler = opened(digits(), counted, one_device), samplers.one_step()
  for seed in range(3):
    sampling.draw(subject, None, sampler, num_samples=8, seed=seed)
  assert len(traces) == 2  # once to compile the sampler, once to count evaluations


def test_noise_of_a_sample_is_the_same_to_the_bit_however_it_is_drawn(one_device):
  source = points(oracle=oracles.ring(), num_samples=8)  # unbounded, not clipped

  def noise(params, x, t, cond, *, key=None):
    return x

  drawn = [
    sampling.draw(
      opened(source, noise, mesh, batch_size),
      None,
      samplers.one_step(),
      num_samples=50,
      seed=3,
    ).x
    for mesh in (one_device, sharding.data_mesh())
    for batch_size in (16, 64)
  ]
  for other in drawn[1:]:
    np.testing.assert_array_equal(other, drawn[0])


def test_samples_are_clipped_to_the_range_of_the_data(one_device):
  source = digits()

  def wild(params, x, t, cond, *, key=None):
    return jnp.sign(x) * 100

  subject = opened(source, wild, one_device)
  drawn = sampling.draw(subject, None, samplers.one_step(), num_samples=8, seed=0)
  low, high = as_x0(source, np.array([0.0, 16.0]))
  np.testing.assert_allclose([drawn.x.min(), drawn.x.max()], [low, high], rtol=1e-6)


def test_the_table_counts_evaluations_of_every_sampler(one_device):
  source = digits()
  metrics = {'frechet': pixel_frechet()}
  few = samplers.multistep(sigmas=(80.0, 1.0))
  named = {'few': few, 'many': diffusion_samplers.ode()}
  rows = evaluation.table(opened(source, labelled, one_device, **named), None, metrics)
  assert [(row['sampler'], row['evaluations']) for row in rows] == [
    ('few', 2),
    ('many', 35),
  ]
  assert all(row['samples'] == 50 and row['pixel_frechet'] > 1 for row in rows)


def real(source):
  return as_x0(source, source.examples)


def value_of(metric, source, x, labels=None):
  """The only value of a metric for given samples, in two batches."""
  halves = np.array_split(np.arange(len(x)), 2)
  batches = [
    jax.tree.map(
      np.asarray,
      metric.features(
        metric.params, jnp.asarray(x[half]), None if labels is None else labels[half]
      ),
    )
    for half in halves
  ]
  data = data_features.DataFeatures(source, metric)
  (value,) = metric.values(batches, data).values()
  return value


def test_real_digits_are_close_to_themselves_and_noise_is_not():
  source = digits()
  x = real(source)
  metric = pixel_frechet()
  assert abs(value_of(metric, source, x)) < 1e-6
  # One half against all: all lies between two halves, which are 0.13 apart.
  order = np.random.default_rng(0).permutation(len(x))
  assert 0.01 < value_of(metric, source, x[order[::2]]) < 0.113
  shifted = value_of(metric, source, x + 0.1)
  np.testing.assert_allclose(shifted, 64 * 0.1**2, rtol=1e-3)  # |mean shift|^2


def test_pixel_frechet_does_not_depend_on_how_data_is_scaled():
  source = digits()
  other = source._replace(scale=source.scale / 2)
  x = real(source)[:900]
  values = [
    value_of(pixel_frechet(), source, x),
    value_of(pixel_frechet(), other, x / 2),
  ]
  np.testing.assert_allclose(*values, rtol=1e-4)


def test_label_agreement_is_high_on_real_digits_and_a_tenth_on_shuffled_labels():
  source = digits()
  x = real(source)
  metric = label_agreement(real=x, labels=source.labels)
  assert value_of(metric, source, x, source.labels) > 0.98
  shuffled = np.random.default_rng(0).permutation(source.labels)
  agreement = value_of(metric, source, x, shuffled)
  assert abs(agreement - 0.1) < 0.03  # 4 standard deviations of 1,797 coins
  broken = np.where(np.arange(len(x))[:, None, None, None] < 900, np.nan, x)
  assert value_of(metric, source, broken, source.labels) < 0.51
  two = source.labels < 2  # scikit-learn then has one row of coefficients, not two
  metric = label_agreement(real=x[two], labels=source.labels[two])
  assert value_of(metric, source, x[two], source.labels[two]) > 0.98
  assert value_of(metric, source, x[two], 1 - source.labels[two]) < 0.02
  with pytest.raises(ValueError, match='needs labels'):
    label_agreement(real=x, labels=None)


def measured(subject, metrics, folder=None, check=lambda: None, seed=1, num_samples=50):
  return evaluation.measure(
    subject,
    None,
    next(iter(subject.samplers.values())),
    metrics,
    data_features.data_features(subject, metrics),
    seed=seed,
    num_samples=num_samples,
    folder=folder,
    check=check,
  )


def test_metrics_depend_on_neither_the_batch_size_nor_the_devices(one_device):
  source = digits()
  metrics = {'frechet': pixel_frechet()}
  values = []
  for mesh, batch_size in (
    (one_device, 16),
    (one_device, 64),
    (sharding.data_mesh(), 16),
  ):
    named = {'few': samplers.multistep(sigmas=(80.0, 1.0))}
    subject = opened(source, labelled, mesh, batch_size, **named)
    values.append(measured(subject, metrics).values['pixel_frechet'])
  np.testing.assert_allclose(values, values[0], rtol=1e-6)


def test_a_measurement_that_is_interrupted_repeats_no_finished_batch(
  one_device, tmp_path
):
  source, batches = digits(), []
  named = {'one': samplers.one_step()}
  subject = opened(source, labelled, one_device, batch_size=8, **named)
  metrics = {'frechet': pixel_frechet()}

  def count(limit):
    def check():
      if len(batches) == limit:
        raise KeyboardInterrupt
      batches.append(1)

    return check

  folder = tmp_path / 'features'
  with pytest.raises(KeyboardInterrupt):
    measured(subject, metrics, folder, count(4))
  assert len(list(folder.iterdir())) == 4
  # As power loss leaves a file whose name was written before its contents.
  (folder / '000001.npz').write_bytes((folder / '000001.npz').read_bytes()[:99])
  result = measured(subject, metrics, folder, count(100))
  assert len(batches) == 4 + 7 - 3  # 50 samples are 7 batches, 3 of them whole
  assert result == measured(subject, metrics)


def test_an_evaluation_keeps_no_more_samples_in_memory_than_a_batch(
  one_device, tmp_path
):
  source, alive = digits(), []

  def values(samples, data):
    for batch in samples:
      alive.append(len(batch['x']))
    return {'count': float(sum(alive))}

  metric = Metric((), lambda params, x, labels: {'x': x}, values, needs_data=False)
  subject = opened(source, labelled, one_device, 16, one=samplers.one_step())
  assert measured(subject, {'count': metric}).values == {'count': 50.0}
  assert alive == [16, 16, 16, 2]


def test_an_evaluation_is_known_by_all_that_its_samples_depend_on(one_device):
  source = digits()
  named = {'one': samplers.one_step(), 'another': samplers.one_step()}
  subject = opened(source, labelled, one_device, **named)

  def identity(
    params=(1.0, 1.0, 1.0),
    name='one',
    num_samples=50,
    seed=1,
    subject=subject,
    factor=1.0,
  ):
    metric = Metric((), lambda params, x, labels: {'x': factor * x}, lambda *_: {})
    tree = {'w': jnp.asarray(params)}
    return evaluation.measurement_id(
      subject, tree, name, {'mine': metric}, num_samples, seed
    )

  other = subject.config.copy_and_resolve_references()
  other.precond.sigma_data = 0.6
  balanced = subject.config.copy_and_resolve_references()
  balanced.evaluation.labels = 'balanced'
  # The batches of eight devices have other samples, as 50 is no multiple of 8.
  devices = subject._replace(mesh=sharding.data_mesh())
  edited = samplers.one_step(sigma_max=70.0)  # the same config, another function
  changed = [
    identity(params=(1.0, 1.0, 1.0 + 1e-6)),
    identity(name='another'),
    identity(num_samples=51),
    identity(seed=2),
    identity(subject=subject._replace(config=other)),
    identity(subject=subject._replace(config=balanced)),
    identity(subject=devices),
    identity(subject=subject._replace(samplers=named | {'one': edited})),
    identity(factor=2.0),
  ]
  assert len({identity(), *changed}) == 10
  assert identity() == identity()
  more = subject.config.copy_and_resolve_references()
  more.evaluation.num_seeds += 1
  assert identity() == identity(subject=subject._replace(config=more))


def test_features_of_data_are_computed_once_for_a_network(one_device, monkeypatch):
  source = digits()
  calls = []

  def features(params, x, labels):
    jax.debug.callback(lambda: calls.append(1))
    return {'sum': params + jnp.sum(x, axis=(1, 2, 3))}

  def values(samples, data):
    return {'mean': float(np.mean(np.concatenate([b['sum'] for b in data])))}

  metric = Metric(jnp.float32(1.0), features, values)
  subject = opened(source, labelled, one_device, one=samplers.one_step())
  subject.config.metrics.net = dict(fn='some.where:net')
  expected = 1 + real(source).sum(axis=(1, 2, 3)).mean()
  for _ in range(2):
    data = data_features.data_features(subject, {'net': metric})
    np.testing.assert_allclose(metric.values((), data['net'])['mean'], expected, 1e-5)
    jax.effects_barrier()
    assert len(calls) == 4  # batches of 1,797 examples; nothing the second time
  data_features.data_features(
    subject, {'net': metric._replace(params=jnp.float32(2.0))}
  )
  jax.effects_barrier()
  assert len(calls) == 8
  edited = metric._replace(features=lambda *given: {'sum': 2 * features(*given)['sum']})
  data = data_features.data_features(subject, {'net': edited})
  np.testing.assert_allclose(edited.values((), data['net'])['mean'], 2 * expected, 1e-5)


def test_a_batch_that_another_command_has_deleted_is_an_error(one_device, tmp_path):
  subject = opened(
    digits(), labelled, one_device, batch_size=8, one=samplers.one_step()
  )
  drawn = []

  def check():
    drawn.append(1)
    if len(drawn) == 4:
      feature_store.FeatureStore(tmp_path / 'features').remove()

  with pytest.raises(core.UserError, match='batches were deleted'):
    measured(subject, {'frechet': pixel_frechet()}, tmp_path / 'features', check)


def test_a_metric_that_returns_another_type_is_refused_with_its_name(one_device):
  subject = opened(digits(), labelled, one_device, one=samplers.one_step())
  for values in ({'text': 'b'}, {'vector': np.zeros(2)}, {'none': None}):
    with pytest.raises(core.UserError, match=r'metrics\.mine: must return numbers by'):
      measured(subject, {'mine': returning(**values)})


def mean_of_a_batch() -> Metric:
  def features(params, x, labels):
    return {'mean': jnp.mean(x, axis=0, keepdims=True)}

  return Metric((), features, lambda *_: {}, needs_data=False)


def features_without_names() -> Metric:
  return Metric((), lambda params, x, labels: x, lambda *_: {}, needs_data=False)


@pytest.mark.parametrize('metric', [mean_of_a_batch, features_without_names])
def test_features_without_a_row_per_example_are_refused(one_device, metric):
  subject = opened(digits(), labelled, one_device)
  subject.config.metrics = dict(mine=dict(fn=f'tests.test_evaluate:{metric.__name__}'))
  with pytest.raises(core.UserError, match=r'config\.metrics\.mine: features must be'):
    evaluation.build_metrics(subject)


def test_seeds_are_reported_one_by_one_with_their_mean_and_least_value(one_device):
  subject = opened(digits(), labelled, one_device, one=samplers.one_step())
  metrics = {'frechet': pixel_frechet()}
  (row,) = evaluation.table(subject, None, metrics, num_seeds=3)
  each = [measured(subject, metrics, seed=seed).values for seed in (1, 2, 3)]
  values = [v['pixel_frechet'] for v in each]
  assert row['seeds'] == [{'seed': s} | v for s, v in zip((1, 2, 3), each)]
  (last,) = evaluation.table(subject, None, metrics, seed=3)
  assert last['pixel_frechet'] == values[2]
  assert row['pixel_frechet'] == pytest.approx(np.mean(values))
  assert row['deviation']['pixel_frechet'] == pytest.approx(np.std(values, ddof=1))
  assert row['least']['pixel_frechet'] == min(values)
  text = evaluation.markdown([row], each_seed=True)
  assert f'{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}' in text
  assert f'| one | least | {min(values):.3f} |' in text


def test_a_table_without_seeds_is_refused(one_device):
  subject = opened(digits(), labelled, one_device, one=samplers.one_step())
  with pytest.raises(ValueError, match='num_seeds'):
    evaluation.table(subject, None, {}, num_seeds=0)


def test_a_table_is_of_the_given_samplers_and_of_the_metrics_of_the_config(one_device):
  subject = opened(digits(), labelled, one_device, one=samplers.one_step())
  subject.config.metrics = dict(mine=dict(fn='tests.test_evaluate:mean_first_pixel'))
  few = samplers.multistep(sigmas=(80.0, 1.0))
  first, second = evaluation.table(subject, None, samplers={'few': few, 'same': few})
  assert (first['sampler'], first['evaluations'], second['sampler']) == (
    'few',
    2,
    'same',
  )
  # The model paints label / 100 there; the first 50 labels of the digits.
  expected = np.mean(subject.source.labels[:50]) / 100
  assert first['mean_first_pixel'] == pytest.approx(expected, rel=1e-5)
  assert second['mean_first_pixel'] == first['mean_first_pixel']


def test_columns_of_another_name_stay_in_the_table_and_seeds_are_on_request(one_device):
  subject = opened(digits(), labelled, one_device, one=samplers.one_step())
  metrics = {'mine': returning(whole=2)}
  rows = evaluation.table(subject, None, metrics, num_seeds=2)
  text = evaluation.markdown([{'model': 'a'} | row for row in rows])
  assert text.splitlines()[0].startswith('| model | sampler | evaluations |')
  assert 'least' not in text
  assert 'least' in evaluation.markdown(rows, each_seed=True)


def mean_first_pixel() -> Metric:
  def values(samples, data):
    first = np.concatenate([batch['first'] for batch in samples])
    return {'mean_first_pixel': float(np.mean(first))}

  def features(params, x, labels):
    return {'first': x[:, 0, 0, 0]}

  return Metric((), features, values, needs_data=False)


def returning(**numbers):
  """A metric that returns these numbers."""
  return Metric((), lambda params, x, labels: {}, lambda *_: numbers, needs_data=False)


def test_a_value_that_is_not_finite_is_reported_with_several_seeds(one_device):
  subject = opened(digits(), labelled, one_device, one=samplers.one_step())
  metrics = {'broken': returning(nan=np.nan, infinite=np.inf, whole=2)}
  (row,) = evaluation.table(subject, None, metrics, num_seeds=2)
  assert np.isnan([row['nan'], row['deviation']['nan'], row['least']['nan']]).all()
  assert row['infinite'] == np.inf
  assert (row['whole'], row['deviation']['whole']) == (2, 0)
  assert 'nan ± nan' in evaluation.markdown([row])


def test_small_values_such_as_a_kernel_distance_keep_their_digits(one_device):
  subject = opened(digits(), labelled, one_device, one=samplers.one_step())
  metrics = {'kernel': returning(kid=5.25e-4, zero=0.0, large=2.5)}
  (row,) = evaluation.table(subject, None, metrics)
  assert '| one | 1 | 50 | 0.000525 | 0.000 | 2.500 |' in evaluation.markdown(
    [row], each_seed=True
  )
  (row,) = evaluation.table(subject, None, metrics, num_seeds=2)
  assert '| 0.000525 ± 0 | 0.000 ± 0.000 | 2.500 ± 0.000 |' in evaluation.markdown(
    [row], each_seed=True
  )


@pytest.mark.parametrize('name', ['seed', 'seeds', 'least', 'samples'])
def test_a_value_may_not_have_the_name_of_a_column(one_device, name):
  subject = opened(digits(), labelled, one_device, one=samplers.one_step())
  metrics = {'mine': returning(**{name: 1.0})}
  with pytest.raises(core.UserError, match=f'no metric may return {name}'):
    evaluation.table(subject, None, metrics, num_seeds=2)


def test_balanced_labels_have_each_class_in_turn(one_device):
  subject = opened(digits(), labelled, one_device, one=samplers.one_step())
  subject.config.evaluation.labels = 'balanced'
  drawn = sampling.draw(subject, None, samplers.one_step(), num_samples=23, seed=0)
  np.testing.assert_array_equal(drawn.labels, np.arange(23) % 10)
  painted = np.rint(100 * drawn.x[:, 0, 0, 0]).astype(int)
  np.testing.assert_array_equal(painted, drawn.labels)


def test_pictures_are_grids_of_images_and_scatters_of_points():
  source = digits()
  image = pictures.samples(source, as_x0(source, source.examples[:40]))
  assert image.dtype == np.uint8
  assert image.shape[2] == 3
  assert image.shape[1] > image.shape[0] > 80  # two rows of twenty
  source = points(oracle=oracles.ring(), num_samples=100)
  assert pictures.samples(source, source.examples).std() > 0


def test_metrics_that_do_not_fit_the_data_are_refused_with_their_name(one_device):
  source = digits(conditional=False)
  with pytest.raises(core.UserError, match=r'config\.metrics\.labels: .*needs labels'):
    evaluation.build_metrics(opened(source, labelled, one_device))


def test_a_batch_smaller_than_the_devices_is_padded(one_device):
  source = digits()
  subject = opened(source, labelled, sharding.data_mesh(), batch_size=3)
  x = sampling.draw(subject, None, samplers.one_step(), num_samples=5, seed=0).x
  assert x.shape == (5, 8, 8, 1)
  assert len(jax.devices()) == 8


def test_too_few_samples_for_a_metric_are_refused_before_any_is_drawn(
  one_device, monkeypatch
):
  subject = opened(digits(), labelled, one_device, one=samplers.one_step())
  subject.config.metrics = dict(frechet=dict(fn='cmjax.metrics.pixels:pixel_frechet'))
  few = pixel_frechet()._replace(min_samples=51)
  monkeypatch.setattr('cmjax.metrics.pixels.Metric', lambda *args: few)
  with pytest.raises(core.UserError, match=r'num_samples: 50, .*frechet needs .* 51'):
    evaluation.build_metrics(subject)
  source = digits()
  small = source._replace(examples=source.examples[:40], labels=source.labels[:40])
  few = few._replace(min_samples=41)
  with pytest.raises(core.UserError, match=r'frechet: needs .* 41 examples .* are 40'):
    evaluation.build_metrics(subject._replace(source=small))


def test_a_damaged_batch_of_features_is_not_finished(tmp_path):
  store = feature_store.FeatureStore(tmp_path)
  for i in range(3):
    store.write(i, {'a/x': np.full(2, i), 'b/x': np.zeros(2)})
  (tmp_path / '000001.npz').write_bytes(b'')
  (tmp_path / '000003.unfinished').write_bytes(b'half')
  assert store.finished() == [0, 2]
  assert [batch['x'].tolist() for batch in store.of('a')] == [[0, 0], [2, 2]]


def test_a_metric_without_features_receives_none_of_another(tmp_path):
  store = feature_store.FeatureStore(tmp_path)
  store.write(0, {'a/x': np.zeros(2)})
  assert list(store.of('b')) == [{}]


def test_two_commands_may_write_the_same_batch(tmp_path, monkeypatch):
  save = np.savez

  def slow(file, **arrays):  # another command writes the batch in the meantime
    monkeypatch.setattr(np, 'savez', save)
    feature_store.FeatureStore(tmp_path).write(0, {'x': np.ones(2)})
    save(file, **arrays)

  monkeypatch.setattr(np, 'savez', slow)
  store = feature_store.FeatureStore(tmp_path)
  store.write(0, {'x': np.ones(2)})
  assert [batch['x'].tolist() for batch in store] == [[1, 1]]
