"""Picture of what a model reconstructs: input, target, masked input, prediction, what the filter removed."""

import argparse
from argparse import Namespace
from pathlib import Path

import numpy as np
from PIL import Image

from engine_pretrain import build_model, panel, reconstruct
from models import ENCODERS
from models_pixmim import PixMIM
from util import convert
from util.args import (
    METHOD,
    Parser,
    add_device_arguments,
    add_method_arguments,
    add_model_arguments,
    number,
    report_mistakes,
)
from util.classify import MODEL_FLAGS, own_arguments, read_architecture
from util.data import Normalize, Samples, eval_transform, one_batch
from util.dist import join
from util.sources import Folder, list_images


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    # fmt: off
    parser.add_argument("--checkpoint", required=True, help="pre-trained weights with their decoder, in any format that util/convert.py reads")
    parser.add_argument("--images", required=True, nargs="+", help="files, or folders of images")
    parser.add_argument("--output", required=True, help="the picture to write, .png or .jpg")
    parser.add_argument("--count", type=number(int, 1), default=8, help="images shown at most, spread over those found")
    # fmt: on
    add_model_arguments(parser, ENCODERS)
    group = add_method_arguments(parser, **dict.fromkeys(METHOD))
    group.description = (
        "None = as in --checkpoint; one that does not tell is taken for MAE's, its decoder for one of heads 32 wide"
    )
    add_device_arguments(parser, amp=False)
    parser.set_defaults(grad_checkpointing=False)
    return parser


def foreign_method(weights: convert.Weights) -> dict:
    """Method flags of a checkpoint that does not tell them: MAE's, and PixMIM's target if it brought its filter."""
    facts = convert.architecture(weights.state)
    filtered = any("low_pass_filter" in key for key in weights.dropped)
    return METHOD | {
        "lowpass_radius": None if filtered else 0,
        "decoder_dim": facts["decoder_dim"],
        "decoder_depth": facts["decoder_depth"],
        "decoder_heads": convert.decoder_heads(weights),
    }


def find_images(names: list[str], count: int) -> Folder:
    """At most `count` images, evenly spread over the files and folders named."""
    paths: list[bytes] = []
    for name in names:
        if not Path(name).exists():
            raise FileNotFoundError(f"--images {name}: there is no such file or folder")
        paths += list_images(name) if Path(name).is_dir() else [name.encode()]
    if not paths:
        raise ValueError(f"--images {' '.join(names)}: no images there")
    chosen = [paths[i * len(paths) // count] for i in range(count)] if len(paths) > count else paths
    return Folder(np.array(chosen), np.zeros(len(chosen), np.int64), [])


def fit(model: PixMIM, weights: convert.Weights, args: Namespace) -> None:
    """Load the weights, or say what does not fit."""
    if "proj_weights" in weights.state and (fused := getattr(model.encoder, "fuse_layers", None)):
        count = weights.state["proj_weights"].numel()
        if count != len(fused):
            raise ValueError(
                f"--checkpoint {args.checkpoint} fuses {count} layers, not {len(fused)}; say which by --fuse_layers"
            )
    try:
        model.load_state_dict(convert.pixmim_names(weights.state))
    except RuntimeError as error:
        differs = "; ".join(str(error).split("\n\t")[1:])
        raise ValueError(
            f"--checkpoint {args.checkpoint} does not fit --model {args.model} with --input_size {args.input_size} and "
            f"these --decoder_* flags: {differs[:200]}"
        ) from error


def main() -> None:
    args, weights = read_architecture(get_parser().parse_args(), ENCODERS, (*MODEL_FLAGS, *METHOD))
    if weights is None or "decoder_pred.weight" not in weights.state:
        raise ValueError(f"--checkpoint {args.checkpoint} has no decoder; a picture needs a pre-training checkpoint")
    if not own_arguments(weights):
        foreign = foreign_method(weights)
        args = Namespace(**vars(args) | {name: foreign[name] for name in METHOD if getattr(args, name) is None})
    device = join(args.device, "off").device
    model = build_model(args, ENCODERS)
    fit(model, weights, args)
    model.to(device).eval()
    source = find_images(args.images, args.count)
    samples = Samples(source, eval_transform(args.input_size), args, noise_length=model.noise_length)
    batch = one_batch(samples, range(len(samples)), device)
    picture = Image.fromarray(panel(reconstruct(model, Normalize(args, device)(batch), batch["noise"], args)))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output)
    print(f"{args.output}: {len(samples)} images, {picture.width} x {picture.height}")


if __name__ == "__main__":
    report_mistakes(main)
