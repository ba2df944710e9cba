"""Speed, memory and losses of a run: collected at every step, logged every --log_every steps."""

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from util.checkpoint.resume import Progress
from util.data.batches import DevicePrefetcher
from util.dist import World, autocast
from util.files import printable, write_atomic
from util.run import Run

PEAK_TFLOPS = {  # dense matrix products in half precision, from the vendors' data sheets; the first name that matches counts
    "H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "A10G": 70, "A10": 125, "L40S": 362, "L4": 121,
    "V100": 125, "T4": 65, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
ATTENTION_FLOPS = {  # torch counts attention on GPUs only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: of a GPU since its last reset, on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def peak_tflops(amp: str, device: torch.device) -> float | None:
    """Peak TFLOP/s of the device at --amp; None if unknown."""
    if device.type != "cuda" or amp == "off":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in PEAK_TFLOPS.items() if re.search(rf"\b{model}\b", name)), None)


@torch.no_grad()
def image_flops(model: nn.Module, loss_fn: Callable[[dict], Tensor], batch: dict, amp: str) -> float:
    """Floating-point operations of a training step per image: matrix products and convolutions, forward and backward.

    Backward counts as twice forward if most parameters are trained, else as nothing (the probe's encoder). Recomputed
    activations are not counted.
    """
    two = {name: value[:2] for name, value in batch.items()}
    training = model.training
    model.eval()  # batch-norm statistics stay unchanged
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter, autocast(amp, two["images"].device):
        loss_fn(two)
    model.train(training)
    trained = sum(p.numel() * (1 if p.requires_grad else -1) for p in model.parameters()) > 0
    return counter.get_total_flops() * (3 if trained else 1) / len(two["images"])


def log_bad_images(world: World, prefetchers: Collection[DevicePrefetcher], run: Run | None = None) -> dict[str, int]:
    """{"unreadable": number of images that any rank could not read}, or {} without any; forgets them.

    Each is added once, with the reason, to OUTPUT_DIR/bad_images.txt, or printed to stderr without a run.
    """
    bad = [image for prefetcher in prefetchers for image in prefetcher.bad]
    for prefetcher in prefetchers:
        prefetcher.bad = []
    found = {name: reason for rank in world.gather(bad) for name, reason in rank}
    if found and world.is_main and run is None:
        for name, reason in found.items():
            print(printable(f"left out: {name}: {reason}"), file=sys.stderr)
    elif found and world.is_main and run:
        path = run.folder / "bad_images.txt"
        known = path.read_text(errors="surrogateescape").splitlines() if path.exists() else []
        lines = sorted({*known, *(f"{name}\t{reason}" for name, reason in found.items())})
        with suppress(OSError):  # a full disk does not end the run
            write_atomic(path, ("\n".join(lines) + "\n").encode(errors="surrogateescape"))  # names need not be UTF-8
        run.log.info(f"warning: {len(found)} unreadable images; {path} lists {len(lines)} so far")
    return {"unreadable": len(found)} if found else {}


class Meter:
    """Losses of the steps since the last log line, which are read from the device only when they are logged."""

    def __init__(self, run: Run, loss_fn: Callable[[dict], Tensor], model: nn.Module):
        self.run, self.loss_fn, self.model = run, loss_fn, model
        self.flops: float | None = None  # per image, counted on the first batch of each size
        self.size: torch.Size | None = None
        self.first_step = True
        self.peak = peak_tflops(run.args.amp, run.world.device)

    def start_epoch(self, progress: Progress, prefetcher, sampler, describe_last_save: Callable) -> Iterator[dict]:
        """Start measuring an epoch at `progress`; returns its batches."""
        self.epoch, self.prefetcher, self.sampler = progress.epoch, prefetcher, sampler
        self.describe_last_save = describe_last_save
        self.known, self.skipped = list(progress.losses), progress.skipped  # from before a resume
        self.losses: list[Tensor] = []
        self.start = self.clock = time.perf_counter()
        self.timed, self.waited = 0, 0.0  # steps and seconds of data wait at the last log line
        return self.count_flops(iter(prefetcher))

    def count_flops(self, batches: Iterator[dict]) -> Iterator[dict]:
        """The same batches; the first one of each image size is used to count the FLOPs of a step."""
        for batch in batches:
            if self.size != batch["images"].shape[1:]:
                self.size = batch["images"].shape[1:]
                self.flops = image_flops(self.model, self.loss_fn, batch, self.run.args.amp)
            yield batch

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Record the loss of a step: nan if the update was skipped, inf if only because fp16 gradients overflowed.

        Reports the duration of the run's first step.
        """
        skipped = torch.where(loss.isfinite(), math.inf, math.nan) if self.run.args.amp == "fp16" else math.nan
        self.losses.append(torch.where(grad_norm.isfinite(), loss, skipped))
        self.timed += 1
        if self.first_step:
            loss.item()
            self.run.log.info(f"first step: {time.perf_counter() - self.start:.1f} s including its data")
            self.first_step = False

    def position(self, step: int) -> Progress:
        """Position after this many steps of the epoch; losses are read from the device, bad images are listed."""
        log_bad_images(self.run.world, [self.prefetcher], self.run)
        return self.read_losses(step)

    def read_losses(self, step: int) -> Progress:
        """Position after this many steps of the epoch, with the mean losses over the ranks."""
        if self.losses:
            self.known += (self.run.world.sum(torch.stack(self.losses)) / self.run.world.size).tolist()
            self.losses = []
        return Progress(self.epoch, step, tuple(self.known), self.skipped)

    def log(self, step: int, grad_norm: Tensor) -> None:
        """Log the steps up to this one, counted from 1 in the epoch."""
        run, steps = self.run, self.sampler.steps
        losses, norm = self.read_losses(step).losses, grad_norm.item()
        done, total = self.epoch * steps + step, run.args.epochs * steps
        self.report_skipped(done, losses)
        finite = [loss for loss in losses if math.isfinite(loss)]
        now = time.perf_counter()
        seconds, waited = now - self.clock, self.prefetcher.waited - self.waited
        images_per_s = self.timed * run.batch / seconds
        record = {
            "step": done, "epoch": done / steps, "loss": sum(finite) / len(finite) if finite else None,
            "lr": run.lr_at(self.epoch + (step - 1) / steps), "grad_norm": norm if math.isfinite(norm) else None,
            "images_per_s": images_per_s, "data_wait": waited / seconds, **self.speed(images_per_s / run.world.size),
            "memory_gib": peak_memory(run.world.device),
        }  # fmt: skip
        run.log.scalars(record)
        run.log.progress(done, total, record, (total - done) * seconds / self.timed)
        self.known, self.timed, self.clock, self.waited = [], 0, now, self.prefetcher.waited

    def report_skipped(self, done: int, losses: Sequence[float]) -> None:
        """Log the images of skipped steps; FloatingPointError, on every rank, after more than --max_skipped in a row."""
        run, limit, steps = self.run, self.run.args.max_skipped, self.sampler.steps
        for step, loss in enumerate(losses, start=done - len(losses) + 1):
            self.skipped = 0 if math.isfinite(loss) else self.skipped + 1
            if not self.skipped:
                continue
            if loss == math.inf and self.skipped <= limit:
                run.log.info(f"step {step}: gradients overflowed in fp16, update skipped, loss scale halved")
                continue
            samples = self.sampler.samples(*divmod(step - 1, steps)).tolist()
            run.log.scalars({"step": done, "epoch": done / steps, "skipped_step": step, "samples": samples})
            run.log.info(
                f"warning: step {step}: loss or gradient is not finite, update skipped; samples "
                f"{' '.join(map(str, samples[:8]))}{' ...' if len(samples) > 8 else ''}; to inspect it: "
                f"python debug_step.py {run.folder} {step}"
            )
            if self.skipped > limit:
                raise FloatingPointError(
                    f"loss or gradient is not finite at step {step}, more than --max_skipped {limit} times in a row; "
                    f"{self.describe_last_save()}; try a lower --blr, or inspect the first one: "
                    f"python debug_step.py {run.folder} {step - self.skipped + 1}"
                )

    def speed(self, images_per_s: float) -> dict[str, float]:
        """TFLOP/s of a rank, and their share of its device's peak if that is known."""
        tflops = images_per_s * (self.flops or 0) / 1e12
        return {"tflops": tflops} | ({"peak_share": tflops / self.peak} if self.peak else {})

    def end_epoch(self, workers: int) -> Progress:
        """Position at the end of the epoch; warns if much of it was spent waiting for data."""
        progress = self.position(self.sampler.steps)
        share = self.prefetcher.waited / (time.perf_counter() - self.start)
        if share > 0.1:
            self.run.log.info(
                f"warning: {share:.0%} of epoch {self.epoch + 1} was spent waiting for data: raise --num_workers "
                f"({workers} now), or pre-train from a packed cache (`python -m util.cache build`, docs/data.md)"
            )
        return progress
