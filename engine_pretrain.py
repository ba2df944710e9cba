"""The training loop of all scripts that train: loss of a batch, optimiser step, epoch.

Masks, crops and flips are drawn by the loader (util/data/samples.py), so that each depends on (seed, epoch, sample) alone.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util.checkpoint.resume import Progress, running_statistics
from util.checkpoint.saver import Saver
from util.data.batches import DevicePrefetcher
from util.dist import autocast
from util.lr_sched import set_lr
from util.meters import Meter
from util.rng import seed_everything, step_seed
from util.run import Run

LossFn = Callable[[nn.Module, dict], Tensor]  # (model, batch on the device) -> mean loss of the batch


def pretrain_loss(normalize: Callable[[dict], Tensor]) -> LossFn:
    """Loss of MAE and PixMIM; `normalize` turns a batch of uint8 into normalised images."""

    def loss(model: nn.Module, batch: dict) -> Tensor:
        return model(normalize(batch), batch["noise"])[0]

    return loss


class TrainState(NamedTuple):
    """Everything that a training step needs."""

    run: Run
    model: Any  # as it is saved
    wrapped: Any  # the same parameters, compiled and distributed
    optimizer: Any
    scaler: torch.amp.GradScaler
    loss_fn: LossFn
    loader: Any  # DataLoader or ThreadLoader
    meter: Meter


def prepare_training(run: Run, model: nn.Module, optimizer, loss_fn: LossFn, loader) -> TrainState:
    """Compile and distribute the model, create the loss scaler and the meter."""
    scaler = torch.amp.GradScaler(run.world.device.type, enabled=run.args.amp == "fp16")  # bf16 and float32 need none
    meter = Meter(run, partial(loss_fn, model), model)
    return TrainState(run, model, wrap_model(model, run), optimizer, scaler, loss_fn, loader, meter)


def wrap_model(model: nn.Module, run: Run) -> nn.Module:
    """The model with torch.compile (--compile) and DistributedDataParallel (several ranks); parameters are shared.

    DDP replaces the buffers of every rank, batch-norm statistics included, by those of rank 0: call this before a checkpoint
    is loaded.
    """
    wrapped: Any = torch.compile(model, dynamic=False) if run.args.compile else model
    if run.world.size > 1:
        ids = [run.world.device.index] if run.world.device.type == "cuda" else None
        # static_graph does not work with no_sync in the first step, which accumulation needs
        wrapped = DistributedDataParallel(wrapped, ids, gradient_as_bucket_view=True, static_graph=run.accum_iter == 1)
        wrapped.broadcast_buffers = False  # constants; the probe averages its batch-norm statistics itself
    return wrapped


def make_gradient_nan(loss: Tensor) -> Tensor:
    """The loss if it is finite; otherwise nan with a gradient of nan in every parameter, so that every rank sees it."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def optimizer_step(optimizer: Any, scaler: torch.amp.GradScaler, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Update the parameters and clear the gradients; returns the gradient norm.

    If the norm is not finite nothing is updated. The host does not wait for the device to find out.
    """
    scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if scaler.is_enabled():  # the scaler checks for itself
        scaler.step(optimizer)
        scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~norm.isfinite()).float()  # a fused optimiser skips the update on the device
        optimizer.step()
    elif norm.isfinite():  # LARS and Muon: this waits for the device
        optimizer.step()
    optimizer.zero_grad()
    return norm


def train_step(state: TrainState, batches: Iterator[dict], epoch: int, step: int) -> tuple[Tensor, Tensor]:
    """One update from the next `accum_iter` batches; returns (loss, gradient norm), scalars still on the device."""
    run, steps = state.run, state.loader.batch_sampler.steps
    set_lr(state.optimizer, run.lr_at(epoch + step / steps), epoch)
    statistics = running_statistics(state.model)
    before = [value.clone() for value in statistics]
    losses = []
    for micro in range(run.accum_iter):
        batch = next(batches)
        # dropout and mixup depend on (seed, step, rank) alone: a resumed run equals an uninterrupted one
        seed_everything(step_seed(run.args.seed, (epoch * steps + step) * run.accum_iter + micro, run.world.rank))
        is_last = micro == run.accum_iter - 1  # ranks exchange gradients only then
        with nullcontext() if is_last or run.world.size == 1 else state.wrapped.no_sync():
            with autocast(run.args.amp, run.world.device):
                loss = state.loss_fn(state.wrapped, batch) / run.accum_iter
            state.scaler.scale(make_gradient_nan(loss)).backward()
        losses.append(loss.detach())
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    norm = optimizer_step(state.optimizer, state.scaler, parameters)
    for value, old in zip(statistics, before, strict=True):  # a skipped update leaves no trace
        value.copy_(torch.where(norm.isfinite(), value, old))
    return torch.stack(losses).sum(), norm


def train_one_epoch(state: TrainState, progress: Progress, saver: Saver) -> Progress:
    """Train from `progress` to the end of its epoch; returns the position reached."""
    run, sampler, meter, epoch = state.run, state.loader.batch_sampler, state.meter, progress.epoch
    if progress.step == sampler.steps:  # only the evaluation of this epoch is left
        return progress
    sampler.start(epoch, progress.step)
    prefetcher = DevicePrefetcher(state.loader, run.world.device, sampler.parts)
    batches = meter.start_epoch(progress, prefetcher, sampler, saver.describe_last_save)
    state.wrapped.train()
    for step in range(progress.step, sampler.steps):
        loss, norm = train_step(state, batches, epoch, step)
        meter.add(loss, norm)
        if (step + 1) % run.args.log_every == 0 or step + 1 == sampler.steps:
            meter.log(step + 1, norm)
        if step + 1 < sampler.steps:
            saver.after_step(partial(meter.position, step + 1))
    return meter.end_epoch(state.loader.num_workers)
