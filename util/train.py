"""One epoch of training, the same for pre-training, probing and fine-tuning."""

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from util.checkpoint import Progress, Saver, statistics
from util.data import Feed, TrainOrder
from util.dist import autocast
from util.files import write_whole
from util.lr_sched import set_lr
from util.replay import replay
from util.rng import seed_everything, step_seed
from util.run import Run

PEAK_TFLOPS = {  # dense matrix products in half precision, as the makers state them; the first name that fits counts
    "H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "A10G": 70, "A10": 125, "L40S": 362, "L4": 121,
    "V100": 125, "T4": 65, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
ATTENTION_FLOPS = {  # torch counts those of GPUs alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


def grad_scaler(run: Run) -> torch.amp.GradScaler:
    """Loss scaler; it does nothing but for fp16."""
    return torch.amp.GradScaler(run.world.device.type, enabled=run.args.amp == "fp16")


def wrap(model: nn.Module, run: Run) -> nn.Module:
    """The model as it is trained: compiled, then one of several ranks. Its parameters stay those of `model`.

    A run is resumed after that: the ranks begin with what rank 0 has, statistics of batch norms included.
    """
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

    def __init__(self, run: Run, progress: Progress, order: TrainOrder, feed: Feed, last_good: Callable[[], str]):
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
            run.log.say(
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
        self.run.log.say(f"first step: {time.perf_counter() - self.start:.1f} s with its data")

    def close(self, workers: int) -> Progress:
        """The end of the epoch; say what to do if it waited for its data."""
        share = self.feed.waited / (time.perf_counter() - self.start)
        if share > 0.1:
            self.run.log.say(
                f"warning: {share:.0%} of epoch {self.epoch + 1} went into waiting for data: raise --num_workers "
                f"({workers} now); pre-training can read a packed cache (`python -m util.cache build`, docs/data.md)"
            )
        return self.progress(self.order.steps)


def update(optimizer: Any, scaler: torch.amp.GradScaler, parameters: Iterable[nn.Parameter]) -> Tensor:
    """A step of the optimiser; where the norm of the gradient, which is returned, is not finite nothing changes.

    The host need not know, so it does not wait for the device.
    """
    scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if scaler.is_enabled():  # it looks for itself
        scaler.step(optimizer)
        scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~norm.isfinite()).float()  # as the scaler tells a fused optimiser
        optimizer.step()
    elif norm.isfinite():  # LARS: the device is waited for, but a probe has little to do
        optimizer.step()
    optimizer.zero_grad()
    return norm


def train_one_epoch(
    run: Run,
    model: Any,
    loader: Any,  # DataLoader or ThreadLoader
    optimizer,
    scaler,
    loss_fn: Callable,
    progress: Progress,
    saver: Saver,
) -> Progress:
    """Train from `progress` to the end of its epoch, and say where the run is then.

    `loss_fn(model, batch)` gives the mean loss of a batch on the device. A step is `--accum_iter` batches on each rank.
    """
    args, world, epoch = run.args, run.world, progress.epoch
    order: Any = loader.batch_sampler  # a TrainOrder
    if progress.step == order.steps:  # it was saved when only the evaluation was left
        return progress
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    running = statistics(model)
    order.start(epoch, progress.step)
    feed = Feed(loader, world.device, order.parts)
    meter = Meter(run, progress, order, feed, saver.last_good)
    batches = iter(feed)
    first = run.log.flops is None
    model.train()
    for step in range(progress.step, order.steps):
        done = epoch * order.steps + step
        if args.replay == done + 1:
            replay(run, model, loss_fn, [next(batches) for _ in range(args.accum_iter)], loader.dataset.source, done)
        lr = run.lr_at(epoch + step / order.steps)
        set_lr(optimizer, lr)
        losses, before = [], [value.clone() for value in running]
        for micro in range(args.accum_iter):
            batch = next(batches)
            if run.log.flops is None:
                run.log.flops = step_flops(model, loss_fn, batch, args.amp)
            seed_everything(step_seed(args.seed, done * args.accum_iter + micro, world.rank))
            last = micro == args.accum_iter - 1  # the ranks exchange gradients only then
            with nullcontext() if last or world.size == 1 else model.no_sync():
                with autocast(args.amp, world.device):
                    loss = loss_fn(model, batch) / args.accum_iter
                scaler.scale(spread_to_gradient(loss)).backward()
            losses.append(loss.detach())
        grad_norm = update(optimizer, scaler, parameters)
        finite = grad_norm.isfinite()
        for value, old in zip(running, before, strict=True):
            value.copy_(torch.where(finite, value, old))
        loss = torch.stack(losses).sum()
        meter.add(loss, finite)
        if first:
            meter.first_step(loss)
            first = False
        if (step + 1) % args.log_every == 0 or step + 1 == order.steps:
            meter.read(step + 1, lr, grad_norm)
        if step + 1 < order.steps:
            saver.after_step(partial(reached, meter, step + 1))
    reached(meter, order.steps)
    return meter.close(loader.num_workers)


def spread_to_gradient(loss: Tensor) -> Tensor:
    """The loss; one that is not finite makes the whole gradient nan, so that all ranks know of it."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def reached(meter: Meter, step: int) -> Progress:
    """Where the run is, everything about the steps before written down."""
    report_bad_images(meter.run, meter.feed)
    return meter.progress(step)


def report_bad_images(run: Run, feed: Feed) -> None:
    """Add the images that no rank could read to OUTPUT_DIR/bad_images.txt, each once."""
    found = {path: reason for bad in run.world.gather(feed.bad) for path, reason in bad}
    feed.bad = []
    if found and run.world.leads and not run.args.replay:
        listed = run.folder / "bad_images.txt"
        known = listed.read_text(errors="surrogateescape").splitlines() if listed.exists() else []
        lines = sorted({*known, *(f"{path}\t{reason}" for path, reason in found.items())})
        with suppress(OSError):  # a full disk ends no run
            write_whole(listed, ("\n".join(lines) + "\n").encode(errors="surrogateescape"))  # names need not be UTF-8
        run.log.say(f"{len(found)} images could not be read and were replaced; {listed} names {len(lines)} so far")
