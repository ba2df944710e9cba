"""Rows of RESULTS.md, the append-only table of benchmark results."""

import platform
import re
import shlex
import sys
from argparse import ArgumentParser
from datetime import date
from pathlib import Path
from statistics import median

import torch

from util.run import versions

TABLE = "| date | commit | machine | command | result |\n| --- | --- | --- | --- | --- |\n"


def describe_machine(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model[1] if model else platform.processor()}, {torch.get_num_threads()} threads"


def add_append_argument(parser: ArgumentParser) -> None:
    """Flag of the table of results."""
    text = "Markdown table to which a row of each result is added (default: none)"
    parser.add_argument("--append", type=Path, metavar="FILE", help=text)


def append(path: Path | None, name: str, device: torch.device, lines: list[str]) -> None:
    """Add a row for the running command, `python -m benchmarks.<name>`, to a Markdown table; None = nowhere."""
    if path is None:
        return
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    row = [date.today().isoformat(), versions()["commit"], describe_machine(device), f"`{command}`", "; ".join(lines)]
    head = "" if path.exists() else TABLE
    with path.open("a") as file:
        file.write(f"{head}| {' | '.join(map(str, row))} |\n")


def spread(values: list[float]) -> tuple[float, float, float]:
    """(least, median, most)."""
    return min(values), median(values), max(values)
