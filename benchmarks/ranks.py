"""What do more ranks bring? Seconds of a training step of main_pretrain.py on one rank and on several, in turn.

Each rank has the same batch and a thread of its own, so a ratio of 1 would be perfect. The median of the steps after the
first, from log.jsonl, is the time of a run; a ratio is the median over the rounds of time on several ranks / time on one.
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
from benchmarks.results import append, spread
from util.args import Parser, number, run_main


def step_seconds(args, ranks: int) -> float:
    """Median time of a step of an epoch of --steps steps after a first one."""
    batch = args.batch_size * ranks
    with TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        synthesise(images, batch * (args.steps + 1))
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "main_pretrain.py"]
        words += [
            "--data_path",
            images,
            "--output_dir",
            folder,
            "--model",
            args.model,
            "--amp",
            args.amp,
            "--epochs",
            1,
        ]
        words += ["--batch_size", args.batch_size, "--log_every", 1, "--image_every", 0, "--num_workers", 1]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *map(str, words)], env=environment, check=True, stdout=subprocess.DEVNULL)
        records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return batch / median(record["images_per_s"] for record in records[1:])


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("Time a training step on one rank and on several.")
    add = parser.add_argument
    add("--ranks", type=number(int, 2), default=2, help="how many they are")
    add("--model", default="vit_base", help="as of main_pretrain.py")
    add("--amp", choices=["bf16", "off"], default="bf16", help="precision")
    add("--batch_size", type=number(int, 1), default=8, help="images of a rank in a step")
    add("--steps", type=number(int, 3), default=8, help="steps of a run")
    add("--rounds", type=number(int, 1), default=3, help="runs of each")
    add("--append", type=Path, metavar="FILE", help="Markdown table that gets a row")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    torch.set_num_threads(1)
    rounds = [{ranks: step_seconds(args, ranks) for ranks in (1, args.ranks)} for _ in range(args.rounds)]
    alone, together = (median(found[ranks] for found in rounds) for ranks in (1, args.ranks))
    low, middle, high = spread([found[args.ranks] / found[1] for found in rounds])
    said = [f"1 rank {alone:.3g} s, {args.ranks} ranks {together:.3g} s; {middle:.3f} ({low:.3f} to {high:.3f})"]
    print(*said)
    append(args.append, "ranks", torch.device("cpu"), said)


if __name__ == "__main__":
    run_main(main)
