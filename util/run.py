"""A run: ranks joined, output folder prepared, configuration recorded.

OUTPUT_DIR holds
    config.json             arguments, command, versions, commit; written at every start
    changes.diff            uncommitted changes of tracked files and new modules, if there are any (git apply)
    log.jsonl               one JSON object per log line and evaluation
    tensorboard/            the same numbers, and pictures
    last.pth                newest checkpoint
    previous.pth            the one before it
    epoch-NNNN.pth          kept every --save_every epochs and at the end
    bad_images.txt          unreadable images, replaced in training, left out of evaluations (--on_bad_image skip)
    classifier.pth          the trained classifier (probe and fine-tuning)
    segmenter.pth           the trained segmenter
    results.jsonl           results and their origin, for util.report
    train_list.txt          training images that --train_fraction or --train_list selected
    untrained/              run of the untrained control of main_segment.py --finetune
    last.pth.damaged        a checkpoint whose checksum was wrong, set aside on resume
    debug-STEP.pth          batch and weights of one step (debug_step.py)
    .lock                   held while a process writes here
"""

import os
import socket
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torchvision

from util.dist import World, cpu_has_bf16, init_world
from util.files import read_json, write_atomic, write_json
from util.log import Log
from util.lr_sched import warmup_cosine


class Run(NamedTuple):
    args: Namespace  # with the defaults that are read from data or --checkpoint; what is derived from them follows
    world: World
    log: Log
    folder: Path
    batch_size: int  # images per rank and forward pass
    accum_iter: int  # forward passes per step
    lr: float  # peak learning rate, the largest of several --blr
    resume: str = "auto"  # --resume, or auto for a restart of the same command
    origin: str | None = None  # SHA-256 of the --checkpoint that the run started from

    @property
    def batch(self) -> int:
        """Images of a step over all ranks."""
        return self.batch_size * self.accum_iter * self.world.size

    def lr_at(self, epoch: float) -> float:
        """Learning rate at a fractional epoch."""
        args = self.args
        return warmup_cosine(epoch, self.lr, args.min_lr, args.warmup_epochs, args.epochs)

    def close(self) -> None:
        """Close the log and the process group."""
        self.log.close()
        self.world.close()


def is_due(every: int, epochs_done: int, epochs: int) -> bool:
    """True if something that happens every `every` epochs (0 = never) and after the last one is due."""
    return every > 0 and (epochs_done % every == 0 or epochs_done == epochs)


def peak_lr(blr: float, batch: int) -> float:
    """Peak learning rate: --blr is for 256 images (linear scaling rule)."""
    return blr * batch / 256


def args_to_dict(args: Namespace) -> dict:
    """Arguments as JSON and checkpoints store them, tuples as lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(args).items()}


def git(*command: str) -> bytes:
    """Output of git in this repository; empty if there is no git or no repository."""
    with suppress(OSError):
        # safe.directory: a checkout may belong to another user
        words = ["git", "-c", "safe.directory=*", *command]
        return subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, check=False).stdout
    return b""


@cache  # of the code that was started, also if the checkout changes later
def versions() -> dict:
    """Commit of this code and versions of the libraries."""
    libraries = {module.__name__: module.__version__ for module in (torch, torchvision, timm)}
    commit = git("describe", "--always", "--dirty", "--abbrev=12").decode().strip() or None
    return {"commit": commit, "python": sys.version.split()[0], **libraries}


def uncommitted_changes() -> bytes:
    """Patch for `git apply` with the changes of tracked files and with the new modules that scripts can import."""
    options = ("diff", "--binary", "--no-ext-diff", "--no-color")
    modules = (":(glob)*.py", ":(glob)util/**/*.py")
    new = git("ls-files", "--others", "--exclude-standard", "-z", *modules).split(b"\0")[:-1]
    added = [git(*options, "--no-index", os.devnull, os.fsdecode(name)) for name in new]
    return b"".join([git(*options, "HEAD"), *added])


def split_effective_batch(effective: int, batch_size: int, ranks: int) -> tuple[int, int]:
    """(images per forward pass, at most `batch_size`; forward passes) of each rank for `effective` images per step."""
    per_rank, rest = divmod(effective, ranks)
    if rest:
        raise ValueError(f"--effective_batch {effective} is not divisible by {ranks} ranks; use a multiple of {ranks}")
    passes = next(n for n in range(-(-per_rank // batch_size), per_rank + 1) if per_rank % n == 0)
    return per_rank // passes, passes


def launcher_ids() -> dict[str, str]:
    """Ids of the launchers that may restart this command by themselves: torchrun after a failure, Slurm after a requeue."""
    found, environ = {}, os.environ
    if "TORCHELASTIC_RUN_ID" in environ:
        name = environ["TORCHELASTIC_RUN_ID"]
        found["torchrun"] = name if name != "none" else f"{socket.gethostname()} {os.getppid()}"
    if "SLURM_JOB_ID" in environ:
        found["slurm"] = environ["SLURM_JOB_ID"]
    return found


def read_config(folder: Path) -> dict:
    """Content of config.json in the output folder of a run; {} if it is missing or damaged."""
    with suppress(OSError, ValueError):
        return read_json(folder / "config.json")
    return {}


def is_restart(folder: Path) -> bool:
    """True if a launcher has restarted the command that began the run in this folder."""
    written = read_config(folder).get("jobs", {})
    now = launcher_ids()
    if not int(os.environ.get("SLURM_RESTART_COUNT", 0)):  # one allocation may run several commands
        now.pop("slurm", None)
    return any(written.get(launcher) == name for launcher, name in now.items())


def start_run(args: Namespace, world: World | None = None) -> Run:
    """Join the ranks unless they have joined in `world`, check OUTPUT_DIR, seed the initial weights."""
    world = world or init_world(args.device, args.amp, args.timeout_minutes)
    batch_size, accum_iter = args.batch_size, args.accum_iter
    if args.effective_batch:
        batch_size, accum_iter = split_effective_batch(args.effective_batch, batch_size, world.size)
    folder = Path(args.output_dir)
    restarted = world.gather(world.is_main and is_restart(folder))[0]
    blr = max(args.blr) if isinstance(args.blr, list) else args.blr
    lr = peak_lr(blr, batch_size * accum_iter * world.size)
    if getattr(args, "lr_scale_by_prediction", False):
        lr *= (args.predict_ratio or args.mask_ratio) / args.mask_ratio
    resume, origin = "auto" if restarted else args.resume, getattr(args, "origin", None)
    log, sha = Log(folder, world.is_main), origin and origin["sha256"]
    run = Run(args, world, log, folder, batch_size, accum_iter, lr, resume, sha)
    if args.min_lr > run.lr:
        raise ValueError(f"--min_lr {args.min_lr:g} is above the peak learning rate {run.lr:.3g} (--blr x batch / 256)")
    if world.is_main:
        prepare_folder(run)
    world.barrier()  # no rank looks for checkpoints before the folder is ready
    torch.manual_seed(args.seed)
    if args.amp == "bf16" and world.device.type == "cpu" and not cpu_has_bf16():
        run.log.info("warning: --amp bf16: this CPU is not known to support bfloat16; without it --amp off is faster")
    if args.warmup_epochs >= args.epochs:
        flags = f"--warmup_epochs {args.warmup_epochs:g} is not below --epochs {args.epochs}"
        run.log.info(f"warning: {flags}: the learning rate never decays")
    run.log.info(
        f"{world.size} x {world.device}, effective batch {run.batch} ({batch_size} x {accum_iter} x {world.size}), "
        f"peak learning rate {run.lr:.3g}, output in {folder}"
    )
    return run


def prepare_folder(run: Run) -> None:
    """Create OUTPUT_DIR; ValueError if it is not writable or holds a run that --resume none would replace."""
    folder = run.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be created: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output_dir {folder} is not writable; choose another folder")
    checkpoints = [path for name in ("last.pth", "previous.pth", "epoch-*.pth") for path in folder.glob(name)]
    if run.resume == "none" and checkpoints and not run.args.overwrite:
        raise ValueError(f"--resume none: {folder} holds a run; choose another --output_dir, or add --overwrite")


def write_config(run: Run) -> None:
    """Write config.json, and changes.diff if the code has uncommitted changes or new modules."""
    device = run.world.device
    config = {
        "args": args_to_dict(run.args), "command": [Path(sys.executable).name, *sys.argv], "world_size": run.world.size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "jobs": launcher_ids(),
        "batch_size": run.batch_size, "accum_iter": run.accum_iter, "batch": run.batch, "lr": run.lr,
        "origin": run.origin, **versions(),
    }  # fmt: skip
    write_json(run.folder / "config.json", config)
    if changes := uncommitted_changes():
        write_atomic(run.folder / "changes.diff", changes)
    else:
        (run.folder / "changes.diff").unlink(missing_ok=True)
