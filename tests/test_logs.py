"""What a run writes can be read back, and pictures hold the pixels they were given."""

import json
import math
import re
import time

import numpy as np
from PIL import Image
import pytest

from cmjax.runtime import logs, results


def noise(*shape):
  """Pixels that are never white, so that padding can be told from them."""
  return np.random.default_rng(0).integers(0, 200, shape, np.uint8)


# Pictures --------------------------------------------------------------------------


def test_a_png_holds_the_pixels_and_its_folders_are_made(tmp_path):
  image = noise(5, 7, 3)
  results.write_png(tmp_path / 'a' / 'b' / 'c.png', image)
  with Image.open(tmp_path / 'a' / 'b' / 'c.png') as found:
    np.testing.assert_array_equal(np.asarray(found), image)


# Tables ----------------------------------------------------------------------------


def test_a_table_has_a_head_a_rule_and_a_line_a_row():
  rows = [
    {'sampler': 'heun', 'evaluations': 35, 'distance': 0.12345},
    {'sampler': 'one', 'evaluations': 1, 'distance': math.nan},
  ]
  assert logs.markdown_table(rows) == (
    '| sampler | evaluations | distance |\n'
    '| --- | --- | --- |\n'
    '| heun | 35 | 0.123 |\n'
    '| one | 1 | nan |'
  )


def test_the_parameter_table_names_shapes_and_the_total():
  params = {'dense': {'kernel': np.zeros((30, 41)), 'bias': np.zeros(41)}}
  table = logs.parameter_table(params)
  assert re.search(r'dense/kernel.*\(30, 41\).*1,230', table)
  assert re.search(r'dense/bias.*\(41,\).*41', table)
  assert 'Total: 1,271' in table


# The log of a run ------------------------------------------------------------------


@pytest.fixture
def log(tmp_path):
  log = logs.RunLog(tmp_path, primary=True, start=10**6)
  yield log
  log.close()


def lines(workdir):
  text = (workdir / 'metrics.jsonl').read_text(encoding='utf-8')

  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_every_line_of_the_metrics_is_json_and_written_at_once(log, tmp_path):
  log.scalars(10, {'loss': 0.5, 'norm': math.nan, 'worst': math.inf})
  assert lines(tmp_path) == [{'step': 10, 'loss': 0.5, 'norm': None, 'worst': None}]
  log.scalars(20, {'loss': 0.25})
  assert lines(tmp_path)[1:] == [{'step': 20, 'loss': 0.25}]


def test_a_log_that_is_opened_again_is_appended_to(log, tmp_path):
  log.scalars(1, {'loss': 1.0})
  log.close()
  again = logs.RunLog(tmp_path, primary=True, start=10**6)
  again.scalars(2, {'loss': 2.0})
  again.close()
  assert [(row['step'], row['loss']) for row in lines(tmp_path)] == [(1, 1.0), (2, 2.0)]


def test_rows_of_steps_that_are_made_again_are_dropped_and_a_cut_one_too(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
  log = logs.RunLog(tmp_path, primary=True, start=2)
  log.scalars(3, {'loss': 1.0})
  log.close()
  assert [row['step'] for row in lines(tmp_path)] == [1, 2, 3]
  assert [p.name for p in tmp_path.glob('metrics*')] == ['metrics.jsonl']


ROWS = [b'{"step": 1, "loss": 0.5}', b'{"step": 2, "loss": null}', b'{"step":3}']
DAMAGE = {
  'binary': bytes(range(10)) + bytes(range(11, 256)),
  'not UTF-8': b'{"step": 2, "name": "\xe9"}',
  'the first half': b'{"step": 2, "lo',
  'the second half': b'ss": 2}',
  'a list': b'[]',
  'a number': b'2',
  'a text': b'"step"',
  'null': b'null',
  'no step': b'{"loss": 0.5}',
  'null step': b'{"step": null}',
  'a text for a step': b'{"step": "2"}',
  'true': b'{"step": true}',
  'infinite': b'{"step": 1e999}',
  'deep': b'[' * 100_000,
  'a flipped bit': b'{"step": 2, "loss": 0.5]',
}


@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('place', range(3))
def test_damaged_rows_are_dropped_and_counted_and_no_other(
  damage, place, tmp_path, capsys
):
  path = tmp_path / 'metrics.jsonl'
  rows = [*ROWS[:place], DAMAGE[damage], b' ', DAMAGE[damage], *ROWS[place:]]
  path.write_bytes(b'\n'.join([*rows, b'{"step": 9}', b'']))
  log = logs.RunLog(tmp_path, primary=True, start=3)
  log.scalars(4, {'loss': 1.0})
  log.close()
  new = b'{"step": 4, "loss": 1.0}'
  assert path.read_bytes() == b'\n'.join([*ROWS, new, b''])
  expected = f'{path}: dropped 2 row(s) that cannot be read\n'
  assert capsys.readouterr().out == expected


@pytest.mark.parametrize('last', [b'', b'\n', b'\r\n'])
def test_the_last_row_is_kept_without_its_end_and_dropped_if_it_is_cut(
  last, tmp_path, capsys
):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n{"step": 2}' + last)
  logs.RunLog(tmp_path, primary=True, start=3).close()
  assert [row['step'] for row in lines(tmp_path)] == [1, 2]
  path.write_bytes(b'{"step": 1}\n{"step": 2')
  logs.RunLog(tmp_path, primary=True, start=3).close()
  assert [row['step'] for row in lines(tmp_path)] == [1]
  path.write_bytes(b'')
  logs.RunLog(tmp_path, primary=True, start=3).close()
  assert lines(tmp_path) == []
  assert capsys.readouterr().out == ''  # that is how a kill leaves it


def test_rows_and_pictures_are_handed_on(tmp_path):
  sent = []
  log = logs.RunLog(tmp_path, True, 0, lambda step, values: sent.append((step, values)))
  image = noise(6, 9, 3)
  log.scalars(3, {'loss': 0.5, 'norm': math.inf})
  log.picture(3, 'heun', image)
  log.close()
  assert sent == [(3, {'loss': 0.5, 'norm': math.inf}), (3, {'heun': image})]
  with Image.open(tmp_path / 'pictures' / 'heun_00000003.png') as picture:
    np.testing.assert_array_equal(np.asarray(picture), image)


def test_only_the_first_process_writes(tmp_path):
  sent = []
  log = logs.RunLog(tmp_path, False, 0, lambda step, values: sent.append(step))
  log.scalars(1, {'loss': 1.0})
  log.picture(1, 'heun', noise(2, 2, 3))
  log.close()
  assert (list(tmp_path.iterdir()), sent) == ([], [])


# Progress --------------------------------------------------------------------------


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
  progress = logs.Progress(start=10, total=30)
  for _ in range(10):
    progress.advance()
  progress.report(20, {'loss': 0.123456, 'images_per_s': 12345.678})
  progress.report(30, {'loss': 1e-9})
  progress.close()
  out, err = capsys.readouterr()
  first, second = out.splitlines()
  assert re.fullmatch(
    r'step 20/30 loss=0\.1235 images_per_s=1\.235e\+04 left=\d+s', first
  )
  assert re.fullmatch(r'step 30/30 loss=1e-09 left=0s', second)
  assert err == ''


def test_time_left_is_that_of_the_steps_of_this_start(capsys, monkeypatch):
  clock = iter([100.0, 120.0])
  monkeypatch.setattr(logs.time, 'monotonic', lambda: next(clock))
  progress = logs.Progress(start=90, total=200)
  progress.report(100, {})  # ten steps in 20 s, a hundred to go
  assert 'left=200s' in capsys.readouterr().out


def test_the_time_to_compile_is_not_in_the_time_left(capsys, monkeypatch):
  now = iter([0.0, 100.0, 100.0, 102.0])  # made, compiled, reported, reported again
  monkeypatch.setattr(time, 'monotonic', lambda: next(now))
  progress = logs.Progress(start=0, total=11)
  progress.restart(1)
  progress.report(1, {'loss': 1.0})
  progress.report(3, {'loss': 1.0})
  out = capsys.readouterr().out
  assert out == 'step 1/11 loss=1 left=?\nstep 3/11 loss=1 left=8s\n'


def test_long_work_reports_its_progress(capsys, monkeypatch):
  now = iter(range(0, 1000, 6))
  monkeypatch.setattr(time, 'monotonic', lambda: next(now))
  assert list(logs.counted(list('abcde'), 64, 'samples')) == list('abcde')
  # The clock advances by 6 s per call, so every second call is 10 s after a report.
  assert capsys.readouterr().out.splitlines() == [
    '64/320 samples left=48s',
    '192/320 samples left=16s',
  ]


def test_json_has_null_for_numbers_that_are_not_finite(tmp_path):
  path = tmp_path / 'new' / 'facts.json'
  results.write_json(path, {'a': [1.5, math.nan], 'b': {'c': (math.inf, 'x')}})
  assert json.loads(path.read_text()) == {'a': [1.5, None], 'b': {'c': [None, 'x']}}


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
  monkeypatch.setattr(logs.sys.stderr, 'isatty', lambda: True, raising=False)
  progress = logs.Progress(start=10, total=30)
  progress.advance()
  progress.report(11, {'loss': 0.5})
  progress.close()
  out, err = capsys.readouterr()
  assert out == ''
  assert '11/30' in err
  assert 'loss=0.5' in err


@pytest.mark.parametrize(
  ('value', 'text'),
  [
    (1024.0, '1024'),
    (16384, '16384'),
    (0.0, '0'),
    (80.0, '80'),
    (1023.5, '1.02e+03'),
    (0.123456, '0.123'),
    (float('nan'), 'nan'),
    (float('inf'), 'inf'),
    (1e30, '1e+30'),
  ],
)
def test_whole_numbers_of_a_table_are_in_full(value, text):
  assert logs.number(value) == text
