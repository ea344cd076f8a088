"""Pictures hold the pixels and the points that they were given."""

import numpy as np
import pytest

from cmjax import pictures

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
