"""From arguments to a run: the ranks joined, the folder prepared, the configuration written."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torchvision

from util.dist import World, join
from util.log import Log
from util.lr_sched import warmup_cosine


class Run(NamedTuple):
    args: Namespace
    world: World
    log: Log
    folder: Path
    batch: int  # samples of a step over all ranks
    lr: float  # peak learning rate, the largest of several --blr

    def lr_at(self, epoch: float) -> float:
        """Learning rate at a fractional epoch."""
        args = self.args
        return warmup_cosine(epoch, self.lr, args.min_lr, args.warmup_epochs, args.epochs)

    def close(self) -> None:
        """End of a run that went well."""
        self.log.close()
        self.world.leave()


def peak_lr(blr: float, batch: int) -> float:
    """Learning rate of a batch: --blr is for 256 samples (linear scaling rule)."""
    return blr * batch / 256


def plain(args: Namespace) -> dict:
    """Arguments as JSON and a safe checkpoint know them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(args).items()}


def versions() -> dict:
    """Versions of what computes, and the commit of this code where git knows it."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "commit": git.stdout.strip() or None,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def check_precision(amp: str, device: torch.device) -> None:
    """Refuse a precision that the device has not."""
    if amp == "fp16" and device.type != "cuda":
        raise ValueError(f"--amp fp16 needs a GPU, and the device is {device}; use --amp bf16 or off")
    if amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("--amp bf16: this GPU has no bfloat16; use --amp fp16 or off")


def start(args: Namespace) -> Run:
    """Join the ranks, prepare OUTPUT_DIR, write config.json, seed the initial values."""
    world = join(args.device)
    check_precision(args.amp, world.device)
    folder = Path(args.output_dir)
    batch = args.batch_size * args.accum_iter * world.size
    blr = max(args.blr) if isinstance(args.blr, list) else args.blr
    run = Run(args, world, Log(folder, world.leads), folder, batch, peak_lr(blr, batch))
    if world.leads:
        prepare(run)
    world.gather(None)  # nobody looks for checkpoints before the folder is ready
    torch.manual_seed(args.seed)
    run.log.say(
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
    if args.resume == "none":
        if (folder / "last.pth").exists() and not args.overwrite:
            raise ValueError(f"--resume none: {folder} holds a run; choose another --output_dir, or add --overwrite")
        for old in [*folder.glob("epoch-*.pth"), folder / "last.pth", folder / "log.jsonl", folder / "bad_images.txt"]:
            old.unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    config = {
        "args": plain(args),
        "command": [Path(sys.executable).name, *sys.argv],
        "world_size": run.world.size,
        "device": torch.cuda.get_device_name() if run.world.device.type == "cuda" else "cpu",
        "batch": run.batch,
        "lr": run.lr,
        **versions(),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
