"""One epoch of training, the same for pre-training, probing and fine-tuning."""

import math
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from util.data import Feed
from util.lr_sched import set_lr
from util.rng import seed_everything, step_seed
from util.run import Run

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PEAK_TFLOPS = {  # dense matrix products in half precision, as the makers state them; the first name that fits counts
    "H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "A10G": 70, "A10": 125, "L40S": 362, "L4": 121,
    "V100": 125, "T4": 65, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
ATTENTION_FLOPS = {  # torch counts those of GPUs alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


def autocast(amp: str, device: torch.device):
    """Context of the forward pass at --amp."""
    return torch.autocast(device.type, DTYPES.get(amp), enabled=amp in DTYPES)


def grad_scaler(run: Run) -> torch.amp.GradScaler:
    """Loss scaler; it does nothing but for fp16."""
    return torch.amp.GradScaler(run.world.device.type, enabled=run.args.amp == "fp16")


def wrap(model: nn.Module, run: Run) -> nn.Module:
    """The model as it is trained: compiled, then one of several ranks. Its parameters stay those of `model`."""
    wrapped: Any = torch.compile(model, dynamic=False) if run.args.compile else model
    if run.world.size > 1:
        ids = [run.world.device.index] if run.world.device.type == "cuda" else None
        # Every step uses the same parameters; but DDP counts them in the first step, which accumulation cuts short.
        static = run.args.accum_iter == 1
        wrapped = DistributedDataParallel(wrapped, ids, gradient_as_bucket_view=True, static_graph=static)
        wrapped.broadcast_buffers = False  # they are constants; the probe averages its statistics itself
    return wrapped


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

    def __init__(self, run: Run, epoch: int, steps: int, feed: Feed):
        self.run, self.epoch, self.steps, self.feed = run, epoch, steps, feed
        self.losses: list[Tensor] = []
        self.start = self.clock = time.perf_counter()
        self.waited = 0.0
        self.peak = peak_tflops(run.args.amp, run.world.device)

    def add(self, loss: Tensor) -> None:
        self.losses.append(loss)

    def stop_unless_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            last = self.run.folder / "last.pth"
            good = f"{last} holds the state before epoch {self.epoch}" if last.exists() else "nothing is saved yet"
            raise FloatingPointError(
                f"the {what} is {value} at epoch {self.epoch}, step {step} of {self.steps}; {good}"
            )

    def read(self, step: int, lr: float, grad_norm: Tensor) -> None:
        """Log the steps up to this one (counted from 1 in the epoch); a loss that is not finite ends the run."""
        run = self.run
        losses = (run.world.sum(torch.stack(self.losses)) / run.world.size).tolist()
        norm = grad_norm.item()
        for number, loss in enumerate(losses, start=step - len(losses) + 1):
            self.stop_unless_finite("loss", loss, number)
        if run.args.amp != "fp16":  # its scaler skips such a step
            self.stop_unless_finite("norm of the gradient", norm, step)
        now = time.perf_counter()
        seconds, waited = now - self.clock, self.feed.waited - self.waited
        done, total = self.epoch * self.steps + step, run.args.epochs * self.steps
        record = {
            "step": done,
            "epoch": done / self.steps,
            "loss": sum(losses) / len(losses),
            "lr": lr,
            "grad_norm": norm if math.isfinite(norm) else None,
            "images_per_s": len(losses) * run.batch / seconds,
            "data_wait": waited / seconds,
            **self.speed(len(losses) * run.batch / run.world.size / seconds),
            "memory_gib": peak_memory(run.world.device),
        }
        run.log.scalars(record)
        run.log.progress(done, total, record, (total - done) * seconds / len(losses))
        self.losses, self.clock, self.waited = [], now, self.feed.waited

    def speed(self, images_per_s: float) -> dict[str, float]:
        """TFLOP/s of a rank, and their share of what its device could do, where that is known."""
        tflops = images_per_s * (self.run.log.flops or 0) / 1e12
        return {"tflops": tflops} | ({"peak_share": tflops / self.peak} if self.peak else {})

    def first_step(self, loss: Tensor) -> None:
        """Say how long the first step of the run took: with --compile, minutes."""
        loss.item()
        self.run.log.say(f"first step: {time.perf_counter() - self.start:.1f} s with its data")

    def close(self, workers: int) -> None:
        """Say what to do if the epoch waited for its data."""
        share = self.feed.waited / (time.perf_counter() - self.start)
        if share > 0.1:
            self.run.log.say(
                f"warning: {share:.0%} of epoch {self.epoch + 1} went into waiting for data: raise --num_workers "
                f"({workers} now); pre-training can read a packed cache (`python -m util.cache build`, docs/data.md)"
            )


def train_one_epoch(
    run: Run,
    model: Any,
    loader: DataLoader,
    optimizer,
    scaler,
    loss_fn: Callable,
    epoch: int,
    start_step: int = 0,
) -> None:
    """Train from `start_step` to the end of the epoch.

    `loss_fn(model, batch)` gives the mean loss of a batch on the device. A step is `--accum_iter` batches on each rank.
    """
    args, world = run.args, run.world
    order: Any = loader.batch_sampler  # a TrainOrder
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order.start(epoch, start_step)
    feed = Feed(loader, world.device, order.parts)
    meter = Meter(run, epoch, order.steps, feed)
    batches = iter(feed)
    first = run.log.flops is None
    model.train()
    for step in range(start_step, order.steps):
        lr = run.lr_at(epoch + step / order.steps)
        set_lr(optimizer, lr)
        losses = []
        for micro in range(args.accum_iter):
            batch = next(batches)
            if run.log.flops is None:
                run.log.flops = step_flops(model, loss_fn, batch, args.amp)
            seed_everything(step_seed(args.seed, (epoch * order.steps + step) * args.accum_iter + micro, world.rank))
            last = micro == args.accum_iter - 1  # the ranks exchange gradients only then
            with nullcontext() if last or world.size == 1 else model.no_sync():
                with autocast(args.amp, world.device):
                    loss = loss_fn(model, batch) / args.accum_iter
                scaler.scale(loss).backward()
            losses.append(loss.detach())
        meter.add(torch.stack(losses).sum())
        log_now = (step + 1) % args.log_every == 0 or step + 1 == order.steps
        if log_now:  # the norm is for the eye: it is neither clipped nor computed in other steps
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if first:
            meter.first_step(losses[-1])
            first = False
        if log_now:
            meter.read(step + 1, lr, grad_norm)
    meter.close(loader.num_workers)
    report_bad_images(run, feed)


def report_bad_images(run: Run, feed: Feed) -> None:
    """Add the images that no rank could read to OUTPUT_DIR/bad_images.txt, each once."""
    found = {path: reason for bad in run.world.gather(feed.bad) for path, reason in bad}
    if found and run.world.leads:
        listed = run.folder / "bad_images.txt"
        known = listed.read_text(errors="surrogateescape").splitlines() if listed.exists() else []
        lines = sorted({*known, *(f"{path}\t{reason}" for path, reason in found.items())})
        listed.write_text("\n".join(lines) + "\n", errors="surrogateescape")  # names need not be UTF-8
        run.log.say(f"{len(found)} images could not be read and were replaced; {listed} names {len(lines)} so far")
