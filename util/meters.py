"""Speed, memory and losses of a run between two log lines."""

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from util.checkpoint.resume import Progress
from util.data.batches import DevicePrefetcher
from util.data.samplers import TrainSampler
from util.dist import autocast
from util.run import Run

PEAK_TFLOPS = {  # dense matrix products in half precision, as the makers state them; the first name that fits counts
    "H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "A10G": 70, "A10": 125, "L40S": 362, "L4": 121,
    "V100": 125, "T4": 65, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


ATTENTION_FLOPS = {  # torch counts those of GPUs alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


def peak_memory(device: torch.device) -> float:
    """GiB: of the device since its last reset, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def peak_tflops(amp: str, device: torch.device) -> float | None:
    """What the device could do at --amp, TFLOP/s; None where that is not known."""
    if device.type != "cuda" or amp == "off":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in PEAK_TFLOPS.items() if re.search(rf"\b{model}\b", name)), None)


@torch.no_grad()
def step_flops(model: Any, loss_fn: Callable, batch: dict, amp: str) -> float:
    """Floating-point operations that the model asks for an image: products of matrices and convolutions, forward and back.

    Backward is twice forward where most parameters are trained, nothing where they are not (the probe's encoder).
    Recomputed activations are not counted.
    """
    model = getattr(model, "module", model)  # without DDP
    model = getattr(model, "_orig_mod", model)  # nor torch.compile
    two = {name: value[:2] for name, value in batch.items()}
    training = model.training
    model.eval()  # batch norm learns nothing from it
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter, autocast(amp, two["images"].device):
        loss_fn(model, two)
    model.train(training)
    trained = sum(p.numel() * (1 if p.requires_grad else -1) for p in model.parameters()) > 0
    return counter.get_total_flops() * (3 if trained else 1) / len(two["images"])


def due(every: int, done: int, total: int) -> bool:
    """True when something that happens every so many epochs (0 = never), and at the end, is to happen."""
    return every > 0 and (done % every == 0 or done == total)


class Meter:
    """Losses of the steps since the last log line, read from the device only then."""

    def __init__(
        self, run: Run, progress: Progress, order: TrainSampler, feed: DevicePrefetcher, last_good: Callable[[], str]
    ):
        self.run, self.epoch, self.order, self.feed, self.last_good = run, progress.epoch, order, feed, last_good
        self.known, self.skipped = list(progress.losses), progress.skipped  # what a resumed run begins with
        self.losses: list[Tensor] = []
        self.start = self.clock = time.perf_counter()
        self.timed, self.waited = 0, 0.0  # steps, seconds since the last log line
        self.peak = peak_tflops(run.args.amp, run.world.device)

    def add(self, loss: Tensor, finite: Tensor) -> None:
        """The loss of a step, and whether its gradient was finite: nothing is learned from it else."""
        self.losses.append(torch.where(finite, loss, math.nan))
        self.timed += 1

    def progress(self, step: int) -> Progress:
        """Where the run is after so many steps of the epoch; reads the losses from the device."""
        if self.losses:
            self.known += (self.run.world.sum(torch.stack(self.losses)) / self.run.world.size).tolist()
            self.losses = []
        return Progress(self.epoch, step, tuple(self.known), self.skipped)

    def read(self, step: int, lr: float, grad_norm: Tensor) -> None:
        """Log the steps up to this one (counted from 1 in the epoch)."""
        run, steps = self.run, self.order.steps
        losses, norm = self.progress(step).losses, grad_norm.item()
        done, total = self.epoch * steps + step, run.args.epochs * steps
        self.report_skipped(done, losses)
        good = [loss for loss in losses if math.isfinite(loss)]
        now = time.perf_counter()
        seconds, waited = now - self.clock, self.feed.waited - self.waited
        record = {
            "step": done,
            "epoch": done / steps,
            "loss": sum(good) / len(good) if good else None,
            "lr": lr,
            "grad_norm": norm if math.isfinite(norm) else None,
            "images_per_s": self.timed * run.batch / seconds,
            "data_wait": waited / seconds,
            **self.speed(self.timed * run.batch / run.world.size / seconds),
            "memory_gib": peak_memory(run.world.device),
        }
        run.log.scalars(record)
        run.log.progress(done, total, record, (total - done) * seconds / self.timed)
        self.known, self.timed, self.clock, self.waited = [], 0, now, self.feed.waited

    def report_skipped(self, done: int, losses: Sequence[float]) -> None:
        """Name the samples of steps whose update was skipped; too many of them in a row end the run, on every rank."""
        run, most = self.run, self.run.args.max_skipped
        for step, loss in enumerate(losses, start=done - len(losses) + 1):
            self.skipped = 0 if math.isfinite(loss) else self.skipped + 1
            if not self.skipped:
                continue
            samples = self.order.samples(*divmod(step - 1, self.order.steps)).tolist()
            run.log.scalars({"step": done, "epoch": done / self.order.steps, "skipped_step": step, "samples": samples})
            run.log.info(
                f"warning: step {step}: loss or gradient is not finite, the update is skipped; samples "
                f"{' '.join(map(str, samples[:8]))}{' ...' if len(samples) > 8 else ''}; --replay {step} looks into it"
            )
            if self.skipped > most:
                raise FloatingPointError(
                    f"loss or gradient is not finite up to step {step}, more than --max_skipped {most} in a row; "
                    f"{self.last_good()}; --replay {step - self.skipped + 1} looks into the first, a lower --blr may help"
                )

    def speed(self, images_per_s: float) -> dict[str, float]:
        """TFLOP/s of a rank, and their share of what its device could do, where that is known."""
        tflops = images_per_s * (self.run.log.flops or 0) / 1e12
        return {"tflops": tflops} | ({"peak_share": tflops / self.peak} if self.peak else {})

    def first_step(self, loss: Tensor) -> None:
        """Say how long the first step of the run took: with --compile, minutes."""
        loss.item()
        self.run.log.info(f"first step: {time.perf_counter() - self.start:.1f} s with its data")

    def close(self, workers: int) -> Progress:
        """The end of the epoch; say what to do if it waited for its data."""
        share = self.feed.waited / (time.perf_counter() - self.start)
        if share > 0.1:
            self.run.log.info(
                f"warning: {share:.0%} of epoch {self.epoch + 1} went into waiting for data: raise --num_workers "
                f"({workers} now); pre-training can read a packed cache (`python -m util.cache build`, docs/data.md)"
            )
        return self.progress(self.order.steps)
