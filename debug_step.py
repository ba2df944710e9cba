"""python debug_step.py RUN STEP: compute a training step again and report what is not finite.

STEP counts from 1, as the log's `skipped_step`. The step is reached by training from the newest checkpoint in RUN that
was saved before it, else from the initial weights. Nothing in RUN is changed; RUN/debug-STEP.pth receives the batch and
the weights before the step. A run on several ranks needs torchrun with as many ranks; each computes its own share.
"""

import importlib
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine_pretrain import TrainState, train_step
from util.args import Parser, number, resolve_defaults, run_main
from util.checkpoint.resume import Progress, average_statistics, find_checkpoint, load_checkpoint
from util.checkpoint.state import copy_to_host
from util.data.batches import DevicePrefetcher
from util.dist import autocast, init_world
from util.files import write_atomic
from util.formats.keys import mae_names
from util.log import Log
from util.rng import seed_everything, step_seed
from util.run import Run, read_config

# a flag that only this script has, in this order -> script
SCRIPTS = {
    "mask_column": "main_segment",
    "probe_as": "main_linprobe",
    "layer_decay": "main_finetune",
    "mask_ratio": "main_pretrain",
}


def find_nonfinite_rows(value: Any, count: int) -> list[int]:
    """Rows of a tensor that hold nan or inf; all `count` of them if the tensor has another number of rows."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.isfinite().all():
        return []
    if value.ndim == 0 or len(value) != count:
        return list(range(count))
    return (~value.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()


@contextmanager
def record_nonfinite(model: nn.Module, count: int) -> Iterator[list[tuple[str, list[int]]]]:
    """List that is filled with (layer, rows) of every output that is not finite, in order of computation."""
    found: list[tuple[str, list[int]]] = []

    def inspect(name: str, module: nn.Module, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if rows := find_nonfinite_rows(first, count):
            found.append((name or type(module).__name__, rows))

    hooks = [module.register_forward_hook(partial(inspect, name)) for name, module in model.named_modules()]
    yield found
    for hook in hooks:
        hook.remove()


def inspect_step(state: TrainState, batches: Iterator[dict], epoch: int, step: int) -> list[str]:
    """Compute a step without updating anything; returns the report and writes debug-STEP.pth."""
    run, model, sampler = state.run, state.model, state.loader.batch_sampler
    done, lines, kept = epoch * sampler.steps + step, [], []
    weights = copy_to_host(mae_names(model.state_dict()))  # the step changes running statistics
    for micro in range(run.accum_iter):
        batch = next(batches)
        images = [state.loader.dataset.source.name(i) for i in batch["index"].tolist()]
        seed_everything(step_seed(run.args.seed, done * run.accum_iter + micro, run.world.rank))
        with record_nonfinite(model, len(images)) as found, autocast(run.args.amp, run.world.device):
            loss = state.loss_fn(model, batch)
        state.scaler.scale(loss / run.accum_iter).backward()
        kept.append({name: value.cpu() for name, value in batch.items()})
        where = f"batch {micro + 1} of {run.accum_iter} on rank {run.world.rank}"
        lines.append(f"step {done + 1}, {where}: {len(images)} images, loss {loss.item():.6g}")
        if found:
            layer, rows = found[0]
            listed = ", ".join(f"{batch['index'][i]} {images[i]}" for i in rows)
            lines.append(f"first output that is not finite: {layer}, images {listed}")
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wrong = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    scale = state.scaler.get_scale()  # 1 without fp16
    norm = nn.utils.get_total_norm(list(gradients.values())).item() / scale
    names = f"{len(wrong)} of {len(gradients)} gradients: {' '.join(wrong[:8]) or 'none'}"
    lines.append(f"gradient norm of this rank {norm:.6g}, loss scale {scale:g}; not finite: {names}")
    suffix = f"-rank{run.world.rank}" if run.world.rank else ""
    path = run.folder / f"debug-{done + 1}{suffix}.pth"
    write_atomic(path, partial(torch.save, {"batches": kept, "model": weights, "step": done + 1}))
    return [*lines, f"{path} holds the batch and the weights before the step"]


def open_run(folder: Path, config: dict, args: Namespace) -> Run:
    """The run in a folder, with its batch and number of ranks, but without a log."""
    world, ranks = init_world(args.device, args.amp, args.timeout_minutes), config["world_size"]
    if world.size != ranks:
        command = f"torchrun --nproc_per_node={ranks} debug_step.py ..." if ranks > 1 else "python debug_step.py ..."
        raise ValueError(f"RUN {folder} had {ranks} ranks, not {world.size}; use {command}")
    torch.manual_seed(args.seed)
    batch_size = config.get("batch_size", args.batch_size)
    accum_iter = config["batch"] // (batch_size * ranks)
    return Run(args, world, Log(folder, False), folder, batch_size, accum_iter, config["lr"])


def run_until(state: TrainState, progress: Progress, last: int) -> list[str]:
    """Train from `progress` to the step before `last`, then inspect that one; returns the reports of all ranks."""
    sampler, world = state.loader.batch_sampler, state.run.world
    for epoch in range(progress.epoch, -(-last // sampler.steps)):
        if epoch > progress.epoch:  # as at the end of an epoch of the run
            average_statistics(state.model, world)
        start = progress.start_of(epoch).step
        sampler.start(epoch, start)
        batches = iter(DevicePrefetcher(state.loader, world.device, sampler.parts))
        state.wrapped.train()
        for step in range(start, min(sampler.steps, last - 1 - epoch * sampler.steps)):
            train_step(state, batches, epoch, step)
    lines = inspect_step(state, batches, *divmod(last - 1, sampler.steps))
    return [line for reported in world.gather(lines) for line in reported]


def get_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="output folder of a script that trains")
    parser.add_argument("step", metavar="STEP", type=number(int, 1), help="step of the run, counted from 1")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto = GPU if available")
    return parser


def main() -> None:
    requested = get_parser().parse_args()
    config = read_config(requested.run)
    known = config.get("args", {})
    script = next((script for flag, script in SCRIPTS.items() if flag in known), None)
    if script is None:
        raise ValueError(f"{requested.run / 'config.json'} is missing or damaged; RUN is the --output_dir of a run")
    known |= {"input_size": tuple(known["input_size"])}
    module = importlib.import_module(script)
    defaults = {action.dest: action.default for action in module.get_parser()._actions}  # of flags that the run lacked
    args = resolve_defaults(Namespace(**defaults | known | {"device": requested.device}))
    state, _ = module.setup(args, partial(open_run, requested.run, config))
    run, steps = state.run, state.loader.batch_sampler.steps
    if requested.step > args.epochs * steps:
        raise ValueError(f"STEP {requested.step}: the run has {args.epochs * steps} steps")
    source, progress = "the initial weights", Progress(0, 0)
    if found := find_checkpoint(run, steps, before=requested.step):
        path, content, progress = found
        source = str(path)
        load_checkpoint(path, content, run, state.model, state.optimizer, state.scaler)
    lines = [f"trained from {source} to step {requested.step}", *run_until(state, progress, requested.step)]
    if run.world.is_main:
        print("\n".join(lines))
    run.close()


if __name__ == "__main__":
    run_main(main)
