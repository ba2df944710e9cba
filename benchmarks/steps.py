"""Benchmark of training steps with other flags or of other commits. `python -m benchmarks.steps "FLAGS" "FLAGS" ...`

Each variant is a process with flags of benchmarks.throughput, in this checkout or, after `DIR:`, in another one. They do
one step each in a round, one after another, in rotating order. Seconds are CPU time (user and system) of one thread, which
other work on the machine changes least. A ratio is the median over the rounds of seconds / seconds of the first variant.
"""

import argparse
import os
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.results import add_append_argument, append, spread
from util.args import Parser, number, run_main

# Any commit's benchmarks.throughput, but it times only `ours`, once for each line that it reads.
SERVER = """
import sys, time
from benchmarks import throughput

def measure(steps, batch, rounds):
    for _ in sys.stdin:
        start = time.process_time()
        steps["ours"](batch)
        print(time.process_time() - start, flush=True)
    sys.exit()

throughput.measure = measure
throughput.all_steps = lambda args, model, normalize: {"ours": throughput.our_step(args, normalize, model)}
throughput.main()
"""


def start(variant: str) -> Any:
    """Process that does a step for each line on stdin and prints its seconds."""
    other, _, flags = variant.rpartition(":")
    folder = Path(other).resolve() if other else Path(__file__).parents[1]
    command = [sys.executable, "-c", SERVER, "--device", "cpu", *shlex.split(flags)]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)


def step_seconds(process: Any) -> float:
    process.stdin.write("\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise ValueError(f"this variant stopped, see above: {shlex.join(process.args[5:])}")
    return float(line)


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("Measure the time of training steps of several variants, on a CPU.")
    add = parser.add_argument
    text = "flags of benchmarks.throughput, in quotes; DIR = another checkout"
    add("variants", nargs="+", metavar="[DIR:]FLAGS", help=text)
    add("--rounds", type=number(int, 1), default=7, help="timed steps of each variant, after two that are not timed")
    add_append_argument(parser)
    return parser


def main() -> None:
    args = get_parser().parse_args()
    torch.set_num_threads(1)  # for the row of RESULTS.md
    with ExitStack() as stack:
        processes = [stack.enter_context(start(variant)) for variant in args.variants]
        stack.callback(lambda: [process.stdin.close() for process in processes])
        times = []
        for turn in range(args.rounds + 2):
            order = [(turn + i) % len(processes) for i in range(len(processes))]
            found = {i: step_seconds(processes[i]) for i in order}
            times.append([found[i] for i in range(len(processes))])
    lines = []
    for name, own in zip(args.variants, zip(*times[2:], strict=True), strict=True):
        low, middle, high = spread([t / first[0] for t, first in zip(own, times[2:], strict=True)])
        lines.append(f"`{name}` {median(own):.3g} s; {middle:.3f} ({low:.3f} to {high:.3f})")
    print(*lines, sep="\n")
    append(args.append, "steps", torch.device("cpu"), lines)


if __name__ == "__main__":
    run_main(main)
