"""A trace holds the steps that were asked for, and costs nothing without a flag."""

import glob
import gzip
import json
import re

import jax
import pytest

from cmjax import main, train
from cmjax.core import UserError
from cmjax.runtime import profile
from cmjax.runtime.flags import FlagError, parsed
from cmjax.runtime.profile import Span
from cmjax.runtime.run import prepare
from tests.test_main import SMALL
from tests.test_train import assert_equal_states, small

# Of `ProfileData` in jaxlib.
quietly = pytest.mark.filterwarnings('ignore:builtin type event_stats')


def steps_of(workdir):
  """The steps that the trace of a run names, for Perfetto and for TensorBoard."""
  (path,) = glob.glob(f'{workdir}/tensorboard/plugins/profile/*/perfetto_trace.json.gz')
  with gzip.open(path) as file:
    events = json.load(file)['traceEvents']
  of_perfetto = [int(e['args']['step_num']) for e in events if e.get('name') == 'train']
  (path,) = glob.glob(f'{workdir}/tensorboard/plugins/profile/*/*.xplane.pb')
  of_plugin = [
    dict(event.stats)['step_num']
    for plane in jax.profiler.ProfileData.from_file(path).planes
    for line in plane.lines
    for event in line.events
    if event.name == 'train'
  ]
  assert sorted(of_plugin) == sorted(of_perfetto)
  return sorted(of_perfetto)


@quietly
def test_a_trace_has_its_steps_and_changes_nothing(tmp_path, one_device, capsys):
  seen = []

  def look(run, params, step, log, check):
    seen.append((step, len(glob.glob(f'{tmp_path}/run/tensorboard/plugins/profile/*'))))

  run = prepare(small(every__picture_steps=1), one_device)
  traced = train.train(run, tmp_path / 'run', {'picture': look}, Span(10, 12))
  assert steps_of(tmp_path / 'run') == [10, 11, 12]
  assert dict(seen)[11] == 0  # written after step 12
  assert dict(seen)[12] == 1
  assert f'trace: {tmp_path}/run/tensorboard/plugins/profile' in capsys.readouterr().out
  *_, (_, straight, _) = train.steps(run)
  assert_equal_states(straight, traced)


@quietly
def test_a_trace_that_is_cut_short_is_written(tmp_path, one_device):
  def fall(run, params, step, log, check):
    if step == 4:
      raise RuntimeError

  run = prepare(small(every__picture_steps=1), one_device)
  with pytest.raises(RuntimeError):
    train.train(run, tmp_path, {'picture': fall}, Span(3, 9))
  assert steps_of(tmp_path) == [3, 4]


# The parts of a trace ----------------------------------------------------------------


def numbered(total):
  yield from ((step, None, jax.numpy.ones(())) for step in range(1, total + 1))


@pytest.fixture
def calls(monkeypatch):
  """What is called, in order, instead of the profiler."""
  calls = []
  monkeypatch.setattr(
    jax.profiler, 'start_trace', lambda *a, **k: calls.append('start')
  )
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
  return calls


def run_through(trace, total, calls):
  interrupt = lambda: calls.append('interrupt')  # noqa: E731
  for step, _, metrics in trace.around(numbered(total), 0, interrupt):
    calls.append(step)
    trace.end(step, metrics, interrupt)
  trace.close()


def test_writing_is_not_a_hang_and_not_counted_in_the_speed(tmp_path, calls):
  run_through(profile.Trace(tmp_path, Span(2, 3)), 4, calls)
  started = ['start', 'interrupt', 2, 3]
  assert calls == [1, *started, 'interrupt', 'stop', 'interrupt', 4]


def test_a_trace_of_the_first_and_the_last_step(tmp_path, calls):
  run_through(profile.Trace(tmp_path, Span(1, 2)), 2, calls)
  assert calls == ['start', 'interrupt', 1, 2, 'interrupt', 'stop', 'interrupt']


def test_without_the_flag_the_iterator_is_the_same(tmp_path, calls):
  trace, iterator = profile.Trace(tmp_path, None), numbered(3)
  assert trace.around(iterator, 0, lambda: None) is iterator
  trace.end(1, None, lambda: calls.append('interrupt'))
  trace.close()
  assert calls == []


@pytest.mark.parametrize('name', ['start_trace', 'stop_trace'])
def test_a_trace_that_fails_ends_no_run(name, tmp_path, calls, monkeypatch, capsys):
  def fail(*_, **__):
    raise OSError('No space left on device')

  monkeypatch.setattr(jax.profiler, name, fail)
  run_through(profile.Trace(tmp_path, Span(2, 3)), 4, calls)
  assert calls[-1] == 4
  assert re.fullmatch(
    r'cmjax: --profile: .*\(No space left on device\)\n', capsys.readouterr().err
  )


def test_each_process_of_a_pod_has_a_folder(tmp_path, monkeypatch, calls):
  folders = []
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(
    jax.profiler, 'start_trace', lambda folder, **_: folders.append(folder)
  )
  for index in (0, 1):
    monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
    run_through(profile.Trace(tmp_path, Span(1, 1)), 1, calls)
  assert folders == [tmp_path / 'tensorboard' / f'process_{i}' for i in (0, 1)]


# The flag ----------------------------------------------------------------------------


def test_the_flag_is_two_steps():
  assert parsed(['--profile=100:109']).profile == (100, 109)
  assert parsed(['--profile=7:7']).profile == (7, 7)
  assert parsed([]).profile is None


@pytest.mark.parametrize('text', ['5', '0:2', '9:8', '-1:4', '1:2:3', 'a:b', '1.5:2'])
def test_a_malformed_flag_is_one_line(text):
  with pytest.raises(FlagError, match=r'--profile: must be FIRST:LAST, such as'):
    parsed([f'--profile={text}'])


def test_the_flag_is_of_training():
  with pytest.raises(FlagError, match=r'--profile goes with --mode=train'):
    parsed(['--mode=bench', '--profile=1:2'])


@pytest.mark.parametrize(
  ('span', 'start', 'steps'),
  [((3, 5), 3, '4 to 9'), ((9, 10), 0, '1 to 9'), ((9, 9), 9, 'no step')],
)
def test_steps_that_are_not_trained_are_refused(span, start, steps):
  message = rf'--profile={span[0]}:{span[1]}: this start trains (steps )?{steps}$'
  with pytest.raises(UserError, match=message):
    profile.check(Span(*span), start, 9)
  profile.check(Span(4, 9), 3, 9)
  profile.check(None, 9, 9)


def test_steps_beyond_the_last_are_one_line_before_anything(tmp_path, capsys):
  code = main.main([*SMALL, f'--workdir={tmp_path / "run"}', '--profile=2:4'])
  assert code == 2
  err = capsys.readouterr().err
  assert err == 'cmjax: --profile=2:4: this start trains steps 1 to 3\n'
  assert not (tmp_path / 'run').exists()
