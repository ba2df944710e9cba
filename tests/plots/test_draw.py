"""Image grids and line charts: positions of images, labels and lines."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import ImageFont

from util.plots.charts import COLORS, draw_lines, draw_points
from util.plots.grids import draw_columns, wrap_label


def test_labels_wrap_between_words():
    font = ImageFont.load_default(size=20)
    lines = wrap_label("prediction (true patch mean and std)", font, 224)
    assert " ".join(lines) == "prediction (true patch mean and std)"
    assert len(lines) == 2
    assert all(font.getlength(line) <= 224 for line in lines)


def test_images_are_copied_unchanged_to_their_rows_and_columns():
    rng = np.random.default_rng(0)
    columns = {name: rng.integers(0, 256, (2, 112, 112, 3), np.uint8) for name in "ab"}
    picture = draw_columns(columns)
    top = picture.shape[0] - 2 * (224 + 8)
    for i, images in enumerate(columns.values()):
        for row in range(2):
            shown = picture[top + row * 232 : top + row * 232 + 224, 8 + i * 232 : 8 + i * 232 + 224]
            assert np.array_equal(shown[::2, ::2], images[row])
            assert np.array_equal(shown[1::2, 1::2], images[row])


def test_font_size_grows_with_the_grid():
    small, large = (
        draw_columns({str(i): np.zeros((1, 224, 224, 3), np.uint8) for i in range(count)}) for count in (2, 20)
    )
    assert small.shape[0] - 224 - 16 == 24  # one line of 1.2 x 20 px
    assert large.shape[0] - 224 - 16 == pytest.approx(1.2 * 20 * 224 / 70, abs=1)


def test_row_labels_widen_the_grid():
    images = {"a": np.zeros((2, 64, 64, 3), np.uint8)}
    bare, labelled = draw_columns(images), draw_columns(images, rows=["first", "the second"])
    assert labelled.shape[1] > bare.shape[1] + 80
    assert np.array_equal(labelled[:, -bare.shape[1] + 8 :], bare[:, 8:])


def colored_anywhere(chart: np.ndarray, color: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of exactly this colour."""
    return np.nonzero((chart == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(-1))


def colored(chart: np.ndarray, color: str) -> tuple[np.ndarray, np.ndarray]:
    """`colored_anywhere` without the legend in the upper left corner."""
    chart = chart.copy()
    chart[:170, :330] = 255
    return colored_anywhere(chart, color)


def test_lines_of_a_chart_are_at_their_values():
    chart = draw_lines({"flat": ([0, 10], [1, 1]), "rising": ([0, 10], [0, 2])}, "title", "x")
    assert (chart.shape, chart.dtype) == ((600, 760, 3), np.uint8)
    rows, columns = colored(chart, COLORS[0])
    level = np.bincount(rows).argmax()
    left, right = columns[rows == level].min(), columns[rows == level].max()
    high, wide = colored(chart, COLORS[1])
    for share in (0.25, 0.75):  # the dashed line passes below the flat one in the first half, above it in the second
        near = abs(wide - (left + share * (right - left))) < 40
        middle = (wide[near].mean() - left) / (right - left)
        assert (level - high[near].mean()) / (middle - 0.5) == pytest.approx(level_step(chart), rel=0.05)


def level_step(chart: np.ndarray) -> float:
    """Pixels between y = 0 and y = 2 in that chart: between the markers at the two ends of the rising line."""
    high, wide = colored(chart, COLORS[1])
    low_end, high_end = high[wide <= wide.min() + 12].mean(), high[wide >= wide.max() - 12].mean()
    return low_end - high_end


def test_points_and_means_of_a_row_are_at_their_values():
    rows = {"a": [0.0, 10.0], "b": [5.0], "c": [10.0], "not measured": [], "d": [0.0]}
    chart = draw_points({"first": rows, "second": {"a": [1.0]}})
    half = chart[:, : chart.shape[1] * 6 // 10]  # names and the first panel
    marks = {name: colored_anywhere(half, COLORS[i]) for i, name in enumerate(rows) if name != "not measured"}
    x, y = ({name: mark[axis].mean() for name, mark in marks.items()} for axis in (1, 0))
    assert x["a"] == pytest.approx(x["b"], abs=1)
    assert x["c"] - x["b"] == pytest.approx(x["b"] - x["d"], abs=1)
    assert x["c"] - x["d"] > 100
    steps = [y["b"] - y["a"], y["c"] - y["b"], (y["d"] - y["c"]) / 2]  # the row without values has its place
    assert steps == pytest.approx([steps[0]] * 3, abs=1)
    bluish = np.nonzero((half[..., 2] > half[..., 0] + 40) & (half[..., 2] > half[..., 1] + 20))[1]  # points of row a
    assert bluish.min() < x["d"] < x["c"] < bluish.max()
    five = draw_points({str(i): rows for i in range(5)})  # four abreast
    assert five.shape[0] == 2 * chart.shape[0]
    below = five[chart.shape[0] :, five.shape[1] // 2 :]
    assert (below == 255).all()


def test_a_logarithmic_chart_draws_decades_at_equal_distances():
    chart = draw_lines({"a": ([1, 2, 3], [1e-4, 1e-2, 1])}, "title", "x", log=True)
    rows, columns = colored(chart, COLORS[0])
    ends = [rows[abs(columns - x) < 4].mean() for x in (columns.min() + 6, columns.max() - 6)]
    middle = rows[abs(columns - (columns.min() + columns.max()) / 2) < 4].mean()
    assert middle == pytest.approx(sum(ends) / 2, abs=6)  # the line slopes by about 4 px over the width looked at
    assert ends[1] < middle < ends[0]


def test_values_below_the_floor_are_drawn_at_the_floor():
    charts = [
        draw_lines({"a": ([1, 2, 3], ys)}, "t", "x", log=True, floor=1e-3) for ys in ([1, 0.1, 0], [1, 0.1, 1e-3])
    ]
    assert np.array_equal(*charts)
    assert not np.array_equal(charts[0], draw_lines({"a": ([1, 2, 3], [1, 0.1, 0.01])}, "t", "x", log=True))


def test_a_mark_is_a_labelled_line_and_a_chart_changes_no_settings_of_matplotlib():
    import matplotlib

    before, lines = dict(matplotlib.rcParams), {"a": ([1, 2], [1, 2])}
    assert not np.array_equal(draw_lines(lines, "t", "x"), draw_lines(lines, "t", "x", mark=(1.5, "cut-off")))
    assert dict(matplotlib.rcParams) == before


def test_another_process_draws_the_same_bytes():
    code = (
        "import hashlib; from util.plots.charts import draw_lines; "
        "print(hashlib.sha256(draw_lines({'a': ([1, 2], [3, 4]), 'b': ([1, 2], [5, 1])}, 't', 'x').tobytes()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = {"a": ([1, 2], [3, 4]), "b": ([1, 2], [5, 1])}
    assert run.stdout.split()[-1] == hashlib.sha256(draw_lines(lines, "t", "x").tobytes()).hexdigest()
