"""Charts of runs from their logs."""

import json

import numpy as np
import pytest
from conftest import call
from PIL import Image

from util.plots import curves


@pytest.fixture
def drawn(monkeypatch):
    charts = {}

    def plot(lines, heading, x_label, *, log):
        charts[heading] = (lines, log)
        return np.zeros((4, 6, 3), np.uint8)

    monkeypatch.setattr(curves, "plot", plot)
    return charts


def test_a_chart_has_a_line_for_each_run_that_logged_it(tmp_path, drawn):
    logs = {
        "one": [{"epoch": 0.5, "loss": 1, "grad_norm": None}, {"epoch": 1, "loss": 0.5, "grad_norm": 2}],
        "two": [{"epoch": 1, "loss": 0.9, "grad_norm": 0.01}, {"epoch": 1, "knn_acc1": 30}],
    }
    for name, records in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    runs = [str(tmp_path / name) for name in logs]
    (line,) = call("util.curves", *runs, "--output", tmp_path / "new" / "x.png")
    assert line == f"{tmp_path / 'new' / 'x.png'}: 2 runs"
    assert drawn == {
        "loss": ({"one": ([0.5, 1], [1, 0.5]), "two": ([1], [0.9])}, False),
        "norm of the gradient": ({"one": ([1], [2]), "two": ([1], [0.01])}, True),  # over more than a decade and a half
        "kNN, top-1 in %": ({"two": ([1], [30])}, False),
    }
    with Image.open(tmp_path / "new" / "x.png") as picture:
        assert picture.size == (18, 4)


def test_the_log_of_a_real_run_is_drawn(pretrained, tmp_path):
    call("util.curves", pretrained, "--output", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width == 2 * 760  # it has no kNN


def test_a_folder_without_a_log_and_an_empty_one_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl: there is no such log; RUN is the --output_dir of a run"):
        call("util.curves", tmp_path, "--output", tmp_path / "x.png")
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(ValueError, match="nothing of loss, grad_norm, knn_acc1 is logged there"):
        call("util.curves", tmp_path, "--output", tmp_path / "x.png")
