"""Everything that needs a GPU, in about ten minutes: `make gpu`, or `python -m benchmarks.gpu`.

Runs the tests marked `gpu`, 20 steps of the shape of each pre-training recipe, and the benchmarks of the step and of data
loading. Prints a report and adds it to benchmarks/GPU.md. Exit status 1 if there is no GPU, or if anything fails.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from timm.optim import param_groups_weight_decay

from benchmarks.memory import get_parser, measure
from benchmarks.results import TABLE, describe_machine
from engine_pretrain import make_gradient_nan, optimizer_step, pretrain_loss
from models import build_model
from util.args import resolve_defaults, run_main
from util.data.transforms import Normalize
from util.dist import autocast
from util.meters import image_flops, peak_memory, peak_tflops
from util.run import versions

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "benchmarks" / "GPU.md"
COLUMNS = ["recipe", "batch", "loss", "ms a step", "images/s", "share of peak", "target", "GiB", "predicted"]
COMMANDS = [
    ["pytest", "-q", "-m", "gpu"],
    ["benchmarks.throughput", "--batch_size", "64", "256", "512", "--compile", "--append", str(REPORT)],
    ["benchmarks.loading", "--append", str(REPORT)],
]


def recipes() -> list[Path]:
    """Pre-training recipes of full size."""
    paths = sorted((ROOT / "recipes").glob("pretrain_*.args"))
    return [path for path in paths if not path.stem.endswith(("clothing10", "96px", "photos", "800e"))]


def time_steps(recipe: Path, device: torch.device, capacity: float, steps: int = 20) -> tuple[list[str], bool]:
    """(Row of the report, True if the loss fell) of steps on one random batch.

    Activations are recomputed if the step needs more than `capacity` GiB otherwise.
    """
    args = resolve_defaults(get_parser().parse_args([f"@{recipe}"]))
    predicted = measure(args, args.batch_size)["peak"]
    if predicted > capacity:
        args = Namespace(**vars(args) | {"grad_checkpointing": True})
        predicted = measure(args, args.batch_size)["peak"]
    torch.manual_seed(0)
    model, normalize = build_model(args).to(device), Normalize(args, device)
    shape = args.batch_size, *args.input_size, args.in_chans
    batch = {"images": torch.randint(256, shape, dtype=torch.uint8, device=device)}
    batch["noise"] = torch.rand(args.batch_size, model.noise_length, device=device)
    loss_fn = partial(pretrain_loss(normalize), model)
    flops = image_flops(model, loss_fn, batch, args.amp) * args.batch_size
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), 1e-3, betas=(0.9, 0.95), fused=True)
    scaler, losses = torch.amp.GradScaler(device.type, enabled=False), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(steps):
        if step == steps // 2:  # the first ones choose kernels
            losses[-1].item()
            start = time.perf_counter()
        with autocast(args.amp, device):
            loss = loss_fn(batch)
        make_gradient_nan(loss).backward()
        optimizer_step(optimizer, scaler, model.parameters())
        losses.append(loss.detach())
    first, last = losses[0].item(), losses[-1].item()
    seconds = (time.perf_counter() - start) / (steps - steps // 2)
    memory, images, start = peak_memory(device), normalize(batch), time.perf_counter()
    model.target(images).sum().item()
    share, peak = (time.perf_counter() - start) / seconds, peak_tflops(args.amp, device)
    checkpointing = " (checkpointing)" if args.grad_checkpointing else ""
    row = [
        recipe.stem + checkpointing, f"{args.batch_size}", f"{first:.4f} -> {last:.4f}", f"{1000 * seconds:.0f}",
        f"{args.batch_size / seconds:.0f}", f"{flops / seconds / 1e12 / peak:.1%}" if peak else "", f"{share:.1%}",
        f"{memory:.1f}", f"{predicted:.1f}",
    ]  # fmt: skip
    return row, last < first


def describe(device: torch.device) -> Iterator[str]:
    """Device, versions and what is missing."""
    yield f"{describe_machine(device)}; {json.dumps(versions() | {'cuda': torch.version.cuda})}"
    missing = [name for name in ("nvcc", "gcc") if not shutil.which(name)] + ["triton"] * (not find_spec("triton"))
    yield f"missing: {', '.join(missing) or 'nothing'} (--compile needs gcc and triton)"


def report(line: str) -> None:
    """Print a line and add it to REPORT."""
    print(line, flush=True)
    with REPORT.open("a") as file:
        file.write(f"{line}\n")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if not torch.cuda.is_available():
        raise ValueError("torch finds no GPU: nothing was measured; see docs/gpu.md for what is tested without one")
    device, failed = torch.device("cuda", 0), []
    report(f"\n## {date.today().isoformat()}\n")
    for line in describe(device):
        report(f"- {line}")
    report(f"\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for recipe in recipes():
        capacity = 0.9 * torch.cuda.get_device_properties(device).total_memory / 2**30 - 1
        try:
            row, fell = time_steps(recipe, device, capacity)
        except RuntimeError as error:
            row, fell = [recipe.stem, str(error).splitlines()[0]], False
        report(f"| {' | '.join(row)} |")
        failed += [] if fell else [recipe.stem]
    report(f"\n{TABLE.strip()}")  # rows of the benchmarks
    for module, *words in COMMANDS:
        done = subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True)
        print(done.stdout[-3000:], done.stderr[-3000:], flush=True)
        failed += [module] if done.returncode else []
    report(f"\n- tests marked `gpu` and all above: {'failed: ' + ', '.join(failed) if failed else 'passed'}")
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}; see {REPORT} and the output above")


if __name__ == "__main__":
    run_main(main)
