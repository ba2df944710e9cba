"""Checkpoints that survive: written whole or not at all, read without executing anything."""

import os
import pickle
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from util.convert import mae_names
from util.run import Run, plain

FORMAT = "pixmim-1"
# Flags that a resumed run may change: they alter where and how fast, not what is computed.
FREE = {
    "data_path", "output_dir", "resume", "overwrite", "num_workers", "device", "compile", "grad_checkpointing", "batch_size", "accum_iter",
    "log_every", "save_every", "image_every", "knn_every", "knn_path", "eval", "on_bad_image",
}  # fmt: skip


class Progress(NamedTuple):
    epoch: int  # epochs done
    step: int  # steps done in the next one

    def step_in(self, epoch: int) -> int:
        """Where to begin in this epoch."""
        return self.step if epoch == self.epoch else 0


def write(path: Path, content: dict) -> Path:
    """torch.save, but a process killed at any moment leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({error}); the file before it is untouched") from error
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return path


def save(run: Run, progress: Progress, model: nn.Module, optimizer, scaler) -> Path:
    """OUTPUT_DIR/last.pth, and epoch-NNNN.pth every --save_every epochs and at the end. Rank 0 writes."""
    last = run.folder / "last.pth"
    if not run.world.leads:
        return last
    content = {
        "format": FORMAT,
        "model": mae_names(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "progress": progress._asdict(),
        "batch": run.batch,
        "origin": run.origin,
        "args": plain(run.args),
    }
    write(last, content)
    if progress.step == 0 and (progress.epoch % run.args.save_every == 0 or progress.epoch == run.args.epochs):
        kept = run.folder / f"epoch-{progress.epoch:04d}.pth"
        kept.unlink(missing_ok=True)
        try:
            os.link(last, kept)  # the same bytes; last.pth is replaced, never rewritten
        except OSError:  # a file system without links
            shutil.copyfile(last, kept)
    return last


def find(run: Run) -> Path | None:
    """The checkpoint that --resume means, None for a new run."""
    if run.args.resume == "none":
        return None
    if run.args.resume == "auto":
        last = run.folder / "last.pth"
        return last if last.exists() else None
    path = Path(run.args.resume)
    if not path.is_file():
        raise FileNotFoundError(f"--resume {path}: there is no such file (auto and none are the other choices)")
    return path


def read(path: Path) -> dict:
    """Content of one of our own checkpoints."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path} is damaged or no checkpoint ({reason}); --resume an epoch-NNNN.pth beside it"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this project's runs; --resume takes last.pth or epoch-NNNN.pth")
    return content


def resume(run: Run, model: nn.Module, optimizer, scaler) -> Progress:
    """Load what --resume means into model, optimizer and scaler; a run that would compute something else is refused."""
    path = find(run)
    if path is None:
        run.log.rewind(0)
        return Progress(0, 0)
    content = read(path)
    before, now = content["args"], plain(run.args)
    for flag in sorted((set(before) & set(now)) - FREE):
        if before.get(flag) != now.get(flag):
            raise ValueError(
                f"{path} was trained with --{flag} {before.get(flag)}, not {now.get(flag)}; "
                "give the same flag, or another --output_dir for a new run"
            )
    if content["batch"] != run.batch:
        raise ValueError(
            f"{path} was trained with {content['batch']} samples a step, not {run.batch} (--batch_size x --accum_iter x ranks)"
        )
    if content["origin"] != run.origin:
        raise ValueError(f"{path} began with other weights than --checkpoint has now; choose another --output_dir")
    own = dict(zip(mae_names(model.state_dict()), model.state_dict(), strict=True))  # name on disk -> name here
    model.load_state_dict({own.get(name, name): value for name, value in content["model"].items()})
    optimizer.load_state_dict(content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    progress = Progress(**content["progress"])
    run.log.rewind(progress.epoch)
    run.log.say(f"resumed from {path}: {progress.epoch} of {run.args.epochs} epochs done")
    return progress
