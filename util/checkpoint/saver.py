"""Saving, resuming and stopping a run."""

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from util.checkpoint.resume import Progress, newest, refuse_other
from util.checkpoint.state import on_host
from util.checkpoint.stop import StopRequest
from util.checkpoint.writer import Writer
from util.dist import DelayedMax
from util.files import link_atomic, write_atomic
from util.formats.keys import mae_names
from util.run import Run, args_to_dict, configuration

NOTHING, SAVE, FULL, STOP = range(4)  # what a rank may want after a step; the largest is done by all


def statistics(model: nn.Module) -> list[Tensor]:
    """Running statistics of batch norms: they differ from rank to rank."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    return [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]


class Saver:
    """Resumes a run, saves it, and stops it when it is asked to; what every rank calls, rank 0 writes."""

    def __init__(self, run: Run, model: nn.Module, optimizer, scaler, loader):
        self.run, self.model, self.optimizer, self.scaler = run, model, optimizer, scaler
        self.steps: int = loader.batch_sampler.steps  # of an epoch
        source = loader.dataset.source
        self.data = [len(source), source.digest()]
        self.agreement, self.interrupt = DelayedMax(run.world), StopRequest(run.world.is_main)
        self.interval = 60 * run.args.save_minutes
        self.writer = Writer(run.folder, run.log.info, retry=max(1.0, min(60.0, self.interval)))
        self.clock, self.begun = time.monotonic(), Progress(0, 0)

    def resume(self) -> Progress:
        """Load what --resume means into model, optimizer and scaler; a run that would compute something else is refused."""
        run = self.run
        self.lock()
        if run.args.replay and run.args.replay > run.args.epochs * self.steps:
            raise ValueError(f"--replay {run.args.replay}: the run has {run.args.epochs * self.steps} steps")
        found = newest(run, self.steps)
        progress = self.begun = found[2] if found else Progress(0, 0)
        if len({repr(each) for each in run.world.gather(progress)}) > 1:
            raise ValueError(
                f"--output_dir {run.folder}: the ranks find different checkpoints; it must be a disk they share"
            )
        if found:
            path, content, _ = found
            refuse_other(path, content, run, self.data, self.steps)
            self.load(path, content)
            where = f"epoch {progress.epoch + 1} of {run.args.epochs}, {progress.step} of {self.steps} steps done"
            run.log.info(f"resumed from {path}: {where}")
        elif run.args.replay:
            raise ValueError(f"--replay {run.args.replay}: no checkpoint in {run.folder} is from before this step")
        if run.args.replay:
            run.log.muted = True
            return progress
        if run.world.is_main:
            self.begin(found[0] if found else None)
        at = (progress.epoch * self.steps + progress.step) / self.steps
        run.log.rewind(at, found[1].get("log", "") if found else "")
        return progress

    def lock(self) -> None:
        """One process writes into a folder; the lock ends with it, however it ends."""
        if self.run.world.is_main and not self.run.args.replay:
            opened = os.open(self.run.folder / ".lock", os.O_WRONLY | os.O_CREAT)  # open as long as the process lives
            try:
                fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"--output_dir {self.run.folder}: another run is writing there; wait for it or end it"
                ) from error
            except OSError:  # a file system without locks
                pass

    def load(self, path: Path, content: dict) -> None:
        own = dict(zip(mae_names(self.model.state_dict()), self.model.state_dict(), strict=True))  # on disk -> here
        try:
            self.model.load_state_dict({own.get(name, name): value for name, value in content["model"].items()})
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{path} does not fit this model: {' '.join(str(error).split())[:200]}") from error
        self.scaler.load_state_dict(content["scaler"])
        each = content.get("statistics", [])
        if len(each) > 1:
            world = self.run.world
            mine = (
                each[world.rank] if len(each) == world.size else [sum(x) / len(each) for x in zip(*each, strict=True)]
            )
            for value, saved in zip(statistics(self.model), mine, strict=True):
                value.copy_(saved)

    def begin(self, path: Path | None) -> None:
        """Take possession of the folder: an old run goes, a damaged file makes room, config.json tells of this start."""
        folder, asked = self.run.folder, self.run.args.resume
        if path is None:
            names = ("epoch-*.pth", "last.pth", "previous.pth", "log.jsonl", "bad_images.txt")
            for old in [old for name in names for old in folder.glob(name)]:
                old.unlink()
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        elif asked == "auto" and path.name != "last.pth" and (folder / "last.pth").exists():
            os.replace(
                folder / "last.pth", folder / "last.pth.damaged"
            )  # else the next save would put it in place of `path`
        elif asked != "auto" and path.absolute() != (folder / "last.pth").absolute():
            link_atomic(path, folder / "last.pth")  # what a restart goes on from
        write_atomic(folder / "config.json", (json.dumps(configuration(self.run), indent=2) + "\n").encode())

    def after_step(self, progress: Callable[[], Progress]) -> None:
        """Save if it is time, stop if a rank was asked to; `progress` is called if so, on all ranks."""
        if self.run.args.replay:
            return
        wanted = self.agreement.of(self.wish())
        if wanted == NOTHING:
            return
        if wanted == FULL:
            self.refuse_full_disk()
        now = progress()
        self.save(now)
        if wanted == STOP:
            self.stop(now)

    def wish(self) -> int:
        """What this rank wants."""
        if self.interrupt.signal:
            return STOP
        if self.writer.error and self.run.args.on_full_disk == "stop":
            return FULL
        return SAVE if self.due() else NOTHING

    def due(self) -> bool:
        if not self.run.world.is_main or self.writer.busy or time.monotonic() < self.clock + self.interval:
            return False
        self.clock = time.monotonic()
        return True

    def after_epoch(self, progress: Progress) -> None:
        """Save, and stop if a rank was asked to, before the evaluation; epoch-NNNN.pth every --save_every epochs and at the end."""
        done, args = progress.epoch + 1, self.run.args
        if progress is not self.begun:  # else it came from the file that would be written
            kept = done % args.save_every == 0 or done == args.epochs
            self.save(progress, f"epoch-{done:04d}.pth" if kept else None)
        wanted = max(self.run.world.gather(self.wish()))
        if wanted == STOP:
            self.stop(progress)
        if wanted == FULL:
            self.refuse_full_disk()

    def save(self, progress: Progress, kept: str | None = None) -> None:
        """Copy the state; it is written while the training goes on."""
        run = self.run
        each = run.world.gather([value.cpu() for value in statistics(self.model)])
        if not run.world.is_main or run.args.replay:
            return
        content = {
            "model": mae_names(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "statistics": each,
            "progress": progress._asdict(),
            "steps": self.steps,
            "data": self.data,
            "batch": run.batch,
            "origin": run.origin,
            "args": args_to_dict(run.args),
        }
        content["log"] = run.log.sync()
        self.writer.give(on_host(content), kept)
        self.clock = time.monotonic()

    def stop(self, progress: Progress) -> None:
        """End a run that was asked to; the same command goes on from here."""
        saved = "saved" if self.settled() else "could not be saved"
        asked = self.interrupt.signal.name if self.interrupt.signal else "another rank's signal"
        self.run.log.info(
            f"{asked}: stopped at step {progress.step} of {self.steps} of epoch {progress.epoch + 1}, {saved}; "
            "the same command goes on"
        )
        self.interrupt.restore()
        self.run.close()
        sys.exit(self.interrupt.status)

    def settled(self) -> bool:
        """Wait, on all ranks, for what is being written: who starts ranks ends them all with the first. True if it is stored."""
        stored = self.writer.stored(patient=lambda: False)
        self.run.world.gather(None)
        return stored

    def last_good(self) -> str:
        """What a run that fails on all ranks leaves to go on from."""
        self.settled()
        last = self.run.folder / "last.pth"
        return f"{last} holds the last good state" if last.exists() else "nothing is saved yet"

    def close(self) -> None:
        """All is written when this returns."""
        waits = self.run.args.on_full_disk == "wait"
        stored = self.writer.stored(patient=lambda: waits and not self.interrupt.signal)
        self.interrupt.restore()
        if not stored:
            self.refuse_full_disk()

    def refuse_full_disk(self) -> None:
        self.writer.give_up()
        raise OSError(
            f"{self.writer.error or 'rank 0 cannot write'}; make room, the same command goes on (--on_full_disk)"
        )
