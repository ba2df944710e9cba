"""What a run tells: lines or a progress bar, log.jsonl, TensorBoard. Only the rank that leads writes."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Log:
    def __init__(self, folder: Path, active: bool):
        self.folder, self.active = folder, active
        self.path = folder / "log.jsonl"
        self.bar: tqdm | None = None
        self.board: Any = None  # SummaryWriter
        self.flops: float | None = None  # of an image, as soon as there is one

    def say(self, text: str) -> None:
        """A line for a person."""
        if self.active:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def rewind(self, epoch: float) -> None:
        """Forget what was logged after this (fractional) epoch: the resumed run writes it again."""
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one rank needs it

        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] <= epoch]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            os.replace(temporary, self.path)
        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=round(epoch * 1000) + 1)

    def scalars(self, record: dict) -> None:
        """One object of log.jsonl, and its numbers on TensorBoard at 1000 x epoch: an axis that no batch size stretches."""
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        if self.board is not None:
            for name, value in record.items():
                if name not in ("step", "epoch") and value is not None:
                    self.board.add_scalar(name, value, round(record["epoch"] * 1000))

    def image(self, name: str, pixels, epoch: float) -> None:
        """A picture (H, W, 3) uint8 on TensorBoard."""
        if self.active and self.board is not None:
            self.board.add_image(name, pixels, round(epoch * 1000), dataformats="HWC")

    def progress(self, step: int, total: int, record: dict, seconds_left: float) -> None:
        """Progress bar on a terminal, a line elsewhere."""
        if not self.active:
            return
        speed = f"{record['images_per_s']:.0f} images/s  {record['tflops']:.3g} TFLOP/s"
        share = f" ({record['peak_share']:.0%} of peak)" if "peak_share" in record else ""
        facts = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {speed}{share}  "
            f"waits for data {record['data_wait']:.0%}  {record['memory_gib']:.1f} GiB"
        )
        if not sys.stdout.isatty():
            left = timedelta(seconds=round(seconds_left))
            self.say(f"epoch {record['epoch']:.2f}  step {step}/{total}  {facts}  {left} left")
            return
        if self.bar is None:
            self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, file=sys.stdout)
        self.bar.set_postfix_str(f"epoch {record['epoch']:.2f}  {facts}", refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()
