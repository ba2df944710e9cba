"""Where do numbers go? To RESULTS.md, a row each, which nobody edits."""

import platform
import re
import shlex
import sys
from datetime import date
from pathlib import Path
from statistics import median

import torch

from util.run import versions

TABLE = "| date | commit | machine | command | result |\n| --- | --- | --- | --- | --- |\n"


def machine(device: torch.device) -> str:
    """What computed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model[1] if model else platform.processor()}, {torch.get_num_threads()} threads"


def append(path: Path | None, name: str, device: torch.device, lines: list[str]) -> None:
    """Add a row for the command that runs, `python -m benchmarks.<name>`, if there is a file to add it to."""
    if path is None:
        return
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    row = [date.today().isoformat(), versions()["commit"], machine(device), f"`{command}`", "; ".join(lines)]
    head = "" if path.exists() else TABLE
    with path.open("a") as file:
        file.write(f"{head}| {' | '.join(map(str, row))} |\n")


def spread(values: list[float]) -> tuple[float, float, float]:
    """(least, median, most)."""
    return min(values), median(values), max(values)
