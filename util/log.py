"""What a run tells: lines or a progress bar, log.jsonl, TensorBoard. Only the rank that leads writes.

A full disk ends no run: what cannot be written waits for room.
"""

import json
import os
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from util.files import write_atomic


class Log:
    def __init__(self, folder: Path, active: bool):
        self.folder, self.active = folder, active
        self.muted = False  # lines for a person alone
        self.path = folder / "log.jsonl"
        self.waiting = ""  # lines that found no room
        self.evaluated: list[dict] = []  # records of the evaluation that a resumed run does again
        self.bar: tqdm | None = None
        self.board: Any = None  # SummaryWriter
        self.flops: float | None = None  # of an image, as soon as there is one

    def info(self, text: str) -> None:
        """A line for a person."""
        if self.active:
            with suppress(OSError):  # stdout may lie on a full disk
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def rewind(self, epoch: float, waiting: str = "") -> None:
        """Forget what was logged after this (fractional) epoch: the resumed run writes it again.

        It also evaluates again what it has just trained; records that come out the same are not repeated. `waiting` are
        lines that had found no room when the checkpoint was made.
        """
        if not self.active:
            return
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        lines += [late for late in waiting.splitlines(keepends=True) if late not in lines]
        kept = [record for record in map(parsed, lines) if record and record["epoch"] <= epoch]
        self.evaluated = [record for record in kept if record["epoch"] == epoch and "step" not in record]
        if lines:
            write_atomic(self.path, "".join(map(line, kept)).encode())
        step = round(epoch * 1000)
        self.open_board(step)
        for record in kept:
            if round(record["epoch"] * 1000) >= step:  # the board has forgotten them with the rest of this step
                self.to_board(record)

    def open_board(self, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one rank needs it

        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=purge_step)

    def scalars(self, record: dict) -> None:
        """One object of log.jsonl, and its numbers on TensorBoard at 1000 x epoch: an axis that no batch size stretches."""
        if self.active and not self.muted:
            self.waiting += "" if record in self.evaluated else line(record)
            self.write_waiting()
            self.to_board(record)

    def write_waiting(self) -> None:
        """Add the lines that wait to log.jsonl, whole or, where there is no room, not yet."""
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write(self.waiting)
            self.waiting = ""
        except OSError as error:
            self.info(f"warning: {self.path}: {error.strerror}; what is logged waits for room")
            with suppress(OSError):
                os.truncate(self.path, before)

    def sync(self) -> str:
        """Bring log.jsonl to the disk, so that no checkpoint is newer than it; lines for which there is no room."""
        if self.waiting:
            self.write_waiting()
        with suppress(OSError), self.path.open("a") as file:
            os.fsync(file.fileno())
        return self.waiting

    def to_board(self, record: dict) -> None:
        """The numbers of a record on TensorBoard."""
        step = round(record["epoch"] * 1000)
        for name, value in record.items():
            if name not in ("step", "epoch") and isinstance(value, int | float):
                self.on_board("add_scalar", name, value, step)

    def on_board(self, method: str, *words: Any, **options: Any) -> None:
        """Tell TensorBoard; its writer does not outlive a full disk, so there is another one the next time."""
        if self.board is None:
            return
        try:
            getattr(self.board, method)(*words, **options)
        except OSError:
            with suppress(OSError):
                self.open_board()

    def image(self, name: str, pixels, epoch: float) -> None:
        """A picture (H, W, 3) uint8 on TensorBoard."""
        if self.active and not self.muted:
            self.on_board("add_image", name, pixels, round(epoch * 1000), dataformats="HWC")

    def progress(self, step: int, total: int, record: dict, seconds_left: float) -> None:
        """Progress bar on a terminal, a line elsewhere."""
        if not self.active:
            return
        speed = f"{record['images_per_s']:.0f} images/s  {record['tflops']:.3g} TFLOP/s"
        share = f" ({record['peak_share']:.0%} of peak)" if "peak_share" in record else ""
        loss = "skipped" if record["loss"] is None else f"{record['loss']:.4f}"
        facts = (
            f"loss {loss}  lr {record['lr']:.2e}  {speed}{share}  "
            f"waits for data {record['data_wait']:.0%}  {record['memory_gib']:.1f} GiB"
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
        if self.bar is not None:
            self.bar.close()
        if self.waiting:
            self.write_waiting()
        if self.board is not None:
            with suppress(OSError):
                self.board.close()


def line(record: dict) -> str:
    """A record as log.jsonl has it."""
    return json.dumps(record, allow_nan=False) + "\n"


def parsed(text: str) -> dict | None:
    """The record of a line; None for half of one, and for what a machine that lost its power left."""
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if text.endswith("\n") and isinstance(record, dict) and "epoch" in record else None
