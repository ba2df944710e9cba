"""Chart of pre-training runs from their log.jsonl: loss, gradient norm, kNN. `python -m util.plots.curves RUN... --output x.png`."""

import argparse
import json
from pathlib import Path

from PIL import Image

from util.args import Parser, picture, run_main
from util.plots.charts import plot, side_by_side

CHARTS = {
    "loss": "loss",
    "grad_norm": "norm of the gradient",
    "knn_acc1": "kNN, top-1 in %",
}


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders; a line is called what its folder is")
    parser.add_argument("--output", type=picture, required=True, help="the picture to write, .png or .jpg")
    return parser


def curve(folder: str, key: str) -> tuple[list[float], list[float]]:
    """(epochs, values) of what a run logged under a name."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such log; RUN is the --output_dir of a run")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    points = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]


def main() -> None:
    args = get_parser().parse_args()
    charts = []
    for key, heading in CHARTS.items():
        found = {Path(run).resolve().name: curve(run, key) for run in args.runs}
        lines = {name: points for name, points in found.items() if points[0]}
        if lines:
            values = [y for _, ys in lines.values() for y in ys]
            charts.append(plot(lines, heading, "epoch", log=0 < 30 * min(values) < max(values)))
    if not charts:
        raise ValueError(f"RUN {' '.join(args.runs)}: nothing of {', '.join(CHARTS)} is logged there")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(side_by_side(charts)).save(args.output)
    print(f"{args.output}: {len(args.runs)} runs")


if __name__ == "__main__":
    run_main(main)
