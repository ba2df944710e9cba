"""From arguments to a run: the ranks joined, the folder prepared, the configuration written."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torchvision

from util.dist import World, cpu_has_bf16, init_world
from util.log import Log
from util.lr_sched import warmup_cosine


class Run(NamedTuple):
    args: Namespace
    world: World
    log: Log
    folder: Path
    batch: int  # samples of a step over all ranks
    lr: float  # peak learning rate, the largest of several --blr
    origin: str | None = None  # digest of the --checkpoint that the run began with

    def lr_at(self, epoch: float) -> float:
        """Learning rate at a fractional epoch."""
        args = self.args
        return warmup_cosine(epoch, self.lr, args.min_lr, args.warmup_epochs, args.epochs)

    def close(self) -> None:
        """End of a run that went well."""
        self.log.close()
        self.world.close()


def peak_lr(blr: float, batch: int) -> float:
    """Learning rate of a batch: --blr is for 256 samples (linear scaling rule)."""
    return blr * batch / 256


def args_to_dict(args: Namespace) -> dict:
    """Arguments as JSON and a safe checkpoint know them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(args).items()}


def versions() -> dict:
    """Versions of what computes, and the commit of this code where git knows it."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = None
    with suppress(OSError):  # no git on this machine
        git = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    return {
        "commit": commit,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def digest(path: str | None) -> str | None:
    """SHA-256 of a file, so that a run knows the weights it began with; None where there is no file."""
    if path in (None, "none"):
        return None
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_effective_batch(args: Namespace, ranks: int) -> None:
    """Set --batch_size and --accum_iter so that a step has --effective_batch images on this number of ranks."""
    each, rest = divmod(args.effective_batch, ranks)
    if rest:
        raise ValueError(f"--effective_batch {args.effective_batch} cannot be divided among {ranks} ranks")
    parts = range(-(-each // args.batch_size), each + 1)  # --batch_size is the most that a forward pass holds
    args.accum_iter = next(count for count in parts if each % count == 0)
    args.batch_size = each // args.accum_iter


def jobs() -> dict[str, str]:
    """Who may start this command again by itself: torchrun after a rank was lost, Slurm after the job was."""
    found, environ = {}, os.environ
    if "TORCHELASTIC_RUN_ID" in environ:
        name = environ["TORCHELASTIC_RUN_ID"]
        found["torchrun"] = name if name != "none" else f"{socket.gethostname()} {os.getppid()}"
    if "SLURM_JOB_ID" in environ:
        found["slurm"] = environ["SLURM_JOB_ID"]
    return found


def is_restart(folder: Path) -> bool:
    """True where this command was started again and has begun the run in the folder before."""
    try:
        written = json.loads((folder / "config.json").read_text())["jobs"]
    except (OSError, ValueError, KeyError):
        return False
    now = jobs()
    if not int(os.environ.get("SLURM_RESTART_COUNT", 0)):  # in one allocation several commands may be given
        now.pop("slurm", None)
    return any(written.get(kind) == name for kind, name in now.items())


def start(args: Namespace) -> Run:
    """Join the ranks, see that OUTPUT_DIR can be written, seed the initial values."""
    world = init_world(args.device, args.amp, args.timeout_minutes)
    if args.effective_batch:
        split_effective_batch(args, world.size)
    folder = Path(args.output_dir)
    if world.gather(world.is_main and is_restart(folder))[0]:
        args.resume = "auto"  # whatever the command says: it began this run
    batch = args.batch_size * args.accum_iter * world.size
    blr = max(args.blr) if isinstance(args.blr, list) else args.blr
    origin = digest(getattr(args, "checkpoint", None))
    run = Run(args, world, Log(folder, world.is_main), folder, batch, peak_lr(blr, batch), origin)
    if args.min_lr > run.lr:
        raise ValueError(
            f"--min_lr {args.min_lr:g} is above the peak learning rate, {run.lr:.3g} (--blr x batch / 256)"
        )
    if world.is_main:
        prepare(run)
    world.gather(None)  # nobody looks for checkpoints before the folder is ready
    torch.manual_seed(args.seed)
    if args.amp == "bf16" and world.device.type == "cpu" and not cpu_has_bf16():
        run.log.info(
            "warning: this processor is not known to have bfloat16 instructions; without them --amp off is faster"
        )
    if args.warmup_epochs >= args.epochs:
        run.log.info(
            f"warning: --warmup_epochs {args.warmup_epochs:g} of --epochs {args.epochs}: the learning rate never falls"
        )
    run.log.info(
        f"{world.size} x {world.device}, {batch} samples a step, peak learning rate {run.lr:.3g}, output in {folder}"
    )
    return run


def prepare(run: Run) -> None:
    args, folder = run.args, run.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output_dir {folder} is not writable")
    held = [path for name in ("last.pth", "previous.pth", "epoch-*.pth") for path in folder.glob(name)]
    if args.resume == "none" and held and not args.overwrite:
        raise ValueError(f"--resume none: {folder} holds a run; choose another --output_dir, or add --overwrite")


def configuration(run: Run) -> dict:
    """What config.json tells."""
    args = run.args
    return {
        "args": args_to_dict(args),
        "command": [Path(sys.executable).name, *sys.argv],
        "world_size": run.world.size,
        "device": torch.cuda.get_device_name() if run.world.device.type == "cuda" else "cpu",
        "jobs": jobs(),
        "batch": run.batch,
        "lr": run.lr,
        **versions(),
    }
