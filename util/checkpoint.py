"""Checkpoints that survive: written whole, beside the training, with a checksum; read without executing anything."""

import fcntl
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from util.args import WRITER
from util.convert import mae_names
from util.dist import Agreement
from util.files import check_zip, fingerprint, is_what_was_written, link_whole, sync_folder, write_whole
from util.interrupt import Interrupt
from util.run import Run, configuration, plain

FORMAT, OLDER = "pixmim-2", "pixmim-1"
# Flags that a resumed run may change: they alter where and how fast, not what is computed.
FREE = {
    "data_path", "output_dir", "resume", "overwrite", "num_workers", "device", "compile", "grad_checkpointing", "batch_size", "accum_iter",
    "effective_batch", "log_every", "save_every", "save_minutes", "on_full_disk", "image_every", "knn_every", "knn_path", "eval",
    "on_bad_image", "max_skipped", "replay", "timeout_minutes",
}  # fmt: skip
NOTHING, SAVE, FULL, STOP = range(4)  # what a rank may want after a step; the largest is done by all


class Progress(NamedTuple):
    """How far a run has come."""

    epoch: int  # that is trained, from 0
    step: int  # steps done in it; after the last its evaluation follows
    losses: tuple[float, ...] = ()  # of the steps since the last log line, mean over the ranks; nan = skipped
    skipped: int = 0  # steps in a row without an update, up to that log line

    def within(self, epoch: int) -> "Progress":
        """Where to begin in this epoch."""
        return self if epoch == self.epoch else Progress(epoch, 0, (), self.skipped)


# -------------------------------------------------------------------------------------------------------- reading, writing


def on_host(content: Any) -> Any:
    """A copy in the host's memory that training does not change."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(content, dict):
        return {key: on_host(value) for key, value in content.items()}
    return type(content)(map(on_host, content)) if isinstance(content, list | tuple) else content


def write(path: Path, content: dict) -> Path:
    """A file that `read` gives back, or OSError and the file before it."""
    content = {"format": FORMAT, **content}
    return write_whole(path, partial(torch.save, content | {"sha256": fingerprint(content)}))


def read(path: Path) -> dict:
    """Content of one of our own checkpoints; ValueError if a bit of it changed since it was written."""
    try:
        check_zip(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        ours = isinstance(content, dict) and content.get("format") in (FORMAT, OLDER)
        if ours and content["format"] == FORMAT and not is_what_was_written(content):
            raise ValueError("its checksum differs")
    except Exception as error:  # what a damaged file makes the reader do is not foreseeable
        if isinstance(error, OSError) and error.filename:  # the disk's fault
            raise
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged or no checkpoint ({reason})") from error
    if not ours:
        raise ValueError(f"{path} is no checkpoint of this project's runs; --resume takes last.pth or epoch-NNNN.pth")
    return content


def store(folder: Path, content: dict, kept: str | None) -> None:
    """last.pth, the one before as previous.pth, and perhaps a third name that is kept; one of them is always whole."""
    new = write(folder / ".new.pth", content)
    if kept:
        link_whole(new, folder / kept)
    if (folder / "last.pth").exists():
        os.replace(folder / "last.pth", folder / "previous.pth")
    os.replace(new, folder / "last.pth")
    sync_folder(folder)


class Writer:
    """Stores the newest content it was given in a thread; a full disk is tried again until there is room."""

    def __init__(self, folder: Path, say: Callable[[str], None], retry: float):
        self.folder, self.say, self.retry = folder, say, retry  # seconds
        self.lock = threading.Lock()
        self.waiting: tuple[dict, str | None] | None = None  # a thread works as long as something is
        self.error: Exception | None = None  # of the last try
        self.again = threading.Event()

    @property
    def busy(self) -> bool:
        """True while it writes; not while it waits for room."""
        return self.waiting is not None and self.error is None

    def give(self, content: dict, kept: str | None) -> None:
        before = self.waiting
        while before and before[1] and self.waiting is before and not self.error:
            time.sleep(0.005)  # one that is kept is not replaced by a newer one, while the disk takes it
        with self.lock:
            if self.waiting and self.error and self.waiting[1]:
                self.say(f"warning: {self.folder / self.waiting[1]} is given up for a newer checkpoint")
            idle, self.waiting = self.waiting is None, (content, kept)
        if idle:
            threading.Thread(target=self.work, name=WRITER).start()

    def work(self) -> None:
        while given := self.waiting:
            try:
                store(self.folder, *given)
            except (OSError, MemoryError) as error:
                self.error = error
                self.say(f"warning: {error}: make room; it is tried again every {self.retry:.0f} s")
                if not self.pause():
                    return
                continue
            if self.error:
                self.say(f"{self.folder / 'last.pth'} is written again")
            with self.lock:
                self.error = None
                if self.waiting is given:
                    self.waiting = None
                    return

    def pause(self) -> bool:
        """Wait for the time to try again; False if the process ends."""
        until = time.monotonic() + self.retry
        while time.monotonic() < until and not self.again.wait(0.1):
            if not threading.main_thread().is_alive():
                return False
        self.again.clear()
        return True

    def stored(self, patient: Callable[[], bool]) -> bool:
        """Wait until all is stored; as soon as nobody is patient, until it was tried once more. True if it is stored."""
        while self.waiting and (self.busy or patient()):
            time.sleep(0.005)
        if self.waiting:
            self.error = None
            self.again.set()
            while self.busy:
                time.sleep(0.005)
        return self.waiting is None

    def give_up(self) -> None:
        """Try no longer."""
        self.waiting = None
        self.again.set()


# ---------------------------------------------------------------------------------------------------------- finding, fitting


def candidates(run: Run) -> list[Path]:
    """What --resume may mean, the best first."""
    folder, asked = run.folder, run.args.resume
    if asked == "none":
        return []
    if asked == "auto":
        kept = sorted(folder.glob("epoch-*.pth"), reverse=True)
        return [path for path in (folder / "last.pth", folder / "previous.pth", *kept) if path.exists()]
    if not Path(asked).is_file():
        raise FileNotFoundError(f"--resume {asked}: there is no such file (auto and none are the other choices)")
    return [Path(asked)]


def newest(run: Run, steps: int) -> tuple[Path, dict, Progress] | None:
    """(file, content, progress) of the newest checkpoint that is whole, and old enough for --replay; None for a new run."""
    found = candidates(run)
    damaged = []
    for path in found:
        try:
            content = read(path)
            if "progress" not in content:
                raise ValueError(f"{path} holds weights, not a run")
        except ValueError as error:
            damaged.append(path)
            run.log.say(f"warning: {error}; the checkpoint before it is tried")
            continue
        progress = Progress(**{**content["progress"], "losses": tuple(content["progress"].get("losses", ()))})
        if content["format"] == OLDER:  # saved after an epoch's evaluation, which is done again now
            progress = Progress(progress.epoch - 1, steps)
        if run.args.replay and progress.epoch * steps + progress.step >= run.args.replay:
            continue
        return path, content, progress
    if damaged:
        names = " ".join(path.name for path in damaged)
        raise ValueError(
            f"--resume {run.args.resume}: damaged or foreign in {damaged[0].parent}: {names}; there is nothing else to go on from; "
            "--resume FILE takes a copy, --resume none --overwrite starts anew"
        )
    return None


def refuse_other(path: Path, content: dict, run: Run, data: list, steps: int) -> None:
    """ValueError for a checkpoint of a run that computes something else."""
    before, now = content["args"], plain(run.args)
    for flag in sorted((set(before) & set(now)) - FREE):
        if before[flag] != now[flag]:
            raise ValueError(
                f"{path} was trained with --{flag} {before[flag]}, not {now[flag]}; "
                "give the same flag, or another --output_dir for a new run"
            )
    if content["batch"] != run.batch:
        raise ValueError(
            f"{path} was trained with {content['batch']} samples a step, not {run.batch} (--batch_size x --accum_iter x ranks); "
            f"--effective_batch {content['batch']} keeps it on any number of ranks"
        )
    if content["origin"] != run.origin:
        raise ValueError(f"{path} began with other weights than --checkpoint has now; choose another --output_dir")
    (count, names), (count_now, names_now) = content.get("data", data), data
    if count != count_now or content.get("steps", steps) != steps:
        raise ValueError(
            f"{path} was trained on {count} images, --data_path {run.args.data_path} has {count_now} now; for one that is lost "
            "put an empty file of its name there (--on_bad_image skip)"
        )
    if names and names_now and names != names_now:
        raise ValueError(
            f"{path} was trained on as many images of other names than --data_path {run.args.data_path} has now"
        )


def statistics(model: nn.Module) -> list[Tensor]:
    """Running statistics of batch norms: they differ from rank to rank."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    return [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]


# ----------------------------------------------------------------------------------------------------------------- the run


class Saver:
    """Resumes a run, saves it, and stops it when it is asked to; what every rank calls, rank 0 writes."""

    def __init__(self, run: Run, model: nn.Module, optimizer, scaler, loader):
        self.run, self.model, self.optimizer, self.scaler = run, model, optimizer, scaler
        self.steps: int = loader.batch_sampler.steps  # of an epoch
        source = loader.dataset.source
        self.data = [len(source), source.digest()]
        self.agreement, self.interrupt = Agreement(run.world), Interrupt(run.world.leads)
        self.interval = 60 * run.args.save_minutes
        self.writer = Writer(run.folder, run.log.say, retry=max(1.0, min(60.0, self.interval)))
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
            run.log.say(f"resumed from {path}: {where}")
        elif run.args.replay:
            raise ValueError(f"--replay {run.args.replay}: no checkpoint in {run.folder} is from before this step")
        if run.args.replay:
            run.log.muted = True
            return progress
        if run.world.leads:
            self.begin(found[0] if found else None)
        at = (progress.epoch * self.steps + progress.step) / self.steps
        run.log.rewind(at, found[1].get("log", "") if found else "")
        return progress

    def lock(self) -> None:
        """One process writes into a folder; the lock ends with it, however it ends."""
        if self.run.world.leads and not self.run.args.replay:
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
            link_whole(path, folder / "last.pth")  # what a restart goes on from
        write_whole(folder / "config.json", (json.dumps(configuration(self.run), indent=2) + "\n").encode())

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
        if not self.run.world.leads or self.writer.busy or time.monotonic() < self.clock + self.interval:
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
        if not run.world.leads or run.args.replay:
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
            "args": plain(run.args),
        }
        content["log"] = run.log.sync()
        self.writer.give(on_host(content), kept)
        self.clock = time.monotonic()

    def stop(self, progress: Progress) -> None:
        """End a run that was asked to; the same command goes on from here."""
        saved = "saved" if self.settled() else "could not be saved"
        asked = self.interrupt.signal.name if self.interrupt.signal else "another rank's signal"
        self.run.log.say(
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
