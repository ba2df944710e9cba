"""benchmarks.study: what is run, what is skipped, and the numbers of its table."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import ROOT, call
from test_repository import check_script

from benchmarks.study import command_of, panels, read_lines, read_study, summarise

STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.ini"))
# a step that counts its starts; `wait` stays until a file is there
SCRIPT = """
import json, sys, time
from pathlib import Path
name, value, run = sys.argv[1:4]
with open(Path(run, "calls.txt"), "a") as file:
    file.write(name + "\\n")
while name == "slow" and not Path(run, "go").exists():
    time.sleep(0.01)
if value == "broken":
    sys.exit("no such thing")
print(json.dumps({"acc1": float(value), "heads": {"mean": {"acc1": float(sys.argv[4])}}}))
"""
STUDY = """
[study]
about = a test
seeds = 0 1 2
nested = 1.0
[steps]
first = {script} first {seed}{flags} {run} {nested}
second = {script} %s 5 {run} 0
[columns]
first = first acc1
nested = first heads mean acc1
[a]
flags = .5
[b]
title = the | other
nested = 3.0
flags = .25
seeds = 1 2
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    path = tmp_path / "tiny.ini"
    path.write_text(STUDY % "second")
    return path


def words(path: Path) -> list[str]:
    folder = path.parent
    words = ["--data", f"script={folder / 'script.py'}", "--output_dir", str(folder), "--records", f"{folder}/records"]
    return [str(path), *words]


def run(path: Path, *more) -> list[str]:
    return call("benchmarks.study", *words(path), *more)


def calls(path: Path, arm: str, seed: int) -> list[str]:
    return (path.parent / "tiny" / arm / str(seed) / "calls.txt").read_text().split()


def test_all_steps_run_once_and_a_second_run_changes_nothing(study):
    table = run(study, "--jobs", 2)
    records = (study.parent / "records").read_text()
    assert {(x["arm"], x["seed"], x["step"]) for x in map(json.loads, records.splitlines())} == {
        (arm, seed, step)
        for arm, seeds in (("a", (0, 1, 2)), ("b", (1, 2)))
        for seed in seeds
        for step in ("first", "second")
    }
    assert str(study.parent) not in records  # names of the data instead
    assert run(study) == run(study, "--table")
    assert (study.parent / "records").read_text() == records
    assert calls(study, "a", 0) == ["first", "second"]
    assert table[-len(run(study)) :] == run(study)


def test_means_deviations_and_paired_differences_are_those_computed_by_hand(study):
    run(study)
    a, b = [0.5, 1.5, 2.5], [1.25, 2.25]
    pairs = [1.25 - 1.5, 2.25 - 2.5]
    means = f"{mean(b):.1f} ± {stdev(b):.1f} | 3.0 ± 0.0 |"
    assert run(study, "--table") == [
        "a test",
        "",
        "|  | seeds | first | nested |",
        "| --- | --- | --- | --- |",
        f"| a | 0 1 2 | {mean(a):.1f} ± {stdev(a):.1f} | 1.0 ± 0.0 |",
        f"| the \\| other | 1 2 | {means}",
        "",
        "| minus a, of the same seed (standard error) | seeds | first | nested |",
        "| --- | --- | --- | --- |",
        f"| the \\| other | 1 2 | {mean(pairs):+.1f} ({stdev(pairs) / 2**0.5:.1f}) | +2.0 (0.0) |",
    ]
    study.write_text(study.read_text().replace("[columns]", "[columns]\nagain = first acc1"))
    turned = run(study, "--table")
    assert turned[2:7] == ["|  | a | the \\| other |", "| --- | --- | --- |", "| seeds | 0 1 2 | 1 2 |", *turned[5:7]]
    assert turned[5] == turned[6].replace("first", "again")
    assert turned[6] == f"| first | {mean(a):.1f} ± {stdev(a):.1f} | {mean(b):.1f} ± {stdev(b):.1f} |"
    assert turned[-1] == "| nested | +2.0 (0.0) |"
    study.write_text(study.read_text().replace("again = first acc1\n", ""))
    records = read_lines(study.parent / "records")
    one = [x | {"result": {"acc1": 7.0}} if x["seed"] == 2 else x for x in records if x["arm"] == "b"]
    lines = summarise(read_study(str(study)), one).splitlines()
    assert f"| {mean([1.25, 7]):.1f} ± {stdev([1.25, 7]):.1f} |" in lines[5]
    assert len(lines) == 9  # no pair without the first arm


def test_a_chart_has_the_values_of_each_measured_arm_and_seed(study):
    run(study, "--arms", "b")
    found = read_study(str(study)), read_lines(study.parent / "records")
    assert panels(*found, None) == {"first": {"the | other": [1.25, 2.25]}}
    assert panels(*found, ["nested"]) == {"nested": {"the | other": [3.0, 3.0]}}
    run(study, "--table", "--chart", study.parent / "chart.png", "--columns", "first", "nested")
    assert (study.parent / "chart.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"--columns second: .*first; nested"):
        panels(*found, ["second"])


def test_a_killed_study_stops_its_runs_and_continues(study):
    study.write_text(STUDY % "slow")
    go = study.parent / "tiny" / "a" / "0" / "go"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.study", *words(study), "--arms", "a", "--seeds", "0"], cwd=ROOT
    )
    file = go.parent / "calls.txt"
    while not (file.exists() and "slow" in file.read_text()):
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) == 1
    while Path(f"/proc/{children[0]}").exists() and "Z" not in Path(f"/proc/{children[0]}/stat").read_text().split()[2]:
        time.sleep(0.05)
    go.touch()
    with (study.parent / "records").open("a") as records:
        records.write('{"arm": "a", "se')  # as a full disk leaves it
    run(study, "--arms", "a", "--seeds", 0)
    assert calls(study, "a", 0) == ["first", "slow", "slow"]
    assert [x["starts"] for x in read_lines(study.parent / "records")] == [1, 2]


def test_a_failed_step_is_named_and_the_other_runs_continue(study, capsys):
    study.write_text(
        study.read_text().replace("flags = .5", "flags = .5\nseeds = 0").replace("first {seed}{flags}", "first broken")
    )
    with pytest.raises(ValueError, match="3 of 3 runs"):
        run(study)
    assert re.search("tiny b seed 2 first: .*no such thing", capsys.readouterr().err)
    assert [calls(study, *x) for x in (("a", 0), ("b", 1), ("b", 2))] == [["first"]] * 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{script} first", "{photos} first", "give --data photos=PATH"),
        ("[a]\nflags", "[a]\nflag", "[a] has flag"),
        ("first = first acc1", "first = third acc1", "step third"),
        ("seeds = 0 1 2", "seeds = 0 one", "invalid literal"),
        ("[columns]", "[column]", "'columns'"),
        ("[study]", "study", "a study"),
    ],
)
def test_an_invalid_study_gives_a_one_line_error(study, old, new, message):
    study.write_text(study.read_text().replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)):
        run(study)


WRONG = [
    ["--arms", "c"],
    ["--data", "x"],
    ["--table", "--page", os.devnull],
    ["--chart", "c.png"],
    ["--page", os.devnull],
    ["--curves", "c.png"],
    ["--columns", "first"],
]


@pytest.mark.parametrize("more", WRONG, ids=str)
def test_invalid_study_flags_give_a_one_line_error(study, more):
    with pytest.raises((SystemExit, ValueError)):
        run(study, *more)
    assert not (study.parent / "tiny").exists()  # nothing ran


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_commands_of_studies_parse(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(str(path))
    for arm in study.arms:
        for step in arm.steps:
            script, *flags = command_of(
                study, arm, 0, step, "output", dict.fromkeys(("photos", "nuclei", "perturbed"), "DIR")
            )
            check_script(script, flags)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_tables_in_the_results_equal_those_of_the_records(path):
    records = ROOT / "docs" / "results" / f"{path.stem}.jsonl"
    marked = (
        (ROOT / "docs" / "results.md").read_text().partition(f"<!-- {path.stem} -->\n")[2].partition("<!-- end -->")[0]
    )
    assert marked == (summarise(read_study(str(path)), read_lines(records)) if records.exists() else "")
