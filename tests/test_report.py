"""Records of results (--results), and the table that util.report makes of them."""

import hashlib
import json
import re
import sys
from copy import deepcopy
from multiprocessing import get_context
from statistics import stdev

import pytest
from conftest import DEVICE, MODEL, call, ended, spawn

from util import report
from util.files import append_line

PRETRAIN_ARGS = {
    "model": "vit_tiny", "patch_size": 8, "input_size": [64, 64], "in_chans": 3, "mean": None, "std": None, "epochs": 9, "epochs_done": 9.0,
    "lowpass_radius": 16, "crop": "src", "crop_interpolation": "auto", "seed": 0, "data_path": "/a/photos", "batch_size": 64,
    "accum_iter": 1, "effective_batch": None, "batch": 64, "output_dir": "output/x", "num_workers": 2, "mask_ratio": 0.75,
}  # fmt: skip
KNN_ARGS = {
    "model": "vit_tiny", "patch_size": 8, "input_size": [64, 64], "in_chans": 3, "mean": [0.5] * 3, "std": [0.5] * 3, "seed": 0, "k": 20,
    "data_path": "/a/photos", "checkpoint": "output/x/last.pth", "train_fraction": 1.0, "batch_size": 256, "num_workers": 2,
}  # fmt: skip
PROBE_ARGS = KNN_ARGS | {
    "epochs": 20,
    "batch_size": 32,
    "accum_iter": 2,
    "effective_batch": None,
    "blr": [0.1],
    "eval": False,
}
CLOCK = iter(range(10**6))


def record(main="main_knn.py", pretrain=None, result=None, args=None, **changes) -> dict:
    """A record as `print_result` writes it; pretrain None is an untrained encoder."""
    origin = None
    if pretrain is not None:
        run = PRETRAIN_ARGS | pretrain
        origin = {"sha256": hashlib.sha256(json.dumps(run).encode()).hexdigest(), "source": "pixmim", "args": run}
    defaults = KNN_ARGS if main == "main_knn.py" else PROBE_ARGS
    about = {
        "main": main,
        "command": ["python", main, "--x"],
        "commit": "abc",
        "time": f"{next(CLOCK):09d}",
        "world_size": 1,
    }
    return about | {"args": defaults | (args or {}) | {"origin": origin}, "result": result or {}} | changes


def tabulate(tmp_path, records, *words) -> dict:
    """The JSON of the report of these records."""
    file = tmp_path / "x.jsonl"
    file.write_text("".join(f"{json.dumps(x)}\n" for x in records))
    return json.loads("\n".join(call("util.report", file, "--json", *words)))


def cells(found: dict) -> dict:
    """{(row, column, metric): (mean, standard deviation, n)} by the labels."""
    return {
        (found["rows"][x["row"]], found["columns"][x["column"]], x["metric"]): (x["mean"], x["std"], x["n"])
        for x in found["cells"]
    }


@pytest.fixture
def three_groups() -> list[dict]:
    """PixMIM with three seeds, MAE with two and without a probe, an untrained encoder with one."""
    records = [record(pretrain={"seed": s}, result={"acc1": acc1}) for s, acc1 in enumerate((50.0, 51.0, 55.0))]
    mae = {"lowpass_radius": 0}
    records += [record(pretrain={"seed": s, **mae}, result={"acc1": acc1}) for s, acc1 in ((0, 47.0), (2, 50.0))]
    records += [record("main_linprobe.py", {"seed": s}, {"acc1": acc1}) for s, acc1 in enumerate((60.0, 61.0, 62.0))]
    return [*records, record(result={"acc1": 20.0}, args={"checkpoint": "none"})]


def test_the_table_has_means_and_deviations_computed_by_hand(tmp_path, three_groups):
    pixmim, mae = ("pre-trained vit_tiny lowpass_radius=16", "pre-trained vit_tiny lowpass_radius=0")
    assert cells(tabulate(tmp_path, three_groups)) == {
        ("untrained vit_tiny", "knn photos", "acc1"): (20, None, 1),
        (pixmim, "knn photos", "acc1"): (52, pytest.approx(((4 + 1 + 9) / 2) ** 0.5), 3),
        (mae, "knn photos", "acc1"): (48.5, pytest.approx(stdev([47, 50])), 2),
        (pixmim, "linprobe photos", "acc1"): (61, 1, 3),
    }


def test_a_missing_measure_is_empty_in_markdown(tmp_path, three_groups):
    (tmp_path / "x.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in three_groups))
    lines = call("util.report", tmp_path / "x.jsonl")
    assert lines[:5] == [
        "| row | checkpoint | knn photos: acc1 | linprobe photos: acc1 |",
        "| --- | --- | --- | --- |",
        "| 1 | untrained vit_tiny | 20 |  |",
        "| 2 | pre-trained vit_tiny lowpass_radius=16 | 52 ± 2.6 (n=3) | 61 ± 1 (n=3) |",
        "| 3 | pre-trained vit_tiny lowpass_radius=0 | 48.5 ± 2.1 (n=2) |  |",
    ]
    # equal in this test
    assert lines.count("python main_knn.py --x") == lines.count("python main_linprobe.py --x") == 1
    probes = "; ".join(f"row 2, linprobe photos, seeds [{seed}, 0]" for seed in range(3))
    assert f"# commit abc: {probes}" in lines


def test_the_difference_of_two_rows_is_over_the_seeds_that_both_have(tmp_path, three_groups):
    found = tabulate(tmp_path, three_groups, "--difference", 3, 2)  # seeds 0 and 2: 50 - 47 and 55 - 50
    (difference,) = found["differences"]
    assert (difference["difference"], difference["n"]) == (4, 2)
    assert difference["standard_error"] == pytest.approx(stdev([3, 5]) / 2**0.5)
    with pytest.raises(ValueError, match=r"--difference \[1, 4\]: .*rows 1 to 3"):
        tabulate(tmp_path, three_groups, "--difference", 1, 4)


@pytest.mark.parametrize(
    ("size", "other"), [(64, None), (None, None), ([64, 64], None), ([64, 48], [64, 64]), (32, [64, 64])]
)
def test_another_input_size_than_the_checkpoints_makes_a_column(tmp_path, size, other):
    """facebookresearch/mae's files state the side alone."""
    found = record(pretrain={"input_size": size}, result={"acc1": 1.0})
    _, column, _ = report.split_record(found)
    assert column.get("other_input_size") == other


SAME_ROW = [
    *({"seed": 1}, {"num_workers": 9}, {"output_dir": "y"}, {"data_path": "/elsewhere/photos"}),
    *({"crop_interpolation": "bilinear"}, {"batch_size": 32, "accum_iter": 2}),  # bilinear is what auto means for src
]
OTHER_ROW = [
    *(
        {"lowpass_radius": 0},
        {"epochs": 10},
        {"epochs_done": 4.5},
        {"batch": 128},
        {"mask_ratio": 0.5},
        {"model": "vit_base"},
    ),
    *({"data_path": "/a/images"}, {"crop": "rrc"}, {"data": [5, "names"]}, {"origin": {"sha256": "f" * 64}}),
]


@pytest.mark.parametrize(("changes", "rows"), [(x, 1) for x in SAME_ROW] + [(x, 2) for x in OTHER_ROW], ids=str)
def test_pretraining_settings_define_rows(tmp_path, changes, rows):
    found = tabulate(tmp_path, [record(pretrain=x, result={"acc1": 1.0}) for x in ({}, changes)])
    assert len(found["rows"]) == len({*found["rows"]}) == rows


SAME_COLUMN = [
    {"seed": 1},
    {"num_workers": 9},
    {"checkpoint": "y"},
    {"data_path": "/b/photos"},
    {"batch_size": 64, "accum_iter": 1},
]
OTHER_COLUMN = [
    {"epochs": 5},
    {"blr": [0.3]},
    {"batch_size": 64},
    {"data_path": "/a/images"},
    {"input_size": [96, 96]},
    {"train_fraction": 0.1},
]


@pytest.mark.parametrize(
    ("changes", "columns"), [(x, 1) for x in SAME_COLUMN] + [(x, 2) for x in OTHER_COLUMN], ids=str
)
def test_evaluation_settings_define_columns(tmp_path, changes, columns):
    both = [record("main_linprobe.py", {}, {"acc1": 1.0}, args) for args in ({}, changes)]
    found = tabulate(tmp_path, both)
    assert len(found["columns"]) == len({*found["columns"]}) == columns
    assert len(found["rows"]) == 1


def test_result_metadata_defines_columns(tmp_path):
    layers = [
        record(pretrain={}, result={"knn_features": x, "acc1": 1.0, "n": 9}) for x in ("before_norm", "after_norm")
    ]
    assert tabulate(tmp_path, layers)["columns"] == [
        "knn photos knn_features=before_norm",
        "knn photos knn_features=after_norm",
    ]
    assert len(tabulate(tmp_path, [record(pretrain={}, result={"acc1": x}) for x in (1.0, 2.0)])["columns"]) == 1


def test_foreign_checkpoints_are_distinguished_by_their_content(tmp_path):
    both = [record(pretrain={}, result={"acc1": 1.0}, args={"checkpoint": f"{x}/vit.pth"}) for x in "ab"]
    for i, each in enumerate(both):
        each["args"]["origin"] = {"sha256": f"{i}" * 64, "source": "timm", "args": {}}
    assert tabulate(tmp_path, both)["rows"] == ["vit.pth sha256=000000000000", "vit.pth sha256=111111111111"]


def test_a_classifier_is_in_the_row_of_the_encoder_that_it_started_from(tmp_path):
    trained = record("main_finetune.py", {"seed": 3}, {"acc1": 80.0}, {"layer_decay": 0.65, "seed": 5})
    shift = record(
        "main_finetune.py", {}, {"acc1": 30.0, "classes": 2}, {"eval": True, "data_path": "/x/imagenet-a", "seed": 9}
    )
    stage = deepcopy(trained["args"]) | {"classes": ["ant", "bee", "cat"]}
    shift["args"]["origin"] = {"sha256": "c" * 64, "source": "pixmim", "args": stage}
    found = tabulate(tmp_path, [trained, shift])
    assert cells(found) == {
        ("pre-trained vit_tiny", "finetune photos", "acc1"): (80, None, 1),
        ("pre-trained vit_tiny", "eval imagenet-a", "acc1"): (30, None, 1),
    }
    assert [x["values"][0]["seeds"] for x in found["cells"]] == [[3, 5], [3, 5]]


def test_a_repeated_measurement_replaces_the_older_one_and_is_not_another_seed(tmp_path):
    twice = [record(pretrain={}, result={"acc1": x}) for x in (40.0, 41.0)]
    found = tabulate(tmp_path, twice[::-1])  # the order in the file does not matter
    assert (*cells(found).values(),) == ((41, None, 1),)
    assert found["superseded"] == 1
    seeds = [
        record(pretrain={}, result={"acc1": 40.0}, args={"seed": x}) for x in (0, 1)
    ]  # kNN on all images draws nothing
    assert tabulate(tmp_path, seeds)["superseded"] == 1


def test_damaged_lines_are_counted_and_excluded_from_the_table(tmp_path, three_groups):
    lines = [json.dumps(x) for x in three_groups]
    wrong = [lines[0][:-30], "", "7", "{}", '{"main": 3}', lines[1].replace('"seed"', '"sead"'), "\x00\udcff"]
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join([*lines[:4], *wrong, *lines[4:]]), errors="surrogateescape")
    found = json.loads("\n".join(call("util.report", tmp_path, "--json")))
    assert found["damaged"] == {str(file): len(wrong)}
    assert cells(found) == cells(tabulate(tmp_path, three_groups))
    assert any(line.startswith(f"{file}: {len(wrong)} damaged lines") for line in call("util.report", tmp_path))


def test_numbers_that_are_not_finite_are_missing(tmp_path):
    found = tabulate(
        tmp_path,
        [
            record(
                pretrain={},
                result={"acc1": float("nan"), "acc5": 2.0, "best": True, "x": None, "heads": {"ep": {"acc1": 3}}},
            )
        ],
    )
    assert [(x["metric"], x["mean"]) for x in found["cells"]] == [("acc5", 2), ("heads ep acc1", 3)]


def test_foreign_text_cannot_break_the_table(tmp_path):
    name = "a|b`c<script>\n\x1b[31m\udcff"
    bad = record(pretrain={}, result={"acc1": 1.0}, args={"data_path": name}, command=["python", name])
    (tmp_path / "results.jsonl").write_text(f"{json.dumps(bad)}\n")
    lines = call("util.report", tmp_path)
    assert lines[0] == "| row | checkpoint | knn a\\|b\\`c&lt;script&gt;\\n\\x1b[31m\\udcff: acc1 |"
    assert "python 'a|b`c<script>\\n\\x1b[31m\\udcff'" in lines


@pytest.mark.parametrize("words", [["nothing.jsonl"], ["."]])
def test_missing_results_give_a_one_line_error(tmp_path, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=r"^\.: .*--results FILE|^nothing\.jsonl: "):
        call("util.report", *words)


# ------------------------------------------------------------------------------------------------------------- records


def append_many(path, word) -> None:
    for i in range(200):
        append_line(path, f"{word} {i} " + "x" * 5000)


def test_processes_append_to_one_file_at_once(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    processes = [get_context("fork").Process(target=append_many, args=(path, word)) for word in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = path.read_text().splitlines()
    assert {len(line) - len(line.rstrip("x")) for line in lines} == {5000}
    assert sorted(line.split()[:2] for line in lines) == sorted([word, str(i)] for word in "ab" for i in range(200))


def test_an_incomplete_line_does_not_damage_the_next_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"cut')
    append_line(path, '{"b": 2}')
    append_line(path, '{"c": 3}')
    assert path.read_text().splitlines() == ['{"a": 1}', '{"cut', '{"b": 2}', '{"c": 3}']


def test_a_file_that_cannot_be_written_is_named_after_the_result_is_printed(photos, tmp_path):
    (tmp_path / "file").touch()
    words = ["--checkpoint", "none", *MODEL, "--data_path", photos, *DEVICE, "--results", tmp_path / "file" / "x.jsonl"]
    status, out, err = ended(spawn("main_knn.py", *words))
    assert status == 1
    assert "acc1" in json.loads(out.splitlines()[-1])
    assert err.count("\n") == 1
    assert re.search(r"--results .*x\.jsonl ", err)


def test_mains_record_what_they_measured_of_which_checkpoint(photos, pretrained, tmp_path):
    data, last = ["--data_path", photos, *DEVICE], pretrained / "last.pth"
    file = ["--results", tmp_path / "all.jsonl"]
    knn = json.loads(call("main_knn", "--checkpoint", last, *data, *file)[-1])
    untrained = json.loads(call("main_knn", "--checkpoint", "none", *MODEL, *data, *file)[-1])
    short = ["--epochs", "1", "--batch_size", "8", "--warmup_epochs", "0", "--output_dir", tmp_path / "probe"]
    probe = json.loads(call("main_linprobe", "--checkpoint", last, *data, *short, "--pool", "mean")[-1])
    classifier = ["--checkpoint", tmp_path / "probe" / "classifier.pth", "--eval"]
    assert json.loads(call("main_linprobe", *classifier, *data, *file)[-1])["acc1"] == probe["acc1"]
    written = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    sha = hashlib.sha256(last.read_bytes()).hexdigest()
    assert [x["result"] for x in written if x["main"] == "main_knn.py"][1::2] == [knn, untrained]
    assert written[0]["args"]["origin"]["sha256"] == sha
    assert written[0]["args"]["origin"]["args"]["epochs_done"] == 2
    assert written[-1]["args"]["origin"]["args"]["origin"]["sha256"] == sha  # of the encoder below the classifier
    assert written[0]["command"][:2] == [sys.executable.rpartition("/")[2], "main_knn.py"]
    found = cells(json.loads("\n".join(call("util.report", tmp_path / "all.jsonl", tmp_path, "--json"))))
    assert {(row.split()[0], column.split()[0]) for row, column, metric in found if metric == "acc1"} == {
        *[("untrained", "knn"), ("pre-trained", "knn"), ("pre-trained", "linprobe"), ("pre-trained", "eval")],
    }


def test_the_report_is_a_command_with_one_line_errors(tmp_path):
    status, out, err = ended(spawn("-m", "util.report", tmp_path))
    assert (status, out) == (1, "")
    assert re.fullmatch(rf"report\.py: error: {tmp_path}: .*--results FILE\n", err)


def test_the_parser_of_the_report_describes_it():
    assert "recorded" in report.get_parser().format_help()
