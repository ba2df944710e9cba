"""python -m util.plots.curves RUN... --output FILE.png: chart of pre-training runs: loss, gradient norm, kNN."""

import argparse
from pathlib import Path

import numpy as np

from util.args import Parser, picture, run_main
from util.log import read_records
from util.plots.charts import draw_lines
from util.plots.grids import save_picture

TITLES = {"loss": "loss", "grad_norm": "gradient norm", "knn_acc1": "kNN top-1 accuracy in %"}


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of runs; their names label the lines")
    parser.add_argument("--output", type=picture, required=True, help="picture to write, .png or .jpg")
    return parser


def read_curve(folder: str, key: str) -> tuple[list[float], list[float]]:
    """(epochs, values) of one key of a run's log.jsonl, without the records that lack it."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"RUN {folder}: {path} does not exist; RUN must be the --output_dir of a run")
    points = [(record["epoch"], record[key]) for record in read_records(path) if type(record.get(key)) in (int, float)]
    return [x for x, _ in points], [y for _, y in points]


def name_runs(runs: list[str]) -> list[str]:
    """The shortest ends of the paths that differ between all runs."""
    parts = [Path(run).resolve().parts for run in runs]
    length = next((n for n in range(1, max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts)), 0)
    return ["/".join(p[-length:]) if length else run for p, run in zip(parts, runs, strict=True)]


def main() -> None:
    args = get_parser().parse_args()
    charts, names = [], name_runs(args.runs)
    for key, title in TITLES.items():
        curves = {name: read_curve(run, key) for name, run in zip(names, args.runs, strict=True)}
        lines = {name: points for name, points in curves.items() if points[0]}
        if lines:
            values = [y for _, ys in lines.values() for y in ys]
            charts.append(draw_lines(lines, title, "epoch", log=0 < 30 * min(values) < max(values)))
    if not charts:
        raise ValueError(f"RUN {' '.join(args.runs)}: no {', '.join(TITLES)} in log.jsonl; wait for the first records")
    save_picture(args.output, np.concatenate(charts, axis=1))
    print(f"{args.output}: {len(args.runs)} runs")


if __name__ == "__main__":
    run_main(main)
