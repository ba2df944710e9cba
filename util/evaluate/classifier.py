"""Classifier files: write classifier.pth, evaluate a saved classifier."""

from argparse import Namespace
from collections.abc import Callable

from torch import Tensor

from util.checkpoint.state import copy_to_host, write_checkpoint
from util.data.batches import eval_loader
from util.data.sources import labelled_source
from util.data.transforms import eval_transform
from util.dist import init_world
from util.evaluate.encoder import load_encoder, pooling
from util.evaluate.scores import evaluate, print_result
from util.formats.commands import load_command
from util.formats.keys import default_format, to_mae
from util.formats.weights import Weights
from util.run import Run, args_to_dict


def save_classifier(run: Run, state: dict[str, Tensor], classes: list[str]) -> None:
    """Write OUTPUT_DIR/classifier.pth, in timm's names, for `timm.create_model(..., checkpoint_path=)` and --eval."""
    if run.world.is_main:
        args, state = args_to_dict(run.args) | {"classes": classes}, to_mae(copy_to_host(state))
        path = write_checkpoint(run.folder / "classifier.pth", {"model": state, "args": args})
        weights = Weights.from_state(state, args)
        if (
            target := default_format(state)
        ) and not weights.averages_tokens:  # timm's reads the first class token alone
            run.log.info(f"load with: {load_command(weights, target, path)}")


def val_interpolation(probe_as: str | None) -> str:
    """Interpolation of validation images under --probe_as."""
    return "bilinear" if probe_as == "mmselfsup" else "bicubic"


def evaluate_classifier(args: Namespace, weights: Weights | None, build_encoder: Callable) -> None:
    """Print the accuracy of a saved classifier on DIR/val (--eval)."""
    count = weights.num_classes if weights else 0
    if weights is None or not count:
        raise ValueError(
            f"--eval: --checkpoint {args.checkpoint} has no classifier; use one written by main_linprobe.py or main_finetune.py"
        )
    val = labelled_source(args.data_path, "val", weights.classes if weights.source == "pixmim" else None)
    if len(val.classes) != count:
        raise ValueError(
            f"--checkpoint {args.checkpoint} has {count} classes, {args.data_path}/val has {len(val.classes)}"
        )
    world = init_world(args.device, args.amp, args.timeout_minutes)
    if weights.source != "pixmim" and world.is_main:
        print(
            f"--checkpoint {args.checkpoint}: the order of its {count} classes is assumed to be that of the sorted folder names"
        )
    model = load_encoder(args, build_encoder, weights, num_classes=count, **pooling(weights)).to(world.device)
    interpolation = val_interpolation(vars(args).get("probe_as") or weights.args.get("probe_as"))
    loader = eval_loader(args, world, val, eval_transform(args.input_size, args.crop_pct, interpolation))
    print_result(world, evaluate(args, world, model, loader, count)[0])
    world.close()
