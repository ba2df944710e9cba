"""Benchmark of a training step, its ablations and a baseline MAE. `python -m benchmarks.throughput`

`ours` is the step of main_pretrain.py on a batch on the device. The other variants are

- ours without one optimisation: attention (timm's), optimizer (foreach, not fused), projection (of all patches),
  prediction (of all patches), read-back (of the loss in each step); compiled: ours with torch.compile;
- full decoder: the same encoder with 8 blocks of self-attention, all removed patches, one class token (if ours differs);
- baseline, baseline fp32 (plain ViTs only): MAE as commonly implemented (baseline_mae.py), on normalised images;
- parts of ours: matmuls (only the matrix products of its linear layers), target (only the target of the loss).

All variants start from the same weights and do one step in each round, in rotating order, so that a slow phase of the
machine affects all of them. A ratio is the median over the rounds of time / time of ours.
"""

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from statistics import median

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

import util.args as cli
from benchmarks.ablations import ablate, applicable_ablations, is_plain
from benchmarks.baseline_mae import baseline_of, baseline_optimizer, baseline_step
from benchmarks.products import Products
from benchmarks.results import add_append_argument, append, spread
from engine_pretrain import optimizer_step, pretrain_loss
from models import ENCODERS, build_model
from models_pixmim import MaskedViT, PixMIM
from util.data.transforms import Normalize
from util.dist import autocast, init_world

Step = Callable[[dict], object]  # a step on a batch


def our_step(args, normalize: Normalize, model: nn.Module, fused: bool = True) -> Callable[[dict], Tensor]:
    """Function: batch -> loss () on the device, with one step as in train_one_epoch."""
    groups = param_groups_weight_decay(model, 0.05)
    optimizer = torch.optim.AdamW(groups, 1e-6, betas=(0.9, 0.95), fused=fused, foreach=not fused)
    loss_fn, parameters = pretrain_loss(normalize), list(model.parameters())
    scaler = torch.amp.GradScaler(args.device, enabled=False)

    def step(batch: dict) -> Tensor:
        with autocast(args.amp, batch["images"].device):
            loss = loss_fn(model, batch)
        loss.backward()
        optimizer_step(optimizer, scaler, parameters)
        return loss.detach()

    return step


def all_steps(args, model: PixMIM, normalize: Normalize) -> dict[str, Step]:
    """All variants but the matrix products, which must be recorded from a step first."""
    make = partial(our_step, args, normalize)
    ours = make(model)
    steps: dict[str, Step] = {
        "ours": ours,
        **{name: make(ablate(model, name)) for name in applicable_ablations(model)},
        "optimizer": make(deepcopy(model), fused=False),
        "read-back": lambda batch: ours(batch).item(),
        "target": lambda batch: model.target(batch["normalised"]),
    }
    full = model
    if not is_plain(model):
        names = ("predict_ratio", "decoder", "decoder_depth", "fuse_levels", "pos_embed")
        plain = {name: cli.METHOD[name] for name in names}
        full = build_model(argparse.Namespace(**vars(args) | plain | {"class_tokens": None})).to(normalize.mean.device)
        steps["full decoder"] = make(full)
    if type(model.encoder) is MaskedViT:  # the other encoders have no baseline
        baseline = baseline_of(full)
        optimizer = baseline_optimizer(baseline)
        steps["baseline"] = partial(baseline_step, baseline, optimizer, amp=args.amp)
        if args.amp != "off":
            steps["baseline fp32"] = partial(baseline_step, baseline, optimizer, amp="off")
    if args.compile:
        steps["compiled"] = make(torch.compile(deepcopy(model), dynamic=False))
    return steps


def time_step(step: Step, batch: dict) -> float:
    """Seconds of a step until the device has finished it."""
    device = batch["images"].device
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step(batch)
    wait()
    return time.perf_counter() - start


def measure(steps: dict[str, Step], batch: dict, rounds: int) -> dict:
    """Result as printed in JSON: medians over the rounds; ratios are [least, median, most]."""
    first = {name: time_step(step, batch) for name, step in steps.items()}
    with Products() as products:
        steps["ours"](batch)
    steps = steps | {"matmuls": products.step(batch["images"].device)}
    time_step(steps["matmuls"], batch)
    names, times = list(steps), []
    for turn in range(rounds):
        shift = turn % len(names)
        times.append({name: time_step(steps[name], batch) for name in names[shift:] + names[:shift]})
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
    """A batch of DevicePrefetcher, plus `normalised` images and the same in contiguous `planes` for the baseline."""
    device = normalize.mean.device
    shape = (size, *args.input_size, args.in_chans)
    batch = {
        "images": torch.randint(256, shape, dtype=torch.uint8, device=device),
        "flip": torch.rand(size, device=device) < 0.5,
        "noise": torch.rand(size, model.noise_length, device=device),
    }
    # channels-last in memory, as the uint8 images are; the baseline's loader yields planes
    normalised = normalize(batch)
    return batch | {"normalised": normalised, "planes": normalised.contiguous()}


def format_result(result: dict) -> list[str]:
    speed = f"{result['seconds']['ours']:.4g} s, {result['images_per_s']:.4g} images/s"
    head = f"batch {result['batch_size']}: ours {speed}"
    rows = [f"{k} {m:.3f} ({low:.3f} to {high:.3f})" for k, (low, m, high) in result["ratios"].items() if k != "ours"]
    compiled = [f"compiled in {result['compile_s']:.1f} s"] if result["compile_s"] else []
    return [head, *rows, f"matmuls at {result['matmul_tflops_per_s']:.3g} TFLOP/s", *compiled]


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser("Measure the time of a training step, of its ablations and of a baseline MAE.")
    cli.add_model_arguments(parser, ENCODERS, *map(str, cli.PRETRAIN.values()))
    cli.add_method_arguments(parser)
    add = cli.add_device_arguments(parser).add_argument
    add("--batch_size", type=cli.number(int, 1), nargs="+", default=[8], help="images per step; several = in turn")
    add("--rounds", type=cli.number(int, 1), default=7, help="timed steps of each variant")
    add("--compile", action="store_true", help="include the compiled model")
    add_append_argument(parser)
    parser.set_defaults(grad_checkpointing=False, drop_path=0.0)
    return parser


def main() -> None:
    args = cli.resolve_defaults(get_parser().parse_args())
    if args.amp == "fp16" or not args.norm_pix_loss:
        raise ValueError("--amp fp16 and --no-norm_pix_loss are not supported: the baseline has neither; omit them")
    device = init_world(args.device, args.amp).device
    torch.manual_seed(args.seed)
    model, normalize = build_model(args).to(device), Normalize(args, device)
    steps = all_steps(args, model, normalize)
    for size in args.batch_size:
        result = measure(steps, random_batch(args, model, normalize, size), args.rounds)
        print(*format_result(result), json.dumps(result), sep="\n", flush=True)
        append(args.append, "throughput", device, format_result(result))


if __name__ == "__main__":
    cli.run_main(main)
