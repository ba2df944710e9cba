"""Charts of runs from their log.jsonl."""

import json

import numpy as np
import pytest
from conftest import call
from PIL import Image

from util.plots import curves


@pytest.fixture
def drawn(monkeypatch):
    charts = {}

    def draw_lines(lines, title, x_label, *, log):
        charts[title] = (lines, log)
        return np.zeros((4, 6, 3), np.uint8)

    monkeypatch.setattr(curves, "draw_lines", draw_lines)
    return charts


def test_each_chart_has_a_line_per_run_that_logged_its_key(tmp_path, drawn):
    logs = {
        "one": [{"epoch": 0.5, "loss": 1, "grad_norm": None}, {"epoch": 1, "loss": 0.5, "grad_norm": 2}],
        "two": [{"epoch": 1, "loss": 0.9, "grad_norm": 0.01}, {"epoch": 1, "knn_acc1": 30}],
    }
    for name, records in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    runs = [str(tmp_path / name) for name in logs]
    (line,) = call("util.plots.curves", *runs, "--output", tmp_path / "new" / "x.png")
    assert line == f"{tmp_path / 'new' / 'x.png'}: 2 runs"
    assert drawn == {
        "loss": ({"one": ([0.5, 1], [1, 0.5]), "two": ([1], [0.9])}, False),
        "gradient norm": (
            {"one": ([1], [2]), "two": ([1], [0.01])},
            True,
        ),  # its values span a factor above 30: logarithmic
        "kNN top-1 accuracy in %": ({"two": ([1], [30])}, False),
    }
    with Image.open(tmp_path / "new" / "x.png") as picture:
        assert picture.size == (18, 4)


def test_draws_the_log_of_a_real_run(pretrained, tmp_path):
    call("util.plots.curves", pretrained, "--output", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width == 2 * 760  # it has no kNN


def test_refuses_a_folder_without_a_log_and_an_empty_log(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"RUN {tmp_path}"):
        call("util.plots.curves", tmp_path, "--output", tmp_path / "x.png")
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(ValueError, match=rf"RUN {tmp_path}: no loss, grad_norm, knn_acc1"):
        call("util.plots.curves", tmp_path, "--output", tmp_path / "x.png")
