"""Columns of images and line charts: where things are, and that nothing is lost."""

import numpy as np
import pytest
from PIL import ImageFont

from util.plots.charts import STYLES, Axis, dashed, plot, ticks
from util.plots.grids import draw_columns, wrapped


def test_labels_wrap_between_words():
    font = ImageFont.load_default(size=20)
    lines = wrapped("prediction (true patch mean and std)", font, 224)
    assert " ".join(lines) == "prediction (true patch mean and std)"
    assert len(lines) == 2
    assert all(font.getlength(line) <= 224 for line in lines)


def test_images_stand_in_their_rows_and_columns_as_they_are():
    rng = np.random.default_rng(0)
    columns = {name: rng.integers(0, 256, (2, 112, 112, 3), np.uint8) for name in "ab"}
    picture = draw_columns(columns)
    top = picture.shape[0] - 2 * (224 + 8)
    for i, images in enumerate(columns.values()):
        for row in range(2):
            shown = picture[top + row * 232 : top + row * 232 + 224, 8 + i * 232 : 8 + i * 232 + 224]
            assert np.array_equal(shown[::2, ::2], images[row])
            assert np.array_equal(shown[1::2, 1::2], images[row])


def test_letters_grow_with_the_picture():
    small, large = (
        draw_columns({str(i): np.zeros((1, 224, 224, 3), np.uint8) for i in range(count)}) for count in (2, 20)
    )
    assert small.shape[0] - 224 - 16 == 24  # one line of 1.2 x 20 px
    assert large.shape[0] - 224 - 16 == pytest.approx(1.2 * 20 * 224 / 70, abs=1)


def test_labels_of_rows_make_room_for_themselves():
    images = {"a": np.zeros((2, 64, 64, 3), np.uint8)}
    bare, labelled = draw_columns(images), draw_columns(images, rows=["first", "the second"])
    assert labelled.shape[1] > bare.shape[1] + 80
    assert np.array_equal(labelled[:, -bare.shape[1] + 8 :], bare[:, 8:])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.4, 0.9), (-3, 250), (0.001, 0.0011), (1, 32)])
def test_ticks_are_few_and_round_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 9
    assert low - 1e-9 <= found[0]
    assert found[-1] <= high + 1e-9
    step = (found[1] - found[0]) / 10 ** np.floor(np.log10(found[1] - found[0]) + 1e-9)
    assert min(abs(step - factor) for factor in (1, 2, 5)) < 1e-6


def test_a_logarithmic_axis_spans_whole_decades():
    axis = Axis([0.002, 30], 100, 0, log=True)
    assert (axis(0.001), axis(100)) == (100, 0)
    assert axis(1) == pytest.approx(40)
    assert axis.ticks() == [0.001, 0.01, 0.1, 1, 10, 100]
    assert Axis([5.0, 5.0], 0, 10)(5) == 5


def test_dashes_have_their_length_around_corners():
    corner = [(0, 0), (10, 0), (10, 10)]
    assert dashed(corner, ()) == [corner]
    assert dashed(corner, (6, 2)) == [[(0, 0), (6, 0)], [(8, 0), (10, 0), (10, 4)], [(10, 6), (10, 10)]]


def test_lines_of_a_chart_are_where_their_numbers_are():
    chart = plot({"flat": ([0, 10], [1, 1]), "rising": ([0, 10], [0, 2])}, "heading", "x")
    rows, columns = np.nonzero((chart == STYLES[0][0]).all(-1))
    level = np.bincount(rows).argmax()
    left, right = columns[rows == level].min(), columns[rows == level].max()
    high, wide = np.nonzero((chart == STYLES[1][0]).all(-1))
    line = (wide > left + 20) & (wide < right - 20) & (high > 90)  # below the legend, between the dots
    slope, offset = np.polyfit(wide[line], high[line], 1)
    assert slope < 0  # up is more
    assert slope * (left + right) / 2 + offset == pytest.approx(level, abs=3)  # half-way between 0 and 2


def test_values_below_the_floor_are_drawn_at_it():
    lines = {"a": ([1, 2, 3], [1, 0.1, 0])}
    assert np.array_equal(
        plot(lines, "h", "x", log=True, floor=1e-3), plot({"a": ([1, 2, 3], [1, 0.1, 1e-3])}, "h", "x", log=True)
    )
