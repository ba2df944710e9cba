"""Saving, resuming and stopping a run. Every rank calls these methods; only rank 0 writes."""

import signal
import sys
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch

from util.checkpoint.resume import (
    Progress,
    check_same_run,
    claim_folder,
    find_checkpoint,
    load_checkpoint,
    lock_folder,
    running_statistics,
)
from util.checkpoint.state import copy_to_host
from util.checkpoint.stop import EXIT_RESUMABLE, DelayedMax, StopRequest
from util.checkpoint.writer import Writer
from util.formats.keys import mae_names
from util.run import args_to_dict, write_config


class Request(IntEnum):
    """What a rank requests after a step; all ranks follow the largest."""

    NOTHING = 0
    SAVE = 1
    FAIL = 2  # the checkpoint cannot be written
    STOP = 3


class Saver:
    """Saves and resumes what is in `state`: its run, model, optimizer, scaler and loader."""

    def __init__(self, state: Any):
        self.state, self.run = state, state.run
        self.steps: int = state.loader.batch_sampler.steps  # of an epoch
        source = state.loader.dataset.source
        self.data = [len(source), source.digest()]
        self.agreement, self.stop_request = DelayedMax(self.run.world), StopRequest(self.run.world.is_main)
        self.interval = 60 * self.run.args.save_minutes
        self.writer = Writer(self.run.folder, self.run.log.info, retry=max(1.0, min(60.0, self.interval)))
        self.last_save, self.resumed_at = time.monotonic(), Progress(0, 0)

    def resume(self) -> Progress:
        """Load the checkpoint that --resume refers to and prepare OUTPUT_DIR; ValueError if it belongs to another run."""
        run, state = self.run, self.state
        if run.world.is_main:
            lock_folder(run.folder)
        found = find_checkpoint(run, self.steps)
        progress = self.resumed_at = found[2] if found else Progress(0, 0)
        if len({repr(each) for each in run.world.gather(progress)}) > 1:
            raise ValueError(f"--output_dir {run.folder}: the ranks find different checkpoints; use a shared disk")
        if found:
            path, content, _ = found
            check_same_run(path, content, run, self.data, self.steps)
            load_checkpoint(path, content, run, state.model, state.optimizer, state.scaler)
            position = f"epoch {progress.epoch + 1} of {run.args.epochs}, {progress.step} of {self.steps} steps done"
            run.log.info(f"resumed from {path}: {position}")
            threads = content.get("threads", torch.get_num_threads())
            if run.world.device.type == "cpu" and threads != torch.get_num_threads():
                run.log.info(
                    f"warning: saved with {threads} threads, now {torch.get_num_threads()}: sums of another order differ by about 1e-7; "
                    f"OMP_NUM_THREADS={threads} continues bit for bit"
                )
        if run.world.is_main:
            claim_folder(run, found[0] if found else None)
            write_config(run)
        run.world.barrier()  # if rank 0 fails here, the others end too
        at = (progress.epoch * self.steps + progress.step) / self.steps
        run.log.rewind(at, found[1].get("log", "") if found else "")
        return progress

    def after_step(self, position: Callable[[], Progress]) -> None:
        """Save if it is time, and stop if any rank was asked to; `position()` is then called on all ranks."""
        requested = self.agreement.exchange(self.own_request())
        if requested == Request.NOTHING:
            return
        if requested == Request.FAIL:
            self.fail_unsaved()
        progress = position()
        self.save(progress)
        if requested == Request.STOP:
            self.stop(progress)

    def own_request(self) -> Request:
        """What this rank requests."""
        if self.stop_request.signal:
            return Request.STOP
        if self.writer.failed or (self.writer.error and self.run.args.on_full_disk == "stop"):
            return Request.FAIL
        return Request.SAVE if self.is_save_due() else Request.NOTHING

    def is_save_due(self) -> bool:
        """True on rank 0 if --save_minutes have passed and no save is in progress; restarts the clock."""
        if not self.run.world.is_main or self.writer.busy or time.monotonic() < self.last_save + self.interval:
            return False
        self.last_save = time.monotonic()
        return True

    def after_epoch(self, progress: Progress) -> None:
        """Save, also as epoch-NNNN.pth if that is due, and stop if any rank was asked to, before the evaluation."""
        done, args = progress.epoch + 1, self.run.args
        if progress is not self.resumed_at:  # else this state was just loaded
            permanent = done % args.save_every == 0 or done == args.epochs
            self.save(progress, f"epoch-{done:04d}.pth" if permanent else None)
        requested = max(self.run.world.gather(self.own_request()))
        if requested == Request.STOP:
            self.stop(progress)
        if requested == Request.FAIL:
            self.fail_unsaved()

    def save(self, progress: Progress, permanent: str | None = None) -> None:
        """Copy the state to host memory; the writer thread stores it while training continues."""
        run, state = self.run, self.state
        statistics = run.world.gather([value.cpu() for value in running_statistics(state.model)])
        if not run.world.is_main:
            return
        content = {
            "model": mae_names(state.model.state_dict()), "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(), "statistics": statistics, "progress": progress._asdict(),
            "threads": torch.get_num_threads(), "steps": self.steps, "data": self.data, "batch": run.batch,
            "origin": run.origin, "args": args_to_dict(run.args), "log": run.log.sync(),
        }  # fmt: skip
        self.writer.submit(copy_to_host(content), permanent)
        self.last_save = time.monotonic()

    def stop(self, progress: Progress) -> None:
        """End a run that was asked to stop, once the save is written."""
        saved = "saved" if self.flush() else "could not be saved"
        cause = self.stop_request.signal.name if self.stop_request.signal else "signal to another rank"
        self.run.log.info(
            f"{cause}: stopped at step {progress.step} of {self.steps} of epoch {progress.epoch + 1}, {saved}; "
            "run the same command to resume"
        )
        self.stop_request.restore()
        self.run.close()
        sys.exit(130 if self.stop_request.signal == signal.SIGINT else EXIT_RESUMABLE)

    def flush(self) -> bool:
        """Wait on all ranks until the save in progress is written: a launcher ends all ranks with the first that exits.

        Returns True if it is written.
        """
        stored = self.writer.flush(keep_waiting=lambda: False)
        self.run.world.barrier()
        return stored

    def describe_last_save(self) -> str:
        """Which checkpoint can be resumed from, for the error of a run that fails; called on all ranks."""
        self.flush()
        last = self.run.folder / "last.pth"
        return f"{last} holds the last good state" if last.exists() else "no checkpoint has been saved yet"

    def close(self) -> None:
        """Return once everything is written."""
        waits = self.run.args.on_full_disk == "wait"
        stored = self.writer.flush(keep_waiting=lambda: waits and not self.stop_request.signal)
        self.stop_request.restore()
        if not stored:
            self.fail_unsaved()

    def fail_unsaved(self) -> None:
        """Raise OSError with the reason why the checkpoint cannot be written."""
        remedy = "fix that" if self.writer.failed else "free disk space (--on_full_disk)"
        self.writer.cancel()
        reason = self.writer.error or "rank 0 cannot write the checkpoint"
        raise OSError(f"{reason}; {remedy} and run the same command to resume")
