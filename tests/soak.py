"""Soak test: interrupt runs at random and compare them with uninterrupted runs: `python -m tests.soak --data_path DIR`.

DIR has train/<class>/ and val/<class>/. Each interrupted run is restarted with its own command; at the end weights, optimiser,
log and TensorBoard are compared bit for bit. As root it also fills a tmpfs. Exits with status 1 if anything differs.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.conftest import DEVICE, ROOT, assert_same_run, records
from util.checkpoint.state import read_checkpoint

TINY = ["--model", "vit_tiny", "--patch_size", 8, "--input_size", 32, *DEVICE, "--num_workers", 1, "--log_every", 3]
PRETRAIN = [
    *TINY,
    "--decoder_dim",
    32,
    "--decoder_depth",
    1,
    "--decoder_heads",
    2,
    "--warmup_epochs",
    1,
    "--save_every",
    2,
]
SAVES = ["--save_minutes", 0.01]
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: random.randrange(len(content))],
    "zeroed tail": lambda content: content[: (cut := random.randrange(len(content)))] + bytes(len(content) - cut),
    "bit flipped": lambda content: (
        content[: (at := random.randrange(len(content)))] + bytes([content[at] ^ 8]) + content[at + 1 :]
    ),
    "emptied": lambda content: b"",
}


PROJECT_FRAME = re.compile(rf'File "{ROOT}/(?!\.venv)')  # traceback line of a file of this project


class Breaker:
    """Runs a command, interrupts it and checks how it resumes."""

    def __init__(self) -> None:
        self.breaks: Counter[str] = Counter()
        self.recoveries: list[float] = []  # seconds from start to the end of the first step
        self.lost = 0  # steps between the newest valid checkpoint and the resume point

    def start(self, command: list) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="surrogateescape", start_new_session=True,
        )  # fmt: skip

    def read_until(self, process: subprocess.Popen, text: str) -> bool:
        """Read output up to a line with this text; False if the process ends first."""
        assert process.stdout
        for line in process.stdout:
            self.output.append(line)
            if line.startswith("resumed from"):
                self.resumed = line
            if text in line:
                return True
        return False

    def drain(self, process: subprocess.Popen) -> int:
        self.read_until(process, "\0")
        return process.wait()

    def run(self, command: list, folder: Path, kind: str | None, interrupt: Callable[[subprocess.Popen], Any]) -> int:
        """Exit status of the command, interrupted before its first step or up to 2.5 s after it."""
        before, self.resumed, self.output = saved_steps(folder), "", list[str]()
        began = time.monotonic()
        process = self.start(command)
        if kind and random.random() < 0.15:
            time.sleep(random.uniform(0, 5))
        elif self.read_until(process, "first step:"):
            self.recoveries.append(time.monotonic() - began)
            self.check_start(before)
            time.sleep(random.uniform(0, 2.5) if kind else 0)
        if kind and process.poll() is None:
            interrupt(process)
            self.breaks[kind] += 1
        return self.drain(process)

    def check_start(self, before: int) -> None:
        """Add the steps between the newest valid checkpoint and the resume point to `lost`."""
        found = 0
        if self.resumed:
            words = self.resumed.replace(",", "").split()  # ... epoch E of N, S of M steps done
            at = len(words) - words[::-1].index("epoch") - 1
            found = (int(words[at + 1]) - 1) * int(words[at + 6]) + int(words[at + 4])
        self.lost += max(0, before - found)

    def check_exit(self, status: int, *expected: int) -> None:
        if status not in expected:
            sys.exit(f"exit status {status}, not {expected}:\n{''.join(self.output[-20:])}")
        if any(PROJECT_FRAME.search(line) for line in self.output):  # not of orphaned loader workers or torchrun
            sys.exit(f"a traceback:\n{''.join(self.output[-40:])}")


def saved_steps(folder: Path) -> int:
    """Steps of the newest valid checkpoint of a run."""
    for name in ("last.pth", "previous.pth", *sorted((path.name for path in folder.glob("epoch-*.pth")), reverse=True)):
        if (folder / name).exists():
            try:
                content = read_checkpoint(folder / name)
            except ValueError:
                continue
            return content["progress"]["epoch"] * content["steps"] + content["progress"]["step"]
    return 0


def send(number: int) -> Callable[[subprocess.Popen], None]:
    return lambda process: process.send_signal(number)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks of a torchrun."""
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    return [int(pid) for pid in children if b"main_pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def one_rank(breaker: Breaker, command: list, disk: Path, images: Path, kills: int) -> None:
    """Interrupt a run on one rank in every way, in random order, then let it finish."""
    folder = disk / "run"
    kinds = ["SIGKILL"] * 3 + ["SIGTERM", "SIGUSR1", "full disk", "images vanish", "deleted", *DAMAGES]
    for kind in random.choices(kinds, k=kills) if kills > len(kinds) else random.sample(kinds, kills):
        status: tuple[int, ...] = (-9,)
        if kind in ("SIGTERM", "SIGUSR1"):
            status = 75, -signal.Signals[kind]  # negative: before its handler is installed
            action = send(signal.Signals[kind])
        elif kind == "full disk":
            action = lambda process: fill(process, disk)  # noqa: E731
        elif kind == "images vanish":
            status, action = (1, 0, -9), lambda process: vanish(process, images)
        else:
            action = send(signal.SIGKILL)
        breaker.check_exit(breaker.run([*command, "--output_dir", folder], folder, kind, action), 0, *status)
        last = folder / "last.pth"
        if kind in DAMAGES and last.exists():
            last.write_bytes(DAMAGES[kind](last.read_bytes()))
        if kind == "deleted":
            last.unlink(missing_ok=True)
    breaker.check_exit(breaker.run([*command, "--output_dir", folder], folder, None, send(0)), 0)


def fill(process: subprocess.Popen, disk: Path) -> None:
    """Fill the disk for three seconds; kill the process before or after space is freed."""
    with suppress(OSError):  # the run also writes
        (disk / "filler").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 2**20)))
    time.sleep(3)
    if random.random() < 0.5:
        process.kill()
    (disk / "filler").unlink()
    time.sleep(2)
    process.kill()


def vanish(process: subprocess.Popen, images: Path) -> None:
    """Move a class folder away for two seconds, then kill the process."""
    (away := images / "away").mkdir(exist_ok=True)
    gone = random.choice(sorted((images / "train").iterdir()))
    gone.rename(away / gone.name)
    time.sleep(2)
    (away / gone.name).rename(gone)
    away.rmdir()
    process.kill()


def two_ranks(breaker: Breaker, command: list, folder: Path, kills: int) -> None:
    """Kill or stop ranks under torchrun, which restarts them."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={kills + 5}"]
    breaker.output = []
    process = breaker.start([*torchrun, *command, "--output_dir", folder])
    for turn in range(kills):
        before = saved_steps(folder)
        if not breaker.read_until(process, "first step:"):
            break
        if turn:
            breaker.check_start(before)
        time.sleep(random.uniform(0, 2.5))
        victims = ranks_of(process)
        if len(victims) == 2:
            kind = random.choice([signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
            os.kill(random.choice(victims), kind)
            breaker.breaks[f"one of two ranks: {kind.name}"] += 1
    breaker.check_exit(breaker.drain(process), 0)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True, help="folder with train/<class>/ and val/<class>/")
    parser.add_argument(
        "--kills", type=int, default=40, help="interruptions of the run on one rank; a quarter as many on two ranks"
    )
    parser.add_argument("--epochs", type=int, default=12, help="epochs of pre-training")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    images, disk = work / "images", work / "disk"
    for split, count in (("train", 60), ("val", 5)):  # images per class
        for kind in sorted((args.data_path / split).iterdir()):
            (images / split / kind.name).mkdir(parents=True)
            for path in sorted(kind.iterdir())[:count]:
                shutil.copy(path, images / split / kind.name)
    disk.mkdir()
    size = f"size={400 + 35 * args.epochs}m"  # a checkpoint takes 65 MB; every second epoch is kept
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", disk], check=False).returncode == 0
    if not mounted:
        print("warning: no permission to mount a tmpfs: the disk of the temporary folder is filled instead")
    try:
        report = soak(args, images, disk, work)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", disk], check=True)
    shutil.rmtree(work)
    print(json.dumps(report))
    sys.exit(1 if report["steps_lost_beyond_the_last_save"] else 0)


def soak(args, images: Path, disk: Path, work: Path) -> dict:
    """Run all phases; return counts of interruptions, lost steps and recovery times."""
    breaker = Breaker()
    data = ["--data_path", images]
    train = [
        "main_pretrain.py",
        *PRETRAIN,
        *data,
        "--batch_size",
        16,
        "--epochs",
        args.epochs,
        "--image_every",
        2,
        "--knn_every",
        3,
    ]

    def run_uninterrupted(command: list, folder: str, ranks: int = 1) -> Path:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        process = breaker.start([*torchrun, *command, "--output_dir", work / folder])
        breaker.output = []
        breaker.check_exit(breaker.drain(process), 0)
        return work / folder

    alone = run_uninterrupted(train, "alone")
    one_rank(breaker, [*train, *SAVES], disk, images, args.kills)
    assert_same_run(alone, disk / "run")
    print(f"one rank: {sum(breaker.breaks.values())} interruptions, no difference", flush=True)

    shared = [*train, "--effective_batch", 16, "--epochs", max(2, args.epochs // 3), "--timeout_minutes", 0.15]
    together = run_uninterrupted(shared, "together", ranks=2)
    two_ranks(breaker, [*shared, *SAVES], work / "broken", args.kills // 4)
    assert_same_run(together, work / "broken")
    losses = [[x["loss"] for x in records(folder)] for folder in (together, run_uninterrupted(shared, "one"))]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)
    print("two ranks: no difference; relative to one rank with the same batch below 1e-5", flush=True)

    weights = ["--checkpoint", alone / "last.pth", *DEVICE, "--num_workers", 1, "--batch_size", 32, "--log_every", 3]
    for name, epochs in (("main_finetune", 3), ("main_linprobe", 6)):
        command = [f"{name}.py", *weights, *data, "--epochs", epochs, "--warmup_epochs", 1]
        reference = run_uninterrupted(command, name)
        for _ in range(3):
            status = breaker.run([*command, *SAVES, "--output_dir", work / "c"], work / "c", name, send(signal.SIGKILL))
            breaker.check_exit(status, -9, 0)
        breaker.check_exit(breaker.run([*command, *SAVES, "--output_dir", work / "c"], work / "c", None, send(0)), 0)
        assert_same_run(reference, work / "c")
        shutil.rmtree(work / "c")
        print(f"{name}: no difference", flush=True)
    seconds = sorted(breaker.recoveries)
    return {
        "breaks": dict(breaker.breaks),
        "total": sum(breaker.breaks.values()),
        "steps_lost_beyond_the_last_save": breaker.lost,
        "seconds_to_recover": [round(x, 1) for x in (seconds[0], median(seconds), seconds[-1])],
    }


if __name__ == "__main__":
    main()
