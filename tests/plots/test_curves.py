"""Charts of runs from their log.jsonl."""

import json
import resource

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


def test_runs_of_the_same_name_have_lines_of_their_own(tmp_path, drawn):
    for folder, loss in (("a", 1), ("b", 2)):
        (tmp_path / folder / "run").mkdir(parents=True)
        (tmp_path / folder / "run" / "log.jsonl").write_text(json.dumps({"epoch": 1, "loss": loss}) + "\n")
    call("util.plots.curves", tmp_path / "a" / "run", tmp_path / "b" / "run", "--output", tmp_path / "x.png")
    assert drawn["loss"][0] == {"a/run": ([1], [1]), "b/run": ([1], [2])}


def test_a_full_disk_keeps_the_old_picture_and_names_it(pretrained, tmp_path):
    (tmp_path / "x.png").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"x\.png .*written.*unchanged"):
            call("util.plots.curves", pretrained, "--output", tmp_path / "x.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    "line",
    [
        '{"epoch": null, "loss": 1}\n',
        '{"epoch": "x"}\n',
        "\udcff\n",
        '{"epoch": 1, "loss": NaN}\n',
        '{"epoch": 1, "loss": "x"}\n',
        "[" * 10**5 + "\n",
        '{"epoch": 1, "lo',
        "[1]\n",
    ],
)
def test_damaged_log_lines_are_ignored(line, tmp_path, drawn):
    good = json.dumps({"epoch": 1, "loss": 0.5}) + "\n"
    (tmp_path / "log.jsonl").write_bytes((good + line).encode(errors="surrogateescape"))
    call("util.plots.curves", tmp_path, "--output", tmp_path / "x.png")
    assert drawn["loss"][0] == {tmp_path.name: ([1], [0.5])}


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
