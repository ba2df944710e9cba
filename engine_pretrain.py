"""The training loop: the loss of a batch, one epoch, the optimiser step."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from debug_step import replay
from util.checkpoint.resume import Progress
from util.checkpoint.saver import Saver, statistics
from util.data.batches import DevicePrefetcher
from util.dist import autocast
from util.files import write_atomic
from util.lr_sched import set_lr
from util.meters import Meter, step_flops
from util.rng import seed_everything, step_seed
from util.run import Run


def pretrain_loss(normalize: Callable) -> Callable[[nn.Module, dict], Tensor]:
    """(model, batch) -> the loss of the batch."""

    def loss(model: nn.Module, batch: dict) -> Tensor:
        return model(normalize(batch), batch["noise"])[0]

    return loss


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
    order: Any = loader.batch_sampler  # a TrainSampler
    if progress.step == order.steps:  # it was saved when only the evaluation was left
        return progress
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    running = statistics(model)
    order.start(epoch, progress.step)
    feed = DevicePrefetcher(loader, world.device, order.parts)
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


def report_bad_images(run: Run, feed: DevicePrefetcher) -> None:
    """Add the images that no rank could read to OUTPUT_DIR/bad_images.txt, each once."""
    found = {path: reason for bad in run.world.gather(feed.bad) for path, reason in bad}
    feed.bad = []
    if found and run.world.is_main and not run.args.replay:
        listed = run.folder / "bad_images.txt"
        known = listed.read_text(errors="surrogateescape").splitlines() if listed.exists() else []
        lines = sorted({*known, *(f"{path}\t{reason}" for path, reason in found.items())})
        with suppress(OSError):  # a full disk ends no run
            write_atomic(listed, ("\n".join(lines) + "\n").encode(errors="surrogateescape"))  # names need not be UTF-8
        run.log.info(f"{len(found)} images could not be read and were replaced; {listed} names {len(lines)} so far")
