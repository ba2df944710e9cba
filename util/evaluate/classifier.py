"""Classifier files: write classifier.pth, evaluate a saved classifier."""

from argparse import Namespace
from collections.abc import Callable

from torch import Tensor, nn

from util.checkpoint.state import copy_to_host, write_checkpoint
from util.data.batches import eval_loader
from util.data.folders import Source
from util.data.ranges import resolve_pixels
from util.data.transforms import eval_transform
from util.dist import init_world
from util.evaluate.encoder import load_encoder, pooling
from util.evaluate.probes import Probe
from util.evaluate.robustness import evaluate_corruptions, find_images, mask_classes
from util.evaluate.scores import evaluate, print_result
from util.formats.commands import load_command
from util.formats.keys import default_format, to_mae
from util.formats.weights import Weights
from util.run import Run, args_to_dict


def save_classifier(run: Run, state: dict[str, Tensor], classes: list[str], pool: str | None = None) -> None:
    """Write OUTPUT_DIR/classifier.pth, in timm's names, for `timm.create_model(..., checkpoint_path=)` and --eval.

    `pool`: feature of the classifier, "token" or "mean"; None = the encoder's default, or learned.
    """
    if run.world.is_main:
        args = args_to_dict(run.args) | {"classes": classes, "batch": run.batch, "pool": pool}
        state = to_mae(copy_to_host(state))
        path = write_checkpoint(run.folder / "classifier.pth", {"model": state, "args": args})
        weights = Weights.from_state(state, args)
        target = default_format(state)
        if target and not weights.averages_tokens:  # timm's reads the first class token alone
            run.log.info(f"load with: {load_command(weights, target, path)}")


def val_interpolation(probe_as: str | None) -> str:
    """Interpolation of validation images under --probe_as."""
    return "bilinear" if probe_as == "mmselfsup" else "bicubic"


def evaluate_classifier(args: Namespace, weights: Weights | None, build_encoder: Callable) -> None:
    """Print the accuracy of a saved classifier on DIR/val or DIR/<class>/, or its errors on ImageNet-C's tree (--eval).

    DIR/<class>/ may lack classes: `acc1` is then the accuracy among its classes, `acc1_all_classes` that among all.
    """
    file, count = f"--checkpoint {args.checkpoint}", weights.num_classes if weights else 0
    if weights is None or not count:
        raise ValueError(f"--eval: {file} has no classifier; use one written by main_linprobe.py or main_finetune.py")
    val, absent, tree = find_images(args, weights)
    if len(val.classes) != count:
        raise ValueError(f"{file} has {count} classes, the validation images have {len(val.classes)}")
    args = resolve_pixels(args, val)
    world = init_world(args.device, args.amp, args.timeout_minutes)
    if weights.source != "pixmim" and world.is_main:
        print(f"{file}: the order of its {count} classes is assumed to be that of the sorted folder names")
    attentive = "ep.queries" in weights.state
    options = {"num_classes": 0 if attentive else count, **pooling(weights)}
    model = load_encoder(args, build_encoder, weights, **options)
    if attentive:
        model = nn.Sequential(Probe.from_classifier(model, weights.state), nn.Flatten())  # its one head: (B, classes)
    model = model.to(world.device)
    interpolation = val_interpolation(vars(args).get("probe_as") or weights.args.get("probe_as"))
    transform = eval_transform(args.input_size, 1.0 if tree else args.crop_pct, interpolation)

    def report(line: str) -> None:
        if world.is_main:
            print(line, flush=True)

    def score(source: Source) -> list[dict]:
        return evaluate(args, world, model, eval_loader(args, world, source, transform), count)

    if tree:
        report("images are resized to --input_size without a crop: those of ImageNet-C are cropped already")
        result = evaluate_corruptions(tree, lambda source: score(source)[0]["acc1"], count == 1000, report)
    elif absent:
        report(f"{len(absent)} of the {count} classes have no folder in {val.place}: acc1 is among the others only")
        model.register_forward_hook(lambda _module, _images, logits: mask_classes(logits, absent))
        result, unmasked = score(val)
        result |= {"classes": count - len(absent), "acc1_all_classes": unmasked["acc1"]}
    else:
        (result,) = score(val)
    print_result(world, result, args)
    world.close()
