"""Benchmark of scaling: seconds of a main_pretrain.py step on one and on several ranks. `python -m benchmarks.ranks`

Each rank has the same batch size and one thread, so the ideal ratio is 1. The time of a run is the median of its steps
after the first, from log.jsonl. A ratio is the median over the rounds of the time on several ranks / the time on one.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.loading import synthesise
from benchmarks.results import add_append_argument, append, spread
from util.args import Parser, number, run_main


def step_seconds(args, ranks: int) -> float:
    """Median time of --steps steps after the first one."""
    batch = args.batch_size * ranks
    with TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        synthesise(images, batch * (args.steps + 1))
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "main_pretrain.py"]
        words += ["--data_path", images, "--output_dir", folder, "--model", args.model, "--amp", args.amp]
        words += ["--epochs", 1, "--batch_size", args.batch_size, "--log_every", 1]
        words += ["--image_every", 0, "--num_workers", 1]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *map(str, words)], env=environment, check=True, stdout=subprocess.DEVNULL)
        records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        rates = [record["images_per_s"] for record in records if "images_per_s" in record]
    return batch / median(rates[1:])


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("Measure the time of a training step on one rank and on several.")
    add = parser.add_argument
    add("--ranks", type=number(int, 2), default=2, help="number of ranks to compare with one")
    add("--model", default="vit_base", help="encoder, as for main_pretrain.py")
    add("--amp", choices=["bf16", "off"], default="bf16", help="precision of the model; off = float32")
    add("--batch_size", type=number(int, 1), default=8, help="images per rank and step")
    add("--steps", type=number(int, 3), default=8, help="timed steps of a run")
    add("--rounds", type=number(int, 1), default=3, help="runs with each number of ranks")
    add_append_argument(parser)
    return parser


def main() -> None:
    args = get_parser().parse_args()
    torch.set_num_threads(1)
    rounds = [{ranks: step_seconds(args, ranks) for ranks in (1, args.ranks)} for _ in range(args.rounds)]
    alone, together = (median(found[ranks] for found in rounds) for ranks in (1, args.ranks))
    low, middle, high = spread([found[args.ranks] / found[1] for found in rounds])
    lines = [f"1 rank {alone:.3g} s, {args.ranks} ranks {together:.3g} s; {middle:.3f} ({low:.3f} to {high:.3f})"]
    print(*lines)
    append(args.append, "ranks", torch.device("cpu"), lines)


if __name__ == "__main__":
    run_main(main)
