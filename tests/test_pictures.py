"""Pictures hold the pixels and the points that they were given."""

import sys
import types

import numpy as np
from PIL import Image
import pytest

from cmjax import pictures
from cmjax.data.source import image_source

WHITE = 255
BLUE = (0x1F, 0x77, 0xB4)  # matplotlib's first colour, C0


def noise(*shape):
  """Pixels that are never white, so that padding can be told from them."""
  return np.random.default_rng(0).integers(0, 200, shape, np.uint8)


@pytest.mark.parametrize('channels', [1, 3])
def test_a_grid_shows_every_pixel_in_its_place_and_white_elsewhere(channels):
  images = noise(5, 20, 30, channels)  # 20 high: 48 pixels hold it twice
  picture = pictures.grid(images, columns=3, cell=48)
  height, width = 40 + 2, 60 + 2  # and a white line all round
  assert picture.shape == (2 * height, 3 * width, 3)
  assert picture.dtype == np.uint8
  rest = picture.copy()
  for i, image in enumerate(images):
    top, left = (i // 3) * height + 1, (i % 3) * width + 1
    inside = np.s_[top : top + 40, left : left + 60]
    big = np.kron(image, np.ones((2, 2, 1), np.uint8))
    np.testing.assert_array_equal(picture[inside], np.broadcast_to(big, (40, 60, 3)))
    rest[inside] = WHITE
  assert np.all(rest == WHITE)


@pytest.mark.parametrize(
  ('side', 'factor'), [(8, 6), (32, 1), (24, 2), (25, 1), (48, 1), (64, 1)]
)
def test_small_images_are_enlarged_by_a_whole_factor(side, factor):
  picture = pictures.grid(noise(1, side, side, 3), columns=1, cell=48)
  assert picture.shape == (factor * side + 2, factor * side + 2, 3)


def test_a_scatter_draws_the_samples_where_they_are():
  data = np.array([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
  blob = np.random.default_rng(0).normal(0, 0.05, (300, 2))

  def blue(x, y):
    picture = pictures.scatter(blob + np.array([[x, y]]), data)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    distance = np.abs(picture.astype(int) - BLUE).sum(axis=2)
    rows, columns = np.nonzero(distance < 30)  # near it: dots have soft edges
    assert len(rows) > 50
    return np.median(rows), np.median(columns)

  here, lower, right = blue(-0.5, 0.5), blue(-0.5, -0.5), blue(0.5, 0.5)
  assert lower[0] > here[0] + 50  # image rows run downwards
  assert abs(lower[1] - here[1]) < 10
  assert right[1] > here[1] + 50
  assert abs(right[0] - here[0]) < 10


def test_a_sheet_has_its_panels_one_below_the_other():
  colours = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)
  wide = np.tile(colours[0], (10, 20, 1))
  square = np.tile(colours[1], (20, 20, 1))
  sheet = pictures.sheet({'first': wide, 'second': square})
  assert sheet.dtype == np.uint8
  corners = []
  for colour in colours:
    rows, columns = np.nonzero(np.all(sheet == colour, axis=2))
    corners.append((rows.min(), rows.max(), columns.min(), columns.max()))
  (top, bottom, left, right), (top2, bottom2, left2, right2) = corners
  assert bottom < top2  # with room for a title
  # Pixels stay square: twice as wide as high, and as wide as high; edges are soft.
  assert (right - left) / (bottom - top) == pytest.approx(2, rel=0.02)
  assert (right2 - left2) / (bottom2 - top2) == pytest.approx(1, rel=0.02)


def test_curves_without_a_positive_value_are_drawn_too():
  rows = [{'t': t, 'y': -t} for t in (1.0, 10.0)]
  picture = pictures.curves(rows, 't', ('y',))
  blue = np.all(np.abs(picture.astype(int) - [31, 119, 180]) < 30, axis=-1)
  assert np.sum(np.any(blue[100:], axis=0)) > 300  # a line from left to right


def test_the_picture_of_points_shows_the_data_alone():
  examples = np.array([[-1.0, -1.0], [1.0, 1.0]], np.float32)
  source = image_source('points', examples, None, 0, False)
  grey = np.all(pictures.data(source, 2) == 204, axis=-1)  # '0.8'
  assert grey.any()
  np.testing.assert_array_equal(pictures.data(source, 2), pictures.data(source, 9))


def test_curves_leave_a_gap_at_values_that_a_log_axis_cannot_show():
  rows = [{'t': t, 'y': y} for t, y in ((1.0, 0.1), (10.0, 0.0), (100.0, 0.1))]
  gap = pictures.curves(rows, 't', ('y',))
  kept = pictures.curves([rows[0], rows[2]], 't', ('y',))
  assert gap.shape == kept.shape
  blue = np.all(np.abs(gap.astype(int) - [31, 119, 180]) < 30, axis=-1)
  line = np.all(np.abs(kept.astype(int) - [31, 119, 180]) < 30, axis=-1)
  # Below the legend: two points against a line through the picture.
  assert (
    0 < np.sum(np.any(blue[100:], axis=0)) < 0.2 * np.sum(np.any(line[100:], axis=0))
  )


def test_a_linear_axis_shows_values_that_are_not_positive():
  rows = [{'t': t, 'y': y} for t, y in ((1.0, 1.0), (2.0, -1.0), (3.0, 1.0))]
  straight = [{'t': row['t'], 'y': 1.0} for row in rows]
  heights = []
  for table in (rows, straight):
    plot = pictures.curves(table, 't', ('y',), log_x=False, log_y=False)
    blue = np.all(np.abs(plot.astype(int) - BLUE) < 30, axis=-1)[100:]
    heights.append(np.ptp(np.nonzero(blue)[0]))
  assert heights[0] > 300  # of 480: a line down and up again
  assert heights[1] < 20


# In a notebook -----------------------------------------------------------------------


@pytest.fixture
def displayed(monkeypatch):
  """What a notebook displays, and what it displays in place of it later."""
  images, later = [], []

  class Handle:
    def update(self, image):
      later.append(image)

  def display(image, display_id=False):
    images.append(image)
    return Handle() if display_id else None

  notebook = types.ModuleType('IPython')
  notebook.get_ipython = object
  notebook.display = types.ModuleType('IPython.display')
  notebook.display.display = display
  monkeypatch.setitem(sys.modules, 'IPython', notebook)
  monkeypatch.setitem(sys.modules, 'IPython.display', notebook.display)
  return images, later


def test_a_notebook_displays_images_points_and_pictures(displayed):
  images, _ = displayed
  x = np.linspace(-1, 1, 6 * 8 * 8, dtype=np.float32).reshape(6, 8, 8, 1)
  pictures.show(x, columns=3)
  pixels = np.rint((x + 1) * 127.5).astype(np.uint8)
  np.testing.assert_array_equal(images[0], pictures.grid(pixels, 3))
  pictures.show(pixels, columns=3)
  np.testing.assert_array_equal(images.pop(), images[0])
  pictures.show(np.eye(2), data=np.eye(2))
  np.testing.assert_array_equal(images[1], pictures.scatter(np.eye(2), np.eye(2)))
  picture = noise(4, 5, 3)
  pictures.show(picture)
  np.testing.assert_array_equal(images[2], picture)


def test_a_live_picture_is_replaced(displayed):
  images, later = displayed
  live = pictures.Live()
  for i in range(3):
    live.show(np.full((2, 2, 3), i, np.uint8))
  assert [np.max(image) for image in images + later] == [0, 1, 2]
  assert len(images) == 1


def test_outside_a_notebook_a_viewer_opens_and_a_live_picture_does_nothing(monkeypatch):
  monkeypatch.delitem(sys.modules, 'IPython', raising=False)
  opened = []
  monkeypatch.setattr(Image.Image, 'show', lambda image: opened.append(image))
  pictures.Live().show(np.eye(2))
  assert opened == []
  pictures.show(np.eye(2))
  assert len(opened) == 1


@pytest.mark.parametrize('shape', [(3,), (5, 3), (2, 3, 3), (1, 2, 3, 4, 5)])
def test_other_shapes_are_refused(shape):
  with pytest.raises(ValueError, match='shows images'):
    pictures.show(np.zeros(shape))


def test_a_grid_without_columns_is_refused():
  with pytest.raises(ValueError, match='columns'):
    pictures.show(np.zeros((1, 2, 2, 1)), columns=0)
