"""python -m benchmarks.study FILE --data photos=DIR --output_dir DIR: train and measure the arms of a study, with seeds.

FILE (see studies/decoders.ini) lists arms, seeds and the commands of each. Every finished command adds a line to --records; what
has a line is skipped, so that the same command continues after a kill and does nothing once all is done.
"""

import argparse
import configparser
import json
import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import date
from pathlib import Path
from queue import SimpleQueue
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

from benchmarks.results import describe_machine
from util.args import Parser, number, picture, run_main
from util.dist import end_with_parent
from util.files import append_line
from util.log import read_records
from util.plots.charts import draw_lines, draw_points
from util.plots.grids import save_picture
from util.report import measured_numbers, table
from util.run import git

SECTIONS = {"study", "steps", "columns"}
KEYS = {"title", "flags", "encoder", "seeds", "steps", "epoch_seconds"}  # of an arm; all have defaults


class Arm(NamedTuple):
    """What is compared: flags that the {flags} of the steps stand for, or an {encoder} that needs no pre-training."""

    name: str
    title: str
    flags: str
    encoder: str
    seeds: list[int]
    steps: list[str]
    seconds: float | None  # of an epoch of pre-training, measured alone
    values: dict[str, str]  # of other names in braces: those of [study], unless the arm has its own


class Study(NamedTuple):
    name: str
    about: str  # what is asked, and the metric that decides, written before the runs
    arms: list[Arm]
    steps: dict[str, str]  # name -> command with {run} {seed} {flags} {encoder} and names of --data
    columns: dict[str, str]  # title -> step and key of its result


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("study", metavar="FILE", help="arms, seeds, steps and columns: an .ini file")
    add("--data", nargs="+", default=[], type=named_path, metavar="NAME=PATH", help="folders that the steps name")
    add("--output_dir", default="output", help="the runs lie in OUTPUT_DIR/STUDY/ARM/SEED")
    add("--records", metavar="FILE", help="lines of finished steps (default: docs/results/STUDY.jsonl)")
    add("--arms", nargs="+", metavar="ARM", help="only these (default: all)")
    add("--seeds", nargs="+", type=number(int, 0), metavar="SEED", help="only these (default: those of the file)")
    add("--jobs", type=number(int, 1), default=1, help="runs at once, each on its GPU or its share of the cores")
    add("--table", action="store_true", help="run nothing, print the table of the records")
    # fmt: off
    add("--page", metavar="FILE", help="with --table: page to write it into, between <!-- STUDY --> and <!-- end --> (default: none)")
    add("--chart", type=picture, metavar="FILE", help="with --table: picture of --columns, a point for each seed (default: none)")
    add("--columns", nargs="+", metavar="TITLE", help="with --chart: columns of the table (default: the first)")
    add("--curves", type=picture, metavar="FILE", help="with --table: chart of kNN over minutes of pre-training (default: none)")
    # fmt: on
    return parser


def named_path(text: str) -> tuple[str, str]:
    """argparse type: NAME=PATH."""
    name, equals, path = text.partition("=")
    if not (equals and name.isidentifier() and path):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=PATH")
    return name, path


def read_study(path: str) -> Study:
    """The study of an .ini file; ValueError that names what is wrong."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), default_section="")
    parser.optionxform = str  # type: ignore[assignment]  # keep the case of titles
    try:
        with Path(path).open() as file:
            parser.read_file(file)
        about, steps, columns = (parser[name] for name in ("study", "steps", "columns"))
        arms = []
        for section in parser.sections():
            if section in SECTIONS:
                continue
            arm, encoder = parser[section], parser[section].get("encoder", "--checkpoint {run}/last.pth")
            seeds = [int(seed) for seed in arm.get("seeds", about["seeds"]).split()]
            names = arm.get("steps", " ".join(name for name in steps if name != "pretrain" or "encoder" not in arm))
            title, flags, seconds = arm.get("title", section), arm.get("flags", ""), arm.getfloat("epoch_seconds")
            values = {name: arm.get(name, value) for name, value in about.items()}
            arms.append(Arm(section, title, flags, encoder, seeds, names.split(), seconds, values))
            if unknown := {*arm} - KEYS - {*about} | {*names.split()} - {*steps}:
                raise ValueError(f"[{section}] has {' '.join(sorted(unknown))}, neither a key of an arm nor a step")
        for title, source in columns.items():
            if source.split()[0] not in steps:
                raise ValueError(f"[columns] {title}: there is no step {source.split()[0]}")
    except (configparser.Error, KeyError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a study: {error}; see benchmarks/studies/decoders.ini") from error
    return Study(Path(path).stem, " ".join(about["about"].split()), arms, dict(steps), dict(columns))


def command_of(study: Study, arm: Arm, seed: int, step: str, folder: str, data: dict[str, str]) -> list[str]:
    """Words of a step's command; ValueError if it names data that are not given."""
    run = f"{folder}/{study.name}/{arm.name}/{seed}"
    names = arm.values | data | {"seed": str(seed), "run": run, "flags": arm.flags}
    try:
        names["encoder"] = arm.encoder.format(**names)
        return shlex.split(study.steps[step].format(**names))
    except (KeyError, IndexError) as error:
        raise ValueError(f"step {step}: {{{error.args[0]}}} is unknown; give --data {error.args[0]}=PATH") from error


def measured(output: str, folder: Path) -> dict[str, Any]:
    """The JSON of a main's last line; of pre-training, which prints none, the end and the curve of its log."""
    results = [line for line in output.splitlines() if line.startswith("{")]
    if results:
        return json.loads(results[-1])
    records = read_records(folder / "log.jsonl")
    curve = [[x["epoch"], x["knn_acc1"]] for x in records if "knn_acc1" in x]
    losses = [x["example_loss"] for x in records if "example_loss" in x]
    return {"example_loss": losses[-1], "knn_acc1_of_epoch": curve}


def read_lines(path: Path) -> list[dict]:
    """Records of finished steps; a line cut by a kill is left out, so that its step runs again."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


class Runner:
    """Runs the missing steps of arms, each arm and seed in one thread."""

    def __init__(self, study: Study, args: Namespace, records: Path):
        self.study, self.args, self.records = study, args, records
        self.slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(args.jobs):
            self.slots.put(slot)
        self.done = {(x["arm"], x["seed"], x["step"]): x for x in read_lines(records)}

    def environment(self, slot: int) -> dict[str, str]:
        """Variables of a job: its GPU or its share of the cores."""
        if torch.cuda.is_available():
            return os.environ | {"CUDA_VISIBLE_DEVICES": str(slot % torch.cuda.device_count())}
        return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.args.jobs))} | os.environ

    def run(self, arm: Arm, seed: int) -> bool:
        """Whether all steps of this arm and seed are done."""
        slot = self.slots.get()
        try:
            return all(self.run_step(arm, seed, step, slot) for step in arm.steps)
        finally:
            self.slots.put(slot)

    def run_step(self, arm: Arm, seed: int, step: str, slot: int) -> bool:
        data = dict(self.args.data)
        command = command_of(self.study, arm, seed, step, self.args.output_dir, data)
        stated = command_of(self.study, arm, seed, step, "output", {name: name.upper() for name in data})
        name = f"{self.study.name} {arm.name} seed {seed} {step}"
        if (arm.name, seed, step) in self.done:
            old = self.done[arm.name, seed, step]["command"]
            if old != shlex.join(stated):
                print(f"{name}: skipped, though recorded with another command: {old}", flush=True)
            return True
        folder = Path(self.args.output_dir, self.study.name, arm.name, str(seed))
        folder.mkdir(parents=True, exist_ok=True)
        log, started = folder / f"{step}.txt", time.monotonic()
        # now: the checkout may have moved on since the start
        commit = git("describe", "--always", "--dirty", "--abbrev=12").decode().strip()
        with log.open("a") as file:
            file.write(f"$ {shlex.join(command)}\n")
        with log.open("a") as file, log.open() as output:
            output.seek(0, os.SEEK_END)
            options = {"stdout": file, "stderr": subprocess.STDOUT, "env": self.environment(slot)}
            code = subprocess.run([sys.executable, *command], **options, preexec_fn=end_with_parent).returncode
            printed = output.read()
        if code:
            reason = printed.strip().rpartition("\n")[2]
            print(f"{name}: failed: {reason} ({log})", file=sys.stderr, flush=True)
            return False
        record = {"study": self.study.name, "arm": arm.name, "seed": seed, "step": step, "command": shlex.join(stated)}
        minutes = round((time.monotonic() - started) / 60, 2)
        starts = log.read_text().splitlines().count(f"$ {shlex.join(command)}")
        record |= {"commit": commit, "date": date.today().isoformat(), "minutes": minutes, "starts": starts}
        record |= {"jobs": self.args.jobs, "load": round(os.getloadavg()[1], 1)}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        record |= {"machine": describe_machine(device), "result": measured(printed, folder)}
        append_line(self.records, json.dumps(record))
        print(f"{name}: {record['minutes']} minutes", flush=True)
        return True


def values_of(study: Study, records: list[dict]) -> dict[str, dict[str, dict[int, float]]]:
    """Title of each column -> name of each arm -> seed -> value."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for record in records:
        for key, value in measured_numbers(record["result"]).items():
            found.setdefault((record["arm"], f"{record['step']} {key}"), {})[record["seed"]] = value
    return {
        title: {arm.name: found.get((arm.name, source), {}) for arm in study.arms}
        for title, source in study.columns.items()
    }


def summarise(study: Study, records: list[dict]) -> str:
    """Markdown: what is asked, mean ± sample standard deviation of each arm and column, and their paired differences.

    The tables have a row for each arm, or for each column if there are more of these.
    """
    values = values_of(study, records)
    first, *others = study.arms
    head = ["", "seeds", *study.columns]
    means, differences = [head], [[f"minus {first.title}, of the same seed (standard error)", *head[1:]]]
    for arm in study.arms:
        found = [column[arm.name] for column in values.values()]
        seeds = " ".join(map(str, sorted({seed for cell in found for seed in cell})))
        means.append([arm.title, seeds, *(format_mean(cell.values(), "{:.1f}", " ± {:.1f}") for cell in found)])
        known = [column[first.name] for column in values.values()]
        both = zip(found, known, strict=True)
        pairs = [[x - old[seed] for seed, x in cell.items() if seed in old] for cell, old in both]
        if arm in others and any(pairs):
            errors = (format_mean(pair, "{:+.1f}", " ({:.1f})", len(pair) ** 0.5) for pair in pairs)
            differences.append([arm.title, seeds, *errors])
    if len(study.columns) > len(study.arms):
        means, differences = ([[*row] for row in zip(*lines, strict=True)] for lines in (means, differences))
    return f"{study.about}\n\n{table(means)}\n{table(differences)}"


def format_mean(values: Collection[float], form: str, spread: str, divisor: float = 1.0) -> str:
    """The mean, and of several values their sample standard deviation / divisor; empty without values."""
    text = form.format(mean(values)) if values else ""
    return text + (spread.format(stdev(values) / divisor) if len(values) > 1 else "")


def write_into(page: Path, study: Study, text: str) -> None:
    """Replace what the page has between the marks of the study."""
    start, end = f"<!-- {study.name} -->\n", "<!-- end -->"
    before, found, rest = page.read_text().partition(start)
    if not found or end not in rest:
        raise ValueError(f"--page {page} has no lines {start.strip()} and {end}")
    page.write_text(f"{before}{start}{text}{end}{rest.partition(end)[2]}")


def panels(study: Study, records: list[dict], columns: list[str] | None) -> dict[str, dict[str, list[float]]]:
    """Title of these columns, or of the first -> title of each measured arm -> values of its seeds."""
    values = values_of(study, records)
    if unknown := {*(columns or [])} - {*values}:
        raise ValueError(f"--columns {' '.join(sorted(unknown))}: the table has {'; '.join(values)}")
    chosen = columns or [*values][:1]
    measured = [arm for arm in study.arms if any(values[title][arm.name] for title in chosen)]
    return {title: {arm.title: [*values[title][arm.name].values()] for arm in measured} for title in chosen}


def curves(study: Study, records: list[dict]) -> dict[str, tuple[list[float], list[float]]]:
    """Title of each arm with epoch_seconds -> (minutes, kNN top-1 in %, the mean over its seeds)."""
    lines = {}
    for arm in study.arms:
        runs = [x["result"]["knn_acc1_of_epoch"] for x in records if x["arm"] == arm.name and x["step"] == "pretrain"]
        if runs and arm.seconds:
            minutes = [epoch * arm.seconds / 60 for epoch, _ in runs[0]]
            values = [mean(accuracy for _, accuracy in points) for points in zip(*runs, strict=True)]
            lines[arm.title.replace("`", "")] = (minutes, values)
    return lines


def main() -> None:
    args = get_parser().parse_args()
    for name in ("page", "chart", "columns", "curves"):
        if getattr(args, name) and not args.table:
            raise ValueError(f"--{name} needs --table, which runs nothing")
    study = read_study(args.study)
    records = Path(args.records or f"docs/results/{study.name}.jsonl")
    if args.table:
        found = read_lines(records)
        print(text := summarise(study, found), end="")
        if args.page:
            write_into(Path(args.page), study, text)
        if args.chart:
            save_picture(args.chart, draw_points(panels(study, found, args.columns)))
        if args.curves:
            label = "kNN top-1 accuracy in % during pre-training"
            save_picture(args.curves, draw_lines(curves(study, found), label, "minutes"))
        return
    known = [arm.name for arm in study.arms]
    if unknown := {*(args.arms or [])} - {*known}:
        raise ValueError(f"--arms {' '.join(sorted(unknown))}: {args.study} has {' '.join(known)}")
    records.parent.mkdir(parents=True, exist_ok=True)
    arms = [arm for arm in study.arms if not args.arms or arm.name in args.arms]
    seeds = args.seeds or sorted({seed for arm in arms for seed in arm.seeds})
    jobs = [(arm, seed) for seed in seeds for arm in arms if seed in arm.seeds]
    runner = Runner(study, args, records)
    with ThreadPoolExecutor(args.jobs) as pool:
        finished = [*pool.map(lambda job: runner.run(*job), jobs)]
    if not all(finished):
        raise ValueError(f"{finished.count(False)} of {len(finished)} runs are not complete; run this command again")
    print(summarise(study, read_lines(records)), end="")


if __name__ == "__main__":
    run_main(main)
