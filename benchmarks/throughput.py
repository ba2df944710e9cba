"""How fast is a training step, what is each lever worth, how much of it are matrix products?

`ours` is the step of main_pretrain.py on a batch that is in memory. The others are

- ours without one lever: attention (timm's), optimizer (foreach), projection (of all patches), prediction (of all
  patches), read-back (of the loss, each step); compiled: ours with one lever more;
- baseline, baseline fp32: of a plain ViT, MAE as it is commonly run (baseline_mae.py), on images that its loader has normalised;
- parts of ours: matmuls (nothing but the matrix products of its linear layers), target (what is to be predicted).

All start from the same weights, and all do one step in each round, in an order that rotates: a machine that slows down
slows all of them. A ratio is the median over the rounds of time / time of ours.
"""

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from benchmarks.baseline_mae import baseline_of, baseline_optimizer, baseline_step
from benchmarks.levers import levers_of, without
from benchmarks.products import Products
from benchmarks.results import append, spread
from engine_pretrain import pretrain_loss, update
from models import ENCODERS, build_model
from models_pixmim import MaskedViT, PixMIM
from util.args import (
    Parser,
    add_device_arguments,
    add_method_arguments,
    add_model_arguments,
    number,
    resolve_defaults,
    run_main,
)
from util.data.transforms import Normalize
from util.dist import autocast, init_world

Step = Callable[[dict], object]  # of a batch


def our_step(args, normalize: Normalize, model: nn.Module, fused: bool = True) -> Callable[[dict], Tensor]:
    """Batch -> loss, still on the device: what train_one_epoch does with a batch."""
    groups = param_groups_weight_decay(model, 0.05)
    optimizer = torch.optim.AdamW(groups, 1e-6, betas=(0.9, 0.95), fused=fused, foreach=not fused)
    loss_fn, parameters = pretrain_loss(normalize), list(model.parameters())
    scaler = torch.amp.GradScaler(args.device, enabled=False)

    def step(batch: dict) -> Tensor:
        with autocast(args.amp, batch["images"].device):
            loss = loss_fn(model, batch)
        loss.backward()
        update(optimizer, scaler, parameters)
        return loss.detach()

    return step


def all_steps(args, model: PixMIM, normalize: Normalize) -> dict[str, Step]:
    """Everything that is timed but the matrix products, which a step has to show first."""
    make = partial(our_step, args, normalize)
    ours = make(model)
    steps: dict[str, Step] = {
        "ours": ours,
        **{lever: make(without(lever, model)) for lever in levers_of(model)},
        "optimizer": make(deepcopy(model), fused=False),
        "read-back": lambda batch: ours(batch).item(),
        "target": lambda batch: model.target(batch["normalised"]),
    }
    if type(model.encoder) is MaskedViT:  # of the other hosts there is no common way
        baseline = baseline_of(model)
        optimizer = baseline_optimizer(baseline)
        steps["baseline"] = partial(baseline_step, baseline, optimizer, amp=args.amp)
        if args.amp != "off":
            steps["baseline fp32"] = partial(baseline_step, baseline, optimizer, amp="off")
    if args.compile:
        steps["compiled"] = make(torch.compile(deepcopy(model), dynamic=False))
    return steps


def seconds(step: Step, batch: dict) -> float:
    """How long a step takes, until the device has done it."""
    device = batch["images"].device
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step(batch)
    wait()
    return time.perf_counter() - start


def measure(steps: dict[str, Step], batch: dict, rounds: int) -> dict:
    """Medians over the rounds, as JSON has them; ratios are [least, median, most]."""
    first = {name: seconds(step, batch) for name, step in steps.items()}
    with Products() as products:
        steps["ours"](batch)
    steps = steps | {"matmuls": products.step(batch["images"].device)}
    seconds(steps["matmuls"], batch)
    names, times = list(steps), []
    for turn in range(rounds):
        shift = turn % len(names)
        times.append({name: seconds(steps[name], batch) for name in names[shift:] + names[:shift]})
    ratios = {name: spread([t[name] / t["ours"] for t in times]) for name in names}
    typical = {name: median(t[name] for t in times) for name in names}
    return {
        "batch_size": len(batch["images"]),
        "seconds": typical,
        "images_per_s": len(batch["images"]) / typical["ours"],
        "matmul_tflops_per_s": products.flops / typical["matmuls"] / 1e12,
        "ratios": ratios,
        "compile_s": first.get("compiled"),
    }


def random_batch(args, model: PixMIM, normalize: Normalize, size: int) -> dict:
    """What util.data.DevicePrefetcher would put on the device, and the images normalised for those that begin with these."""
    device = normalize.mean.device
    shape = (size, *args.input_size, args.in_chans)
    batch = {
        "images": torch.randint(256, shape, dtype=torch.uint8, device=device),
        "flip": torch.rand(size, device=device) < 0.5,
        "noise": torch.rand(size, model.noise_length, device=device),
    }
    normalised = normalize(batch)  # channels last in memory, as the uint8 images; the baseline's loader has planes
    return batch | {"normalised": normalised, "planes": normalised.contiguous()}


def lines(result: dict) -> list[str]:
    """What was measured, for people."""
    head = (
        f"batch {result['batch_size']}: ours {result['seconds']['ours']:.4g} s, {result['images_per_s']:.4g} images/s"
    )
    rows = [f"{k} {m:.3f} ({low:.3f} to {high:.3f})" for k, (low, m, high) in result["ratios"].items() if k != "ours"]
    compiled = [f"compiled in {result['compile_s']:.1f} s"] if result["compile_s"] else []
    return [head, *rows, f"matmuls at {result['matmul_tflops_per_s']:.3g} TFLOP/s", *compiled]


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("Time a training step beside itself without each lever, and beside MAE as it is commonly run.")
    add_model_arguments(parser, ENCODERS, model="vit_base")
    add_method_arguments(parser)
    add = add_device_arguments(parser).add_argument
    add(
        "--batch_size",
        type=number(int, 1),
        nargs="+",
        default=[8],
        help="images of a step; several = one after another",
    )
    add("--rounds", type=number(int, 1), default=7, help="timed steps of each variant")
    add("--compile", action="store_true", help="time the compiled model as well")
    add("--append", type=Path, metavar="FILE", help="Markdown table that gets a row for each batch size")
    parser.set_defaults(grad_checkpointing=False)
    return parser


def main() -> None:
    args = resolve_defaults(get_parser().parse_args())
    if args.amp == "fp16" or not args.norm_pix_loss:
        raise ValueError("--amp fp16 and --no-norm_pix_loss are not timed: the baseline scales no loss and normalises")
    device = init_world(args.device, args.amp).device
    torch.manual_seed(args.seed)
    model, normalize = build_model(args).to(device), Normalize(args, device)
    steps = all_steps(args, model, normalize)
    for size in args.batch_size:
        result = measure(steps, random_batch(args, model, normalize, size), args.rounds)
        print(*lines(result), json.dumps(result), sep="\n", flush=True)
        append(args.append, "throughput", device, lines(result))


if __name__ == "__main__":
    run_main(main)
