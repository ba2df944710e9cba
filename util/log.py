"""Log of a run: lines or a progress bar, log.jsonl, TensorBoard. Only rank 0 writes.

A full disk never ends a run here: lines that cannot be written are kept and written later.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from util.files import printable, write_atomic


class Log:
    """Log in `folder`; one that is not `active` does nothing."""

    def __init__(self, folder: Path, active: bool):
        self.folder, self.active = folder, active
        self.path = folder / "log.jsonl"
        self.pending = ""  # lines for which the disk had no space
        self.evaluations: list[dict] = []  # records of the evaluation that a resumed run repeats
        self.bar: tqdm | None = None
        self.board: Any = None  # SummaryWriter

    def info(self, text: str) -> None:
        """Print a line; control characters in names become escapes."""
        if self.active:
            with suppress(OSError):  # standard output may be a file on a full disk
                tqdm.write(printable(text), file=sys.stdout)
                sys.stdout.flush()

    def rewind(self, epoch: float, pending: str = "") -> None:
        """Remove everything after this fractional epoch from log.jsonl and TensorBoard: the resumed run logs it again.

        The run also repeats the evaluation at this epoch, whose records are not duplicated. `pending` are the lines that
        were not yet on disk when the checkpoint was saved.
        """
        if not self.active:
            return
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        records = parse_lines(text)
        if damaged := len(text.splitlines()) - len(records):
            self.info(f"warning: {self.path}: {damaged} damaged lines are removed")
        records += [late for late in parse_lines(pending) if late not in records]
        kept = [record for record in records if record["epoch"] <= epoch]
        self.evaluations = [record for record in kept if record["epoch"] == epoch and "step" not in record]
        if records or self.path.exists():
            write_atomic(self.path, "".join(map(format_line, kept)).encode())
        step = round(epoch * 1000)
        self.open_board(step)
        for record in kept:
            if round(record["epoch"] * 1000) >= step:  # purge_step removes the whole step from TensorBoard
                self.add_to_board(record)

    def open_board(self, purge_step: int | None = None) -> None:
        """Open TensorBoard's writer; it hides what earlier files hold from `purge_step` on."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, needed on rank 0 only

        if not isinstance(threading.excepthook, partial):
            threading.excepthook = partial(report_thread, threading.excepthook)
        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=purge_step)

    def scalars(self, record: dict) -> None:
        """Write one object to log.jsonl, and its numbers to TensorBoard at step 1000 x epoch."""
        repeated = any(old["epoch"] == record["epoch"] and old.keys() == record.keys() for old in self.evaluations)
        if self.active and not repeated:
            self.pending += format_line(record)
            self.write_pending()
            self.add_to_board(record)

    def write_pending(self) -> None:
        """Append the pending lines to log.jsonl: all of them, or none if the disk is full."""
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write(self.pending)
            self.pending = ""
        except OSError as error:
            self.info(f"warning: {self.path} cannot be written ({error.strerror}); log lines are kept until it can")
            with suppress(OSError):
                os.truncate(self.path, before)

    def sync(self) -> str:
        """Flush log.jsonl to disk before a checkpoint is saved; returns the lines that are still pending."""
        if self.pending:
            self.write_pending()
        with suppress(OSError), self.path.open("a") as file:
            os.fsync(file.fileno())
        return self.pending

    def add_to_board(self, record: dict) -> None:
        """Write the numbers of a record to TensorBoard."""
        step = round(record["epoch"] * 1000)
        for name, value in record.items():
            if name not in ("step", "epoch") and isinstance(value, int | float):
                self.call_board("add_scalar", name, value, step)

    def call_board(self, method: str, *args: Any, **options: Any) -> None:
        """Call TensorBoard's writer. A full disk breaks it for good, so it is opened again."""
        if self.board is None:
            return
        try:
            getattr(self.board, method)(*args, **options)
        except OSError:
            with suppress(OSError):
                self.open_board()

    def image(self, name: str, pixels, epoch: float) -> None:
        """Write a picture (H, W, 3) uint8 to TensorBoard."""
        if self.active:
            self.call_board("add_image", name, pixels, round(epoch * 1000), dataformats="HWC")

    def progress(self, step: int, total: int, record: dict, seconds_left: float) -> None:
        """Show the progress: a bar on a terminal, a line elsewhere."""
        if not self.active:
            return
        speed = f"{record['images_per_s']:.0f} images/s  {record['tflops']:.3g} TFLOP/s"
        share = f" ({record['peak_share']:.0%} of peak)" if "peak_share" in record else ""
        loss = "skipped" if record["loss"] is None else f"{record['loss']:.4f}"
        facts = (
            f"loss {loss}  lr {record['lr']:.2e}  {speed}{share}  "
            f"data wait {record['data_wait']:.0%}  {record['memory_gib']:.1f} GiB"
        )
        if not sys.stdout.isatty():
            left = timedelta(seconds=round(seconds_left))
            self.info(f"epoch {record['epoch']:.2f}  step {step}/{total}  {facts}  {left} left")
            return
        if self.bar is None:
            self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, file=sys.stdout)
        self.bar.set_postfix_str(f"epoch {record['epoch']:.2f}  {facts}", refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Write what is pending and close the files."""
        if self.bar is not None:
            self.bar.close()
        if self.pending:
            self.write_pending()
        if self.board is not None:
            with suppress(OSError):
                self.board.close()


def report_thread(report: Callable, failed: Any) -> None:
    """`report` the error that ended a thread, except TensorBoard's on a full disk, which its next call raises."""
    if type(failed.thread).__name__ != "_AsyncWriterThread" or not isinstance(failed.exc_value, OSError):
        report(failed)


def format_line(record: dict) -> str:
    """A record as a line of log.jsonl."""
    return json.dumps(record, allow_nan=False) + "\n"


def parse_lines(text: str) -> list[dict]:
    """The records in lines of log.jsonl, without truncated or damaged ones."""
    records = []
    for line in text.splitlines(keepends=True):
        with suppress(ValueError, RecursionError):
            format_line(record := json.loads(line))  # refuses nan
            if line.endswith("\n") and isinstance(record, dict) and type(record.get("epoch")) in (int, float):
                records.append(record)
    return records


def read_records(path: Path) -> list[dict]:
    """The records of a log.jsonl, without truncated or damaged lines; empty without the file."""
    return parse_lines(path.read_text(errors="replace")) if path.exists() else []
