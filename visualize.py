"""Pictures of a model: what it reconstructs, looks at and tells apart, and what its masks and filter do to images."""

import argparse
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models import ENCODERS, build_encoder, build_model
from models_pixmim import PixMIM, mask_from_noise
from util.args import (
    METHOD,
    Parser,
    add_device_arguments,
    add_method_arguments,
    add_model_arguments,
    number,
    picture,
    resolve_defaults,
    run_main,
)
from util.data.batches import load_batch
from util.data.folders import Folder, list_images
from util.data.samples import Samples
from util.data.transforms import Normalize, eval_transform
from util.dist import init_world
from util.evaluate.encoder import MODEL_FLAGS, load_encoder, pooling, read_architecture
from util.formats.keys import pixmim_names
from util.formats.weights import Weights
from util.plots.features import attention_picture, pca_picture
from util.plots.reconstruction import filter_picture, masks_picture, panel, reconstruct, spectrum
from util.rng import MASK, generator

MASKS = 6
RADII = (10, 20, 40, 80, 112)  # of --filter at 224 px


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    # fmt: off
    parser.add_argument("--checkpoint", required=True, metavar="FILE|none",
        help="pre-trained weights in any format that util/convert.py reads, with their decoder unless one of the pictures below "
             "does without; none = an untrained --model")
    parser.add_argument("--images", required=True, nargs="+", help="files, or folders of images")
    parser.add_argument("--output", type=picture, required=True, help="the picture to write, .png or .jpg")
    parser.add_argument("--count", type=number(int, 1), default=8, help="images shown at most, spread over those found")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--attention", action="store_true", help="instead of what is reconstructed: what each head of the last block's class token looks at")
    add("--pca", action="store_true", help="instead: the first three principal components of the patch features, as colours")
    add("--spectrum", action="store_true", help="instead: power of each frequency of input, target, prediction and error, a chart")
    add("--masks", action="store_true", help=f"instead: the images under {MASKS} masks each")
    add("--filter", nargs="*", type=number(float, 1), metavar="R",
        help="instead: the images under low-pass filters of these radii, and what they remove; without radii 10 20 40 80 112 "
             "of 224 px in proportion, and the model's own")
    # fmt: on
    add_model_arguments(parser, ENCODERS)
    group = add_method_arguments(parser, **dict.fromkeys(METHOD))
    group.description = (
        "None = as in --checkpoint; one that does not tell is taken for MAE's, its decoder for one of heads 32 wide"
    )
    add_device_arguments(parser, amp=False)
    parser.set_defaults(grad_checkpointing=False)
    return parser


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


def fit(model: PixMIM, weights: Weights, args: Namespace) -> None:
    """Load the weights, or say what does not fit."""
    if "proj_weights" in weights.state and (fused := getattr(model.encoder, "fuse_layers", None)):
        count = weights.state["proj_weights"].numel()
        if count != len(fused):
            raise ValueError(
                f"--checkpoint {args.checkpoint} fuses {count} layers, not {len(fused)}; say which by --fuse_layers"
            )
    try:
        model.load_state_dict(pixmim_names(weights.state))
    except RuntimeError as error:
        differs = "; ".join(str(error).split("\n\t")[1:])
        raise ValueError(
            f"--checkpoint {args.checkpoint} does not fit --model {args.model} with --input_size {args.input_size} and "
            f"these --decoder_* flags: {differs[:200]}"
        ) from error


def encoder_picture(args: Namespace, weights: Weights | None, batch: dict, device: torch.device) -> np.ndarray:
    """Pictures of whole images' features: any encoder, at any --input_size."""
    encoder = load_encoder(args, build_encoder, weights, **pooling(weights)).to(device).eval()
    if args.attention and not encoder.num_prefix_tokens:
        raise ValueError(f"--attention: --model {args.model} has no class token; use --pca")
    draw = attention_picture if args.attention else pca_picture
    return draw(encoder, Normalize(args, device)(batch), pixels(batch))


def method_picture(args: Namespace, weights: Weights | None, batch: dict, device: torch.device) -> np.ndarray:
    """Pictures of what pre-training does: its masks, its filter, its predictions."""
    own = args.lowpass_radius
    if args.filter is not None:
        sides = {round(radius * min(args.input_size) / 224) for radius in RADII} | {own}
        return filter_picture(pixels(batch), args.filter or sorted(sides - {0}), own, args.lowpass)
    model = build_model(args)
    if not args.masks:
        fit(model, weights, args)
    model.to(device).eval()
    count = len(batch["images"])

    def noise(epoch: int) -> Tensor:  # as util/data.py draws it
        draws = [generator(args.seed, MASK, epoch, i).random(model.noise_length, np.float32) for i in range(count)]
        return torch.from_numpy(np.stack(draws)).to(device)

    if args.masks:
        masks = [mask_from_noise(noise(e), args.mask_ratio, model.encoder.grid, args.mask_unit) for e in range(MASKS)]
        return masks_picture(pixels(batch), masks, model.encoder.patch)
    made = reconstruct(model, Normalize(args, device)(batch), noise(0), args)
    return spectrum(made) if args.spectrum else panel(made)


def pixels(batch: dict) -> Tensor:
    """(B, C, H, W) in [0, 1]."""
    return batch["images"].permute(0, 3, 1, 2).float() / 255


def main() -> None:
    args, weights = read_architecture(get_parser().parse_args(), ENCODERS, (*MODEL_FLAGS, *METHOD))
    of_encoder = args.attention or args.pca
    if not (of_encoder or args.masks or args.filter is not None or (weights and weights.has_decoder)):
        raise ValueError(
            f"--checkpoint {args.checkpoint} has no decoder; what it reconstructs needs a pre-training checkpoint, "
            "--attention, --pca, --masks and --filter do not"
        )
    unset = {name: value for name, value in METHOD.items() if getattr(args, name) is None}
    args = resolve_defaults(Namespace(**vars(args) | unset))
    device = init_world(args.device, "off").device
    source = find_images(args.images, args.count)
    batch = load_batch(Samples(source, eval_transform(args.input_size), args), range(len(source)), device)
    draw = encoder_picture if of_encoder else method_picture
    picture = Image.fromarray(draw(args, weights, batch, device))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output)
    print(f"{args.output}: {len(source)} images, {picture.width} x {picture.height}")


if __name__ == "__main__":
    run_main(main)
