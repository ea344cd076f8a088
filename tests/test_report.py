"""The report of a run: what is on the page, that it is safe, and that it is small."""

import contextlib
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
from PIL import Image
import pytest

from cmjax import core, main, train
from cmjax.modes import train as train_mode
from cmjax.report import embed, metric_rows, one_run, several_runs, svg
from cmjax.report import html as pages
from cmjax.report.contents import read_contents
from cmjax.report.metric_rows import Series
from cmjax.runtime import config, provenance
from cmjax.runtime.config_json import to_json
from cmjax.runtime.config_record import data_of, differences
from cmjax.runtime.lock import lock, trained_by
from cmjax.runtime.run import prepare
from tests.conftest import ROOT

HOSTILE = (
  '<script>alert(1)</script></style>"onload="x\' $\\frac{ \x00\ud800 javascript:'
)
VOID = {'meta', 'link', 'img', 'br'}


class Page(html.parser.HTMLParser):
  """A parsed page; fails on tags that are not closed in order."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.text = [], [], ''
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data

  def all(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]


def check(path):
  """Parses a report; it is closed, small, and neither loads nor runs anything."""
  text = path.read_text(encoding='utf-8')
  assert len(text.encode()) < 3_000_000
  page = Page(text)
  names = {tag for tag, _ in page.tags}
  assert not names & {'script', 'iframe', 'object', 'embed', 'form', 'base', 'audio'}
  for tag, attributes in page.tags:
    assert not [key for key in attributes if key.startswith('on')], tag
    for key in {'src', 'href', 'srcset', 'xlink:href'} & attributes.keys():
      allowed = r'data:image/webp;base64,[A-Za-z0-9+/=]+|data:,|#[\w.-]+|\./[\w%./-]*'
      assert re.fullmatch(allowed, attributes[key]), attributes[key][:80]
  assert 'url(' not in re.sub(r'url\(#[a-z0-9]+\)', '', text)
  assert '@import' not in text
  ids = [a['id'] for _, a in page.tags if 'id' in a]
  assert len(ids) == len(set(ids))
  assert all(image['alt'] for image in page.all('img'))
  return page


def rows(num, **columns):
  steps = range(10, 10 * num + 1, 10)
  loss = {'loss': 2.0, **{f'loss_q{i}': 1.0 * i for i in (1, 2, 3, 4)}}
  for i, step in enumerate(steps):
    noise = 1 + 0.1 * np.sin(i)
    values = {key: value * noise for key, value in loss.items()}
    rate = {'optimizer.learning_rate': 1e-3 / step, 'ema.slow': 0.998}
    speed = {'images_per_s': 900.0 + i % 7, 'skipped_steps': 0}
    yield {'step': step} | values | rate | speed | {k: f(i) for k, f in columns.items()}


def write_rows(folder, num, **columns):
  lines = [json.dumps(row) for row in rows(num, **columns)]
  (folder / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')


def noise_picture(path, size=(100, 40), seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(seed).integers(256, size=(*size[::-1], 3), dtype='u1')
  Image.fromarray(pixels).save(path, compress_level=0)


EVALUATION = {
  'data': 'CIFAR-10 (a JPEG copy)',
  'step': 400,
  'rows': [
    {
      'sampler': 'one_step',
      'evaluations': 1,
      'samples': 100,
      'pixel_frechet': 0.161,
      'deviation': {'pixel_frechet': 0.004},
      'least': {'pixel_frechet': 0.158},
      'seeds': [
        {'seed': 1, 'pixel_frechet': 0.158},
        {'seed': 2, 'pixel_frechet': 0.164},
      ],
    }
  ],
  'conventions': {'frechet': 'pixels, not an FID'},
  'config': {'evaluation': {'labels': 'data'}, 'sample_weights': 'slow'},
}
START = {
  'started': '2026-11-24T10:00:00+00:00',
  'command': "cmjax --config=ect:digits '--config.name=a b'",
  'first_step': 0,
  'versions': {'cmjax': '0.3', 'jax': '0.12'},
  'device_kind': 'cpu',
  'platform': 'cpu',
  'devices': 1,
  'processes': 1,
  'git': {'revision': '0123456789abcdef', 'uncommitted_changes': True},
  'data': 'digits (scikit-learn, 8x8)',
  'examples': 1797,
  'parameters': 1_234_567,
}


@pytest.fixture
def run(tmp_path):
  """A folder like that of a run of 400 steps, without training."""
  return make_run(tmp_path / 'student')


def make_run(folder, **changes):
  folder.mkdir()
  loaded = config.load('ect:digits', init_from='t', total_images=400 * 128, **changes)
  (folder / 'config.json').write_text(to_json(loaded))
  write_rows(folder, 40)
  provenance._append(folder / 'starts.jsonl', START)
  provenance._append(
    folder / 'starts.jsonl', {'ended': '2026-11-24T10:02:31+00:00', 'error': None}
  )
  (folder / '.ended').write_text('400')
  for step in range(50, 401, 50):
    for name in ('one_step', 'two_steps'):
      noise_picture(folder / 'pictures' / f'{name}_{step:08d}.png', seed=step)
  noise_picture(folder / 'pictures' / 'data.png')
  (folder / 'evaluation_00000400.json').write_text(json.dumps(EVALUATION))
  return folder


# The page ----------------------------------------------------------------------------


def test_a_page_shows_the_run_and_is_one_valid_file(run):
  path = one_run.write(run)
  assert path == run / 'report.html'
  page = check(path)
  for words in (
    'finished · 400 of 400 steps',
    "--config=ect:digits '--config.name=a b'",
    '0123456789ab with uncommitted changes',
    '1,234,567',
    '2 min 31 s',
    '2026-11-24 10:00:00 UTC',
    'jax 0.12',
    'Closest to ect:digits, from which 2 values differ:',
    'total_images',
    'CIFAR-10 (a JPEG copy)',
    'frechet: pixels, not an FID',
    '0.161 ± 0.004',
    'loss by quartile of sigma',
    'mean of 3 rows (30 steps)',
    'Constant: ema.slow 0.998.',
  ):
    assert words in page.text, words
  alts = [image['alt'] for image in page.all('img')]
  # The last step and the data; then six of the eight steps of each sampler.
  assert alts[0] == 'data'
  assert alts.count('two_steps, step 400') == 2
  kept = [alt for alt in alts if alt.startswith('one_step')][1:]
  assert kept == [f'one_step, step {step}' for step in (50, 100, 200, 250, 350, 400)]
  assert len(page.all('svg')) == 4


def test_the_same_run_gives_the_same_page(run):
  texts = [one_run.page(read_contents(run)) for _ in range(2)]
  without = [re.sub(r'Written by [^<]*', '', text) for text in texts]
  assert without[0] == without[1]


def test_studies_searches_benchmarks_and_samples_have_their_sections(run):
  study = {'data': 'digits', 'step': 400, 'studies': {}, 'about': {}}
  for name in ('tangents', 'older'):
    study['studies'][name] = [{'sigma': 0.1 * 2**i, 'norm': 1.0 + i} for i in range(5)]
  study['studies']['tangents'][2]['norm'] = None
  columns = {'sigma': 'noise level', 'norm': 'of the tangent'}
  about = dict(title='Tangents by sigma', x='sigma', ys=['norm'], columns=columns)
  study['about']['tangents'] = about
  curve = [{'last_sigma': x, 'pixel_frechet': y} for x, y in ((1.0, 2.0), (0.5, 1.0))]
  found = dict(key='sigmas', best=[80.0, 0.5], curve=curve, pixel_frechet=1.0)
  bench = {'step_s': 0.02, 'images_per_s': 640.0, 'parts': {'optimiser': 0.001}}
  for name, value in (
    ('studies/step_00000400/study.json', study),
    ('searched/best_2.json', {'searched': found}),
    ('bench.json', bench),
  ):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(json.dumps(value))
  noise_picture(run / 'studies/step_00000400/older.png')
  noise_picture(run / 'samples/step_00000400/all.png')
  noise_picture(run / 'edits/inpaint_step_00000400/all.png')
  page = check(one_run.write(run))
  for words in (
    'Tangents by sigma',
    'norm: of the tangent',
    'best_2: pixel_frechet against last_sigma',
    '(80, 0.5)',
    'optimiser',
    'bench.json',
  ):
    assert words in page.text, words
  alts = [image['alt'] for image in page.all('img')]
  assert {'study older', 'Samples step_00000400'} <= set(alts)
  assert 'Edits inpaint_step_00000400' in alts


def test_plots_have_a_limit(run):
  write_rows(run, 40, **{f'mean_{i:02}': float for i in range(20)})
  page = check(one_run.write(run))
  assert 'Not drawn: mean_16, mean_17, mean_18, mean_19.' in page.text
  write_rows(run, 40, **{f'ema.x{i:02}': float for i in range(50)})
  assert len(check(one_run.write(run)).all('svg')) < 40


def test_evaluations_in_training_are_curves_by_step(run):
  with (run / 'metrics.jsonl').open('a') as file:
    for step, value in ((200, 0.5), (400, 0.25)):
      for name in ('one_step', 'fast'):
        row = {f'{name}/pixel_frechet': value, f'{name}/evaluations': 1.0}
        print(json.dumps({'step': step} | row), file=file)
  page = check(one_run.write(run))
  assert 'During training' in page.text
  assert 'plot of pixel_frechet' in {s['aria-label'] for s in page.all('svg')}
  assert 'pixel_frechet, fast' in page.text  # a tile, as no other evaluation has it


@pytest.mark.parametrize(
  ('ended', 'end', 'words'),
  [
    ('400', {'error': None}, 'finished · 400 of 400 steps'),
    ('', {'error': None}, 'saved at step 300, not finished'),
    ('', {'error': 'FloatingPointError: <b>NaN'}, 'failed · at 400 of 400 steps'),
  ],
)
def test_how_the_run_ended_is_shown(run, ended, end, words):
  (run / '.ended').write_text(ended)
  (run / 'checkpoints' / '300').mkdir(parents=True)
  end = {'ended': '2026-11-24T11:00:00+00:00'} | end
  provenance._append(run / 'starts.jsonl', START)
  provenance._append(run / 'starts.jsonl', end)
  page = check(one_run.write(run))
  assert words in page.text
  assert (end['error'] or '') in page.text
  assert 'Starts' in page.text  # there are two


# Files that are missing, damaged or a stranger's -------------------------------------


def test_texts_of_files_never_become_markup(run, monkeypatch):
  evil = json.loads(json.dumps(EVALUATION).replace('pixel_frechet', 'M'))
  evil |= {'data': HOSTILE, 'conventions': {HOSTILE: HOSTILE}}
  evil['rows'][0] |= {'sampler': HOSTILE, HOSTILE: HOSTILE}
  (run / 'evaluation_00000400.json').write_text(json.dumps(evil))
  start = START | {'command': HOSTILE, 'data': HOSTILE, 'device_kind': HOSTILE}
  start |= {'versions': {HOSTILE: HOSTILE}, 'git': {'revision': HOSTILE}}
  start['git']['uncommitted_changes'] = False
  provenance._append(run / 'starts.jsonl', start | {'command': 'cmjax ' + HOSTILE[:25]})
  provenance._append(run / 'starts.jsonl', {'ended': HOSTILE, 'error': HOSTILE})
  whole = json.loads((run / 'config.json').read_text())
  whole['init_from'] = whole['data']['fn'] = HOSTILE
  (run / 'config.json').write_text(json.dumps(whole))
  write_rows(run, 40, **{HOSTILE: float, f'{HOSTILE}/M': float, f'.{HOSTILE}': float})
  study = {'data': HOSTILE, 'step': 1, 'studies': {HOSTILE: [{HOSTILE: 1.0}]}}
  about = dict(title=HOSTILE, x=HOSTILE, ys=[HOSTILE], columns={HOSTILE: HOSTILE})
  study['about'] = {HOSTILE: about}
  (run / 'studies/step_00000400').mkdir(parents=True)
  (run / 'studies/step_00000400/study.json').write_text(json.dumps(study))
  hostile = run.with_name('<img src=x onerror=alert(1)>')
  shutil.copytree(run, hostile)
  page = check(one_run.write(hostile))
  assert 'alert(1)' in page.text
  several = several_runs.write([hostile, run], run.parent / 'several.html')
  assert '<img src=x' in check(several).text


def test_what_is_missing_is_said_in_a_sentence(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 0.5}\n')
  page = check(one_run.write(tmp_path))
  for words in ('no starts.jsonl', 'no config.json', 'No pictures', 'Not evaluated'):
    assert words in page.text


@pytest.mark.parametrize('value', ['{"rows": [', '[]', '{}', '{"rows": 3}', '"x"'])
def test_damaged_files_are_named_and_the_rest_is_drawn(run, value):
  names = ['config.json', 'evaluation_00000399.json', 'searched/best_2.json']
  names += ['studies/step_00000400/study.json', 'bench.json', 'starts.jsonl']
  for name in names:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(value)
  (run / 'pictures/one_step_00000400.png').write_bytes(b'\x89PNG no')
  with (run / 'metrics.jsonl').open('a') as file:
    file.write('{"step": "x"}\n{"loss": 1}\n{"step": 3, "loss": "y"}\nnonsense\n')
  page = check(one_run.write(run))
  assert 'metrics.jsonl: 4 rows cannot be read' in page.text
  assert 'one_step_00000400.png: cannot be read' in page.text
  assert 'evaluation_00000399.json' in page.text
  assert '0.161 ± 0.004' in page.text  # of the other evaluation
  assert len(page.all('svg')) >= 4


def test_files_that_cannot_be_opened_or_have_no_end_are_left_out(run, monkeypatch):
  for name in ('starts.jsonl', 'evaluation_00000400.json', 'pictures/data.png'):
    (run / name).unlink()
    os.mkfifo(run / name)
  os.mkfifo(run / 'pictures/one_step_00000500.png')
  (run / '.lock').write_text('{"host": "h", "process": 1e999}')
  opened = type(run).open

  def refuse(path, *arguments, **keywords):
    if path.name == 'metrics.jsonl':
      raise PermissionError(13, 'Permission denied')
    return opened(path, *arguments, **keywords)

  monkeypatch.setattr(type(run), 'open', refuse)
  page = check(one_run.write(run))
  assert 'metrics.jsonl: cannot be read ([Errno 13] Permission denied)' in page.text
  for words in ('no starts.jsonl', 'Not evaluated', 'one_step, step 400'):
    assert words in page.text


def test_a_row_that_is_completed_while_it_is_read_is_not_damaged(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  path.touch()
  # Iterating over a file that grows returns the end of a row after its beginning.
  lines = [b'{"step": 1, "loss": 1.0}\n', b'{"step": 2, "lo', b'ss": 1.0}\n']
  monkeypatch.setattr(
    type(path), 'open', lambda *_: contextlib.nullcontext(iter(lines))
  )
  metrics = metric_rows.read_metrics(path)
  assert (metrics.num_rows, metrics.num_damaged) == (1, 0)


def test_a_run_that_is_being_written_can_be_read(run):
  with (run / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 410, "loss": 1.')
  contents = read_contents(run)
  assert contents.metrics.num_rows == 40
  assert not contents.damaged
  stop = threading.Event()

  def write():
    step = 410
    with (run / 'metrics.jsonl').open('a') as file:
      file.write('5}\n')
      while not stop.wait(1e-3):
        print(
          json.dumps({'step': (step := step + 1), 'loss': 1.0}), file=file, flush=True
        )

  writer = threading.Thread(target=write)
  with lock(run):
    writer.start()
    page = check(one_run.write(run))
    stop.set()
    writer.join()
  assert f'so far, by process {os.getpid()}' in page.text
  assert 'Left out' not in page.text
  assert trained_by(run) is None


# Size --------------------------------------------------------------------------------


def test_a_page_of_a_long_run_with_large_pictures_is_small(run):
  write_rows(run, 100_000, grad_norm=lambda i: (i * 7919 % 1000) / 10)
  for step in (1, 2, 3, 4, 5, 6):
    for name in ('a', 'b', 'c'):
      noise_picture(run / 'pictures' / f'{name}_{step:08d}.png', (700, 500), step)
  start = time.perf_counter()
  path = one_run.write(run)
  seconds = time.perf_counter() - start
  page = check(path)
  assert path.stat().st_size > 1_000_000  # the room is used
  assert not re.findall(r'\w+\.png: does not fit', page.text)
  assert seconds < 60  # about 3 on an idle core


def test_pictures_share_the_bytes(tmp_path):
  flat, noise = tmp_path / 'flat.png', tmp_path / 'noise.png'
  Image.new('L', (64, 32), 7).save(flat)
  noise_picture(noise, (800, 800))
  small, large = embed.embedded([flat, noise], 400_000)
  assert (small.width, small.height) == (64, 32)
  assert len(small.uri) + len(large.uri) < 400_000
  assert max(large.width, large.height) <= 800
  assert embed.embedded([noise], 300) == ['does not fit in the page']


# Curves ------------------------------------------------------------------------------


def test_thinning_keeps_the_ends_the_extremes_and_the_gaps():
  values = np.sin(np.arange(100_000) / 1e4)
  values[[123, 45_678]] = 99.0, -99.0
  values[70_000:70_010] = np.nan
  thin = metric_rows.thinned(Series(np.arange(100_000.0), values), 300)
  assert len(thin.steps) <= 400
  assert {0, 123, 45_678, 99_999} <= set(thin.steps)
  gap = thin.steps[np.isnan(thin.values)]
  assert len(gap) == 1
  assert 70_000 <= gap[0] < 70_010
  np.testing.assert_array_equal(thin.values, values[thin.steps.astype(int)])
  assert np.all(np.diff(thin.steps) > 0)


def test_the_running_mean_is_that_of_its_window():
  values = np.random.default_rng(0).normal(size=200)
  values[50] = np.nan
  values[100:120] = np.nan
  mean = metric_rows.smoothed(Series(10.0 * np.arange(200), values))
  assert (mean.num_rows, mean.num_steps) == (5, 50.0)  # 2.5 rows to either side
  for i, value in enumerate(mean.series.values):
    inside = values[max(0, i - 2) : i + 3]
    inside = inside[np.isfinite(inside)]
    if len(inside):
      # Sums of five float64 numbers of size one.
      np.testing.assert_allclose(value, inside.mean(), atol=1e-14)
    else:
      assert np.isnan(value)
  spike = np.ones(1_000)
  spike[10] = 1e30  # sums over all rows would lose the ones
  mean = metric_rows.smoothed(Series(np.arange(1_000.0), spike))
  np.testing.assert_array_equal(mean.series.values[20:], 1.0)
  assert metric_rows.smoothed(Series(np.arange(19.0), np.ones(19))) is None


def test_rows_of_metrics_are_read_and_others_counted(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(
    '{"step": 2, "loss": 1.5, "a/b": 2}\n{"step": 1, "loss": null}\n\n[1]\n{"step": 3'
    ', "loss": 1e999}\n{"step": true}\n{"step": 1.5}\n{"step": 4, "x": ' + '9' * 5000
  )
  metrics = metric_rows.read_metrics(path)
  assert (metrics.num_rows, metrics.num_damaged) == (3, 3)
  np.testing.assert_array_equal(metrics.series['loss'].steps, [1, 2, 3])
  np.testing.assert_array_equal(metrics.series['loss'].values, [np.nan, 1.5, np.nan])
  np.testing.assert_array_equal(metrics.series['a/b'].values, [2.0])
  assert metric_rows.read_metrics(tmp_path / 'none').num_rows == 0


def test_skipped_steps_are_marked_where_their_number_rises():
  counts = Series(np.array([10.0, 20, 30, 40]), np.array([1.0, 1, 3, 3]))
  found = metric_rows.skipped_at({'skipped_steps': counts})
  np.testing.assert_array_equal(found, [10, 30])


def test_a_plot_is_plain_svg_with_gaps_and_numbers_on_its_axes():
  x = np.arange(1.0, 101) * 1_000
  y = np.where(x == 50_000, np.nan, np.exp(-x / 2e4))
  text = svg.plot([svg.Line(x, y, svg.COLOURS[0])], 'a', log_y=True, marks=[5_000])
  Page(text)
  assert re.search(r'>0\.01<', text)
  assert re.search(r'>100k<', text)
  line = max(re.findall(r'<path d="([^"]*)"', text), key=len)
  assert line.count('M') == 2  # the gap
  assert 'http' not in text
  assert 'currentColor' in text
  assert text != svg.plot([svg.Line(x, y, svg.COLOURS[0])], 'b', log_y=True)


def test_colours_are_readable_on_light_and_dark():
  def luminance(colour):
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]

  for colour in svg.COLOURS:
    for back in ('#ffffff', '#121519'):
      low, high = sorted([luminance(colour), luminance(back)])
      assert (high + 0.05) / (low + 0.05) >= 3, (colour, back)  # WCAG, for graphics


# What was run ------------------------------------------------------------------------


@pytest.mark.parametrize(
  'name', ['ect:cifar10_1h', 'stable_ct:digits_phased', 'ct:toy2d']
)
def test_the_closest_config_that_ships_is_found(name):
  mine = config.load(name, seed=3)
  found, shipped = config.closest(mine)
  assert found == name
  assert list(differences(shipped, mine)) == ['config.seed']


def test_every_argument_of_a_config_is_known():
  text = (ROOT / 'configs' / 'README.md').read_text()
  for name in config.shipped():
    for data in data_of(name):
      config.load(f'{name}:{data}')
    extra = set(data_of(name)) - {'toy2d', 'digits', 'cifar10'}
    assert [
      d for d in extra if f'`{d}`' not in text and f'`{name}:{d}`' not in text
    ] == []


def test_each_start_and_end_is_a_row(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['/usr/bin/cmjax', '--workdir=my run', "it's"])
  with provenance.recorded(tmp_path, 0, {'parameters': 3}):
    first = provenance.starts(tmp_path)
  assert len(first) == 1
  assert first[0]['command'] == """cmjax '--workdir=my run' 'it'"'"'s'"""
  assert first[0]['versions'].keys() >= {'cmjax', 'python', 'jax', 'optax'}
  assert (first[0]['first_step'], first[0]['parameters']) == (0, 3)
  with (tmp_path / 'starts.jsonl').open('a') as file:
    file.write('{"started": "cut sh')  # by a kill
  with pytest.raises(ValueError, match='boom'), provenance.recorded(tmp_path, 7, {}):
    raise ValueError('boom\nbang')
  rows = provenance.starts(tmp_path)
  assert [row.get('first_step') for row in rows] == [0, None, 7, None]
  assert [row.get('error') for row in rows[1::2]] == [None, 'ValueError: boom bang']


def test_the_revision_is_that_of_the_checkout_alone(tmp_path, monkeypatch):
  assert provenance.revision(tmp_path) is None
  (tmp_path / '.git').mkdir()
  monkeypatch.setenv('GIT_DIR', str(ROOT / '.git'))  # of something else
  assert provenance.revision(tmp_path) is None  # git fails
  monkeypatch.setenv('PATH', str(tmp_path))
  assert provenance.revision(ROOT) is None  # without git


# Files, commands ---------------------------------------------------------------------


def test_our_page_is_replaced_and_another_file_kept(run):
  foreign = run / 'report.html'
  foreign.write_text('<p>mine</p>')
  for _ in range(2):  # the second replaces the first
    assert one_run.write(run) == run / 'report_2.html'
  assert foreign.read_text() == '<p>mine</p>'
  foreign.unlink()
  (run / 'report.html').write_text(pages.page('old', pages.text('old')))
  assert one_run.write(run) == run / 'report.html'
  assert 'What was run' in (run / 'report.html').read_text()
  assert not list(run.glob('*.new')) + list(run.glob('.*.new'))


def test_a_write_that_fails_leaves_the_older_page(run, monkeypatch):
  path = one_run.write(run)
  before = path.read_text()

  def full(self, *arguments, **keywords):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(type(path), 'write_text', full)
  with pytest.raises(OSError, match='No space'):
    one_run.write(run)
  assert path.read_text() == before
  assert not list(run.glob('.*.new'))


def command(capsys, *words):
  code = main.main(['--mode=report', *map(str, words)])
  out, err = capsys.readouterr()
  return code, out, err


def test_commands_write_one_page_or_several_runs_on_one(run, capsys, monkeypatch):
  teacher = make_run(run.with_name('teacher'), seed=5)
  monkeypatch.chdir(run.parent)
  assert command(capsys, 'student') == (0, 'student/report.html\n', '')
  assert command(capsys, '--workdir=student') == (0, 'student/report.html\n', '')
  assert command(capsys, 'student', '--to=one.html') == (0, 'one.html\n', '')
  several = command(capsys, 'student', teacher)
  assert several == (0, 'report.html\n', '')
  assert command(capsys, 'student', teacher)[1] == 'report_2.html\n'  # never over it
  code, out, _ = command(capsys, 'student', teacher, '--to=report.html')
  assert (code, out) == (0, 'report.html\n')  # which is ours
  page = check(run.parent / 'report.html')
  assert [a['href'] for a in page.all('a') if a['href'][0] != '#'] == [
    './student/report.html'  # the other has none yet
  ]
  assert '2 runs: student, teacher' in page.text
  assert 'seed05' in page.text  # a key, and its two values
  cells = page.text.partition('How good they are')[2]
  assert cells.count('0.161 ± 0.004') == 2
  alts = {image['alt'] for image in page.all('img')}
  assert {'one_step, student, step 400', 'one_step, teacher, step 400'} <= alts
  (run.parent / 'x.html').write_text('mine')
  code, out, _ = command(capsys, 'student', '--to=x.html')
  assert (code, out.splitlines()[-1]) == (0, 'x_2.html')
  assert 'x.html is not a report of cmjax' in out


@pytest.mark.parametrize(
  ('words', 'line'),
  [
    ([], r'give --workdir=RUN, or --mode=report RUN RUN'),
    (['none'], r'none: does not exist'),
    (['file'], r'file: is a file'),
    (['empty'], r'empty: holds no run, .*--workdir of a training command'),
    (['fresh'], r'fresh: the run has not logged yet'),
    (['student', 'fresh'], r'fresh: the run has not logged yet'),
    (['student', '--to=x.txt'], r'--to=x\.txt: .*\.html'),
    (['student', '--too=x.html'], r'--too, did you mean --to'),
  ],
)
def test_mistakes_are_one_line_and_lose_nothing(run, capsys, monkeypatch, words, line):
  monkeypatch.chdir(run.parent)
  (run.parent / 'file').write_text('x')
  (run.parent / 'empty').mkdir()
  (run.parent / 'fresh').mkdir()
  shutil.copy(run / 'config.json', run.parent / 'fresh')
  before = sorted(run.parent.rglob('*'))
  code, out, err = command(capsys, *words)
  assert (code, out) == (2, '')
  assert len(err.splitlines()) == 1
  assert re.search(line, err), err
  assert sorted(run.parent.rglob('*')) == before


def test_a_page_that_cannot_be_written_is_one_line(run, capsys, monkeypatch):
  def full(self, *arguments, **keywords):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(type(run), 'write_text', full)
  code, out, err = command(capsys, run)
  assert (code, out) == (2, '')
  line = 'report.html: cannot be written (Permission denied); give --to=FILE.html\n'
  assert err.endswith(line)
  assert err.count('\n') == 1


def test_a_report_needs_no_device(run):
  environment = os.environ | {'JAX_PLATFORMS': 'none_such', 'PYTHONPATH': str(ROOT)}
  words = [sys.executable, '-m', 'cmjax', '--mode=report', str(run)]
  done = subprocess.run(words, env=environment, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '')


# After training ----------------------------------------------------------------------

TINY = [
  '--config=ct:digits',
  '--config.network.width=16',
  '--config.network.num_blocks=1',
  '--config.network.embedding=8',
  '--config.batch_size=8',
  '--config.total_images=32',
  '--config.evaluation.num_pictured=16',
  '--config.every.log_steps=1',
  '--config.every.picture_steps=4',
  '--config.every.checkpoint_steps=4',
]


def test_training_leaves_a_report_also_if_it_resumes_or_the_page_fails(
  tmp_path, capsys, monkeypatch, one_device
):
  def prepared(loaded, **keywords):
    return prepare(loaded, one_device)  # which compiles and saves faster

  monkeypatch.setattr(train_mode, 'prepare', prepared)
  words = [*TINY, f'--workdir={tmp_path}']
  assert main.main(words) == 0
  assert f'report: {tmp_path}/report.html' in capsys.readouterr().out
  page = check(tmp_path / 'report.html')
  assert 'finished · 4 of 4 steps' in page.text
  assert 'Closest to ct:digits' in page.text
  assert len([i for i in page.all('img') if i['alt'] == 'data']) == 1
  assert (tmp_path / 'pictures' / 'data.png').is_file()

  def broken(*arguments):
    raise RuntimeError('no paper')

  monkeypatch.setattr(one_run, 'page', broken)
  assert main.main(words) == 0
  assert 'no report: no paper (RuntimeError)' in capsys.readouterr().out
  assert 'finished' in (tmp_path / 'report.html').read_text()  # the older page
  starts = [r for r in provenance.starts(tmp_path) if 'started' in r]
  assert [row['first_step'] for row in starts] == [0, 4]


def test_a_run_that_diverges_leaves_a_report_with_the_error(
  tmp_path, capsys, monkeypatch, one_device
):
  def prepared(loaded, **keywords):
    run = prepare(loaded, one_device)

    def loss(nets, batch, step, keys):
      out = run.loss(nets, batch, step, keys)
      return core.LossOut(out.loss * np.nan, out.aux)

    return run._replace(loss=loss)

  monkeypatch.setattr(train_mode, 'prepare', prepared)
  words = [*TINY, f'--workdir={tmp_path}', '--config.max_skipped_steps=2']
  assert main.main([*words, '--config.every.picture_steps=0']) == 2
  error = capsys.readouterr().err
  assert '3 steps were skipped' in error
  page = check(tmp_path / 'report.html')
  assert 'failed · at 3 of 4 steps' in page.text
  assert 'FloatingPointError: config.max_skipped_steps: 3 steps were' in page.text
  assert 'Nothing is logged' not in page.text


def test_a_refused_command_writes_no_report(run, capsys):
  before = sorted(run.rglob('*'))
  assert main.main([*TINY, f'--workdir={run}']) == 2
  assert 'holds a run with another config' in capsys.readouterr().err
  assert sorted(run.rglob('*')) == before


def test_an_error_before_the_run_begins_leaves_no_folder(tmp_path, monkeypatch):
  def fails(*arguments):
    raise RuntimeError('mine')

  monkeypatch.setattr(train, 'check_memory', fails)
  assert main.main([*TINY, f'--workdir={tmp_path / "new"}']) == 1
  assert list(tmp_path.iterdir()) == []
