"""python -m util.report OUTPUT...: one table of all results that were recorded (--results) for a set of checkpoints.

Rows are checkpoints, columns measures. A cell is the mean over seeds; with several also their sample standard deviation and
number. Results are averaged if they differ in --seed and IGNORED flags only. Labels show the flags that differ. What was not
measured stays empty.
"""

import argparse
import html
import json
import math
import shlex
from argparse import Namespace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from util.args import Parser, resolve_defaults, run_main
from util.checkpoint.resume import FREE
from util.files import printable

# flags that do not tell results apart; batch and name of the data are compared instead
IGNORED = FREE | {"seed", "classes"}
ENCODER = {"model", "patch_size", "input_size", "in_chans", "mean", "std"}  # flags of the row, not of the column
# keys of a result that say what was measured
FACTS = ("knn_features", "pool", "k", "temperature", "layer", "n", "classes")
# only with --json
NOT_SHOWN = {
    "acc5", "loss", "blr", "unreadable", "corruptions", "acc1_before_norm", "acc1_after_norm", "patches", "miou_of_k",
}  # fmt: skip
ORDER = ("knn", "linprobe", "finetune", "segment")  # of the columns


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("Table of all results that were recorded (--results) for a set of checkpoints.")
    add = parser.add_argument
    add("outputs", nargs="+", metavar="OUTPUT", help="folder that is searched for results.jsonl, or file of --results")
    add("--json", action="store_true", help="print JSON with each value, its seeds, command and commit")
    text = "also the second row minus the first, over common seeds (default: no difference)"
    add("--difference", type=int, nargs=2, metavar="ROW", help=text)
    return parser


def data_name(args: dict) -> str:
    """Last names of --data_path; earlier versions recorded one path."""
    paths = args["data_path"] if isinstance(args["data_path"], list) else [args["data_path"]]
    return "+".join(Path(path).name for path in paths)


def settings(args: dict, world_size: int = 1) -> dict[str, Any]:
    """Flags that tell runs apart, with their defaults; for a training also data and effective batch."""
    found = {name: x for name, x in vars(resolve_defaults(Namespace(**args))).items() if name not in IGNORED}
    if "epochs" in args:  # data and batch are replaced by those that the checkpoint records
        batch = args["effective_batch"] or args["batch_size"] * args["accum_iter"] * world_size
        found = {"batch": batch, "data": data_name(args)} | found
    return found


def split_record(record: dict) -> tuple[dict, dict, list[int]]:
    """(Settings of the row, settings of the column, seeds); an error if `print_result` has not written the record."""
    args, result, origin = record["args"], record["result"], record["args"]["origin"]
    file, data, evaluated = args["checkpoint"], data_name(args), args.get("eval", False)
    column = {} if evaluated else settings(args, record["world_size"])
    random = origin is None or "epochs" in args or args.get("train_fraction", 1) < 1
    seeds = [args["seed"]] if random and not evaluated else []
    size = (origin["args"].get("input_size") if origin else None) or args["input_size"]
    if args["input_size"] != ([size, size] if isinstance(size, int) else size):
        column["other_input_size"] = args["input_size"]
    if evaluated and "origin" in origin["args"]:  # a classifier of ours: the row is the encoder that it started from
        args = origin["args"]
        column |= {"trained_on" if name == "data" else name: value for name, value in settings(args).items()}
        seeds, file, origin = [args["seed"]], args["checkpoint"], args["origin"]
    column = {name: value for name, value in column.items() if name not in ENCODER}
    column |= {"measure": "eval" if evaluated else record["main"].removeprefix("main_").removesuffix(".py")}
    facts = [name for name in FACTS if name in result and not (name == "k" and "selected_on" in result)]
    column |= {"data": data} | {name: result[name] for name in facts}
    if origin is None:
        return {"weights": "untrained"} | {name: args[name] for name in sorted(ENCODER)}, column, seeds
    run = origin["args"]
    if origin["source"] != "pixmim" or "epochs" not in run:
        return {"weights": Path(file).name, "sha256": origin["sha256"][:12]}, column, seeds
    row = {"weights": "classifier" if "classes" in run else "pre-trained"} | settings(run)
    row |= {"started_from": run["origin"]["sha256"][:12]} if run.get("origin") else {}
    return row, column, [run["seed"], *seeds]


def measured_numbers(result: dict, prefix: str = "") -> dict[str, float]:
    """Measured numbers of a result, also those of nested results; neither FACTS nor nan."""
    found: dict[str, float] = {}
    for name, value in result.items():
        if isinstance(value, dict):
            found |= measured_numbers(value, f"{prefix}{name} ")
        elif type(value) in (int, float) and name not in FACTS and math.isfinite(value):
            found[prefix + name] = value
    return found


def read_results(outputs: list[str]) -> tuple[list[dict], dict[str, int]]:
    """(Readable records in the order of time, number of damaged lines by file)."""
    folders = [sorted(path.rglob("results.jsonl")) if path.is_dir() else [path] for path in map(Path, outputs)]
    if missing := [path for path in outputs if not Path(path).exists()]:
        raise FileNotFoundError(f"{missing[0]}: there is no such file; use an --output_dir or a file of --results")
    records: list[dict] = []
    damaged: dict[str, int] = {}
    for file in {file.resolve(): None for files in folders for file in files}:
        for line in file.read_text(errors="surrogateescape").splitlines():
            try:
                record = json.loads(line)
                row, column, seeds = split_record(record)
                found = {"row": row, "column": column, "seeds": seeds, "values": measured_numbers(record["result"])}
                records.append(found | {key: record[key] for key in ("time", "commit", "command")})
            except (ValueError, KeyError, TypeError, AttributeError):
                damaged[str(file)] = damaged.get(str(file), 0) + 1
    if not records:
        raise ValueError(f"{' '.join(outputs)}: no results; evaluate with --results FILE")
    return sorted(records, key=lambda record: record["time"]), damaged


def label_groups(groups: list[dict], kind: str, detail: str) -> list[str]:
    """Label of each group: its `kind`, `detail`, and the settings that differ among groups of this kind."""
    labels = []
    for group in groups:
        alike = [other for other in groups if other[kind] == group[kind]]
        differs = [key for key in group if len({json.dumps(other.get(key, "")) for other in alike}) > 1]
        words = [str(group[key]) for key in (kind, detail) if key in group]
        labels.append(" ".join(words + [f"{key}={group[key]}" for key in sorted(differs) if key not in (kind, detail)]))
    return labels


def average(values: list[dict]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value) and number of values."""
    x = [value["value"] for value in values]
    return {"mean": mean(x), "std": stdev(x) if len(x) > 1 else None, "n": len(x)}


def summarise(records: list[dict], difference: list[int]) -> dict:
    """Labels of rows and columns, cells, differences between two rows, and the number of superseded records."""
    rows, columns = ([*{json.dumps(x[s], sort_keys=True): x[s] for x in records}.values()] for s in ("row", "column"))
    rows.sort(key=lambda row: row["weights"] != "untrained")
    columns.sort(key=lambda column: (*ORDER, column["measure"]).index(column["measure"]))
    kept = {(rows.index(x["row"]), columns.index(x["column"]), *x["seeds"]): x for x in records}  # the newest
    values: dict[tuple[int, str, int], list[dict]] = {}
    for (row, column, *seeds), record in kept.items():
        for metric, value in record["values"].items():
            about = {"seeds": seeds, "value": value, "commit": record["commit"], "command": record["command"]}
            values.setdefault((column, metric, row), []).append(about)
    cells = [{"column": c, "metric": m, "row": r, **average(x), "values": x} for (c, m, r), x in sorted(values.items())]
    if not all(1 <= row <= len(rows) for row in difference):
        raise ValueError(f"--difference {difference}: the table has the rows 1 to {len(rows)}")
    differences = []
    a, b = (row - 1 for row in difference or (0, 0))  # rows count from 1 there
    for (column, metric, row), second in values.items():
        first = {str(x["seeds"]): x["value"] for x in values.get((column, metric, a), [])}
        pairs = [{"value": x["value"] - first[str(x["seeds"])]} for x in second if str(x["seeds"]) in first]
        if pairs and row == b:
            found = average(pairs)
            found["standard_error"] = None if found["std"] is None else found["std"] / math.sqrt(len(pairs))
            differences.append({"column": column, "metric": metric, "difference": found["mean"], **found})
    labels = {"rows": label_groups(rows, "weights", "model"), "columns": label_groups(columns, "measure", "data")}
    return labels | {"cells": cells, "differences": differences, "superseded": len(records) - len(kept)}


def table(lines: list[list[Any]]) -> str:
    """Markdown table with the first line as head; foreign text is escaped, None is empty."""
    text = [["" if x is None else f"{x:.4g}" if isinstance(x, float) else printable(x) for x in line] for line in lines]
    text = [[html.escape(x, quote=False).replace("|", "\\|").replace("`", "\\`") for x in line] for line in text]
    return "".join(f"| {' | '.join(line)} |\n" for line in (text[0], ["---"] * len(text[0]), *text[1:]))


def markdown(found: dict) -> str:
    """Tables of the results and of the differences, the commands, and what was left out."""
    shown = [cell for cell in found["cells"] if not NOT_SHOWN & {*cell["metric"].split()}]
    names = {(x["column"], x["metric"]): f"{found['columns'][x['column']]}: {x['metric']}" for x in shown}
    texts = {}
    for x in shown:
        spread = "" if x["std"] is None else f" ± {x['std']:.2g} (n={x['n']})"
        texts[x["row"], x["column"], x["metric"]] = f"{x['mean']:.4g}{spread}"
    lines = [[str(i + 1), row, *(texts.get((i, *key)) for key in names)] for i, row in enumerate(found["rows"])]
    parts = [table([["row", "checkpoint", *names.values()], *lines])]
    if found["differences"]:
        compared = [x for x in found["differences"] if (x["column"], x["metric"]) in names]
        lines = [[names[x["column"], x["metric"]], x["difference"], x["standard_error"], x["n"]] for x in compared]
        parts.append(table([["measure", "difference", "standard error", "pairs of seeds"], *lines]))
    commands: dict[tuple[str, str], dict[str, None]] = {}  # (command, commit) -> what it measured
    for x in found["cells"]:
        for value in x["values"]:
            about = f"row {x['row'] + 1}, {found['columns'][x['column']]}, seeds {value['seeds']}"
            commands.setdefault((shlex.join(value["command"]), value["commit"]), {})[about] = None
    code = [(f"# commit {commit}: {'; '.join(about)}", command) for (command, commit), about in commands.items()]
    parts.append("\n".join(["```bash", *(printable(line) for pair in code for line in pair), "```\n"]))
    notes = [f"{file}: {count} damaged lines are left out" for file, count in found["damaged"].items()]
    if found["superseded"]:
        notes.append(f"{found['superseded']} results are left out: newer ones have the same row, column and seeds")
    return "\n".join([*parts, *map(printable, notes)])


def main() -> None:
    args = get_parser().parse_args()
    records, damaged = read_results(args.outputs)
    found = summarise(records, args.difference or []) | {"damaged": damaged}
    print(json.dumps(found, indent=2) if args.json else markdown(found))


if __name__ == "__main__":
    run_main(main)
