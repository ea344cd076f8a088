"""The tables of recipes: rows and options that exist, cells that add up."""

import importlib.util

import pytest

from cmjax.runtime.config import read
from cmjax.runtime.config_record import REQUIRED
from tests.conftest import ROOT


@pytest.fixture(scope='module')
def compare():
  """The script, as a module."""
  spec = importlib.util.spec_from_file_location(
    'compare', ROOT / 'launch' / 'compare.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize('table', ['objectives', 'metrics'])
@pytest.mark.parametrize('data', ['toy2d', 'digits'])
def test_rows_name_configs_and_options_that_exist(table, data, compare):
  rows = compare.rows_of(table, data)
  for row in rows.values():
    config = read(ROOT / 'configs' / f'{row.config}.py:{data}')
    needs = {key for key in ('init_from', 'teacher') if config[key] == REQUIRED}
    assert bool(needs) == bool(row.start)
    assert ('teacher' in needs) == row.distils
    assert not row.start or row.start in compare.STARTS
    for option in (*compare.COMMON[data], *compare.QUIET, *row.options):
      part, keys = config, option.partition('=')[0].split('.')[1:]
      for key in keys:
        assert key in part, option
        part = part[key]


def test_every_objective_is_in_the_table(compare):
  files = {path.stem for path in (ROOT / 'configs').glob('[a-z]*.py')} - {
    'parts',
    'papers',
  }
  assert files == {
    row.config for row in compare.rows_of('objectives', 'toy2d').values()
  }


def test_cells_are_means_and_standard_deviations(compare):
  rows = {
    'a': [{'error': 1.0, 'steps/s': 90.0}, {'error': 3.0, 'steps/s': 110.0}],
    'b': [{'error': 2.0, 'more': 0.5, 'steps/s': 10.0}] * 2,
  }
  assert compare.markdown(rows).splitlines() == [
    '|  | error | more | steps/s |',
    '| --- | --- | --- | --- |',
    '| a | 2.000 ± 1.414 |  | 100 |',
    '| b | 2.000 ± 0.000 | 0.500 ± 0.000 | 10 |',
  ]
