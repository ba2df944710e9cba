"""Which checkpoint a run resumes from, whether it belongs to this run, and loading it."""

import os
import shlex
import shutil
import socket
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from util.args import effective_args
from util.checkpoint.state import FORMAT_1, NotARun, read_checkpoint
from util.dist import World
from util.files import link_atomic, lock_file
from util.formats.keys import mae_names
from util.log import read_records
from util.run import Run, args_to_dict, read_config

# Flags that a resumed run may change: they affect where and how fast it runs, not what it computes.
FREE = {
    "checkpoint", "data_path", "val_path", "verbose_data", "output_dir", "resume", "overwrite", "num_workers", "device", "compile",
    "grad_checkpointing", "batch_size", "accum_iter", "effective_batch", "log_every", "save_every", "save_minutes", "on_full_disk",
    "image_every", "knn_every", "knn_path", "eval", "on_bad_image", "max_skipped", "timeout_minutes", "results", "origin", "untrained",
}  # fmt: skip


class Progress(NamedTuple):
    """Position of a run."""

    epoch: int  # current epoch, from 0
    step: int  # steps done in it; after the last one its evaluation follows
    losses: tuple[float, ...] = ()  # of the steps since the last log line, mean over the ranks; nan = skipped
    skipped: int = 0  # consecutive steps without an update, up to that log line

    def start_of(self, epoch: int) -> "Progress":
        """Where training of this epoch starts: here if it is the current epoch, else at its first step."""
        return self if epoch == self.epoch else Progress(epoch, 0, (), self.skipped)


def candidates(folder: Path, resume: str) -> list[Path]:
    """Checkpoints that --resume may refer to, the best first."""
    if resume == "none":
        return []
    if resume == "auto":
        permanent = sorted(folder.glob("epoch-*.pth"), reverse=True)
        return [path for path in (folder / "last.pth", folder / "previous.pth", *permanent) if path.exists()]
    if not Path(resume).is_file():
        raise FileNotFoundError(f"--resume {resume}: file not found; use auto, none or a checkpoint")
    return [Path(resume)]


def recorded_args(args: Namespace) -> dict:
    """Arguments in the config.json beside the checkpoint that this command resumes from; {} for a new run."""
    paths = candidates(Path(args.output_dir), args.resume)
    # if it is missing, values are decided anew and compared with the checkpoint (check_same_run)
    return read_config(paths[0].parent).get("args", {}) if paths else {}


def find_checkpoint(run: Run, steps: int, before: int | None = None) -> tuple[Path, dict, Progress] | None:
    """(file, content, progress) of the newest undamaged checkpoint; None for a new run.

    `steps`: steps of an epoch. `before`: only checkpoints saved before this step of the run, counted from 1.
    """
    damaged = []
    for path in candidates(run.folder, run.resume):
        try:
            content = read_checkpoint(path, mmap=run.world.size > 1)
            if "progress" not in content:
                raise NotARun(path)
        except ValueError as error:
            if run.resume != "auto" and isinstance(error, NotARun):
                raise ValueError(f"--resume {error}; to start from them use --checkpoint") from error
            damaged.append(path)
            run.log.info(f"warning: {error}; trying the checkpoint before it")
            continue
        progress = Progress(**{**content["progress"], "losses": tuple(content["progress"].get("losses", ()))})
        if content["format"] == FORMAT_1:  # saved after the epoch's evaluation, which is repeated
            progress = Progress(progress.epoch - 1, steps)
        if before is None or progress.epoch * steps + progress.step < before:
            return path, content, progress
    if damaged and before is None:
        names = " ".join(path.name for path in damaged)
        raise ValueError(
            f"--resume {run.resume}: damaged or foreign files in {damaged[0].parent}: {names}, and no other checkpoint; "
            "use --resume FILE with a copy, or --resume none --overwrite to start a new run"
        )
    return None


def describe_continuation(path: Path, run: Run) -> str:
    """The command that starts a new run from the weights of a checkpoint, for errors; of main_pretrain only."""
    if Path(sys.argv[0]).name != "main_pretrain.py":
        return "use the same value, or another --output_dir for a new run"
    words = [Path(sys.executable).name, *sys.argv, "--checkpoint", str(path), "--output_dir", f"{run.folder}_2"]
    return f"use the same value, or start a new run from its weights: {shlex.join(words)}"


def check_same_run(path: Path, content: dict, run: Run, data: list, steps: int) -> None:
    """ValueError if the checkpoint belongs to a run that computes something else: flags, batch, weights, images."""
    stated = (Namespace(**content["args"]), run.args)
    before, now = (args_to_dict(Namespace(**effective_args(args))) for args in stated)
    remedy, data_path = describe_continuation(path, run), f"--data_path {' '.join(run.args.data_path)}"
    for flag in sorted((set(before) & set(now)) - FREE):
        by_model = flag == "patch_size" and None in (before[flag], now[flag])  # the shapes of the weights decide
        if before[flag] != now[flag] and not by_model:
            raise ValueError(f"{path} was trained with --{flag} {before[flag]}, not {now[flag]}; {remedy}")
    if content["batch"] != run.batch:
        raise ValueError(
            f"{path} was trained with an effective batch of {content['batch']}, not {run.batch} (--batch_size x --accum_iter x "
            f"ranks); --effective_batch {content['batch']} sets it for any number of ranks; {remedy}"
        )
    if content["origin"] != run.origin:
        given = f"those of --checkpoint {run.args.checkpoint}" if run.origin else "the random ones of this command"
        raise ValueError(
            f"{path} started from other weights than {given}; use the same --checkpoint, or another --output_dir"
        )
    (count, names), (count_now, names_now) = content.get("data", data), data
    if count != count_now or content.get("steps", steps) != steps:
        raise ValueError(
            f"{path} was trained on {count} images, {data_path} has {count_now} now; replace a missing image by an empty file "
            f"of its name, with --on_bad_image skip; or {remedy}"
        )
    if names and names_now and names != names_now:
        raise ValueError(f"{path} was trained on images of other names than those of {data_path}; {remedy}")


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Running means and variances of the batch norms. They differ from rank to rank."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    return [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]


def average_statistics(model: nn.Module, world: World) -> None:
    """Average the running statistics over all ranks, in place."""
    for value in running_statistics(model):
        value.copy_(world.sum(value.double()) / world.size)  # float64: the mean of equal values is exact


def load_checkpoint(path: Path, content: dict, run: Run, model: nn.Module, optimizer, scaler) -> None:
    """Load the state of model, optimiser and loss scaler; ValueError if it does not fit."""
    own = dict(zip(mae_names(model.state_dict()), model.state_dict(), strict=True))  # name in the file -> name here
    try:
        model.load_state_dict({own.get(name, name): value for name, value in content["model"].items()})
        optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = f"{path} does not fit this model (--patch_size and other flags of the model)"
        raise ValueError(f"{reason}: {' '.join(str(error).split())[:200]}") from error
    scaler.load_state_dict(content["scaler"])
    saved = content.get("statistics", [])  # of each rank
    if len(saved) > 1:
        rank, size = run.world.rank, run.world.size
        mine = saved[rank] if len(saved) == size else [sum(x) / len(saved) for x in zip(*saved, strict=True)]
        for value, loaded in zip(running_statistics(model), mine, strict=True):
            value.copy_(loaded)


def lock_folder(folder: Path) -> None:
    """Lock OUTPUT_DIR until this process ends; ValueError if another process holds the lock."""
    opened = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # stays open as long as the process lives
    holder = os.read(opened, 100).decode(errors="replace") or "another run"
    lock_file(opened, f"--output_dir {folder}: {holder} is writing there; wait for it or stop it")
    with suppress(OSError):  # the disk may be full
        os.ftruncate(opened, 0)
        os.pwrite(opened, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def claim_folder(run: Run, path: Path | None) -> None:
    """Prepare OUTPUT_DIR for a run that resumes from `path` (None: a new run, which deletes the old one)."""
    folder, last = run.folder, run.folder / "last.pth"
    if path is None:
        # each epoch ends with a checkpoint, so they have been removed
        if run.resume == "auto" and any(record["epoch"] > 1 for record in read_records(folder / "log.jsonl")):
            raise ValueError(
                f"--output_dir {folder} has the log of a run, but not its checkpoints; put them back, choose another folder, "
                "or delete the log by --resume none --overwrite"
            )
        names = ("epoch-*.pth", "last.pth", "previous.pth", "log.jsonl", "bad_images.txt")
        for old in [old for name in names for old in folder.glob(name)]:
            old.unlink()
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    elif run.resume == "auto" and path.name != "last.pth" and last.exists():
        os.replace(last, folder / "last.pth.damaged")  # the next save would make it previous.pth, in place of `path`
    elif run.resume != "auto" and path.absolute() != last.absolute():
        link_atomic(path, last)  # a restart resumes from it
