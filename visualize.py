"""python visualize.py --checkpoint FILE --images DIR --output FILE.png: reconstruction of masked images.

Other pictures: attention, feature components, spectrum, masks, low-pass filters, segmentation.
"""

import argparse
import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import util.args as cli
from models import ENCODERS, build_encoder, build_model
from models_pixmim import LowPass, PixMIM, mask_from_noise
from util.data.batches import load_batch
from util.data.folders import Folder, list_images
from util.data.masks import mask_folder
from util.data.ranges import resolve_pixels
from util.data.samples import Samples
from util.data.transforms import Normalize, eval_transform
from util.dist import init_world
from util.evaluate.encoder import MODEL_FLAGS, load_encoder, patch_features, pooling, read_architecture
from util.evaluate.probes import Probe
from util.evaluate.segmentation import Confusion, load_segmenter, mask_loader, predict_images
from util.formats.keys import pixmim_names
from util.formats.resize import resize_weights
from util.formats.weights import Weights
from util.plots.features import draw_attention, draw_components, draw_queries
from util.plots.grids import save_picture
from util.plots.reconstruction import draw_filters, draw_masks, draw_reconstruction, draw_spectrum, reconstruct
from util.plots.segmentation import draw_segmentation
from util.plots.spectrum import split_power
from util.rng import MASK, generator

MASKS = 6
WORST = 5  # images of val with the lowest mIoU, in --segment
RADII = (10, 20, 40, 80, 112)  # defaults of --filter at 224 px


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    # fmt: off
    parser.add_argument("--checkpoint", required=True, metavar="FILE|none",
        help="pre-trained weights in any format that util/convert.py reads; the reconstruction and "
             "--spectrum need its decoder; none = an untrained --model")
    parser.add_argument("--use_ema", action="store_true", help="read the moving average of the weights, which some files hold beside them")
    parser.add_argument("--images", required=True, nargs="+", help="image files or folders of images; --segment: the --data_path of main_segment.py")
    parser.add_argument("--output", type=cli.picture, required=True, help="picture to write, .png or .jpg")
    parser.add_argument("--count", type=cli.number(int, 1), default=8, help="maximum number of images, taken at even steps from those found")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--attention", action="store_true", help="draw the attention of the last block's class token, per head, instead of the reconstruction")
    add("--ep_attention", action="store_true", help="draw the attention of each query of a classifier of main_linprobe.py --pool ep")
    add("--pca", action="store_true", help="draw the first three principal components of the patch features as colours")
    add("--spectrum", action="store_true",
        help="draw a chart of the power per frequency of input, target, prediction and error; print the root mean square, in grey "
             "levels of 255, of prediction minus input in the removed patches, below and above the cut-off")
    add("--masks", action="store_true", help=f"draw each image under {MASKS} masks")
    add("--segment", action="store_true",
        help=f"draw image, mask and prediction of images of val by a segmenter.pth, and the {WORST} of the lowest mIoU")
    add("--filter", nargs="*", type=cli.number(float, 1), metavar="R",
        help="draw each image under low-pass filters of these radii in bins, and what they remove; without radii: 10 20 40 80 "
             "112 scaled from 224 px to --input_size, and the model's radius (default: not drawn)")
    # fmt: on
    cli.add_pixel_arguments(parser)
    cli.add_model_arguments(parser, ENCODERS)
    group = cli.add_method_arguments(parser, **dict.fromkeys(cli.METHOD))
    group.description = "Attention heads of the decoder whose number the file does not state are 32 wide."
    cli.add_device_arguments(parser, amp=False)
    parser.set_defaults(grad_checkpointing=False, drop_path=0.0)
    return parser


def find_images(names: list[str], count: int) -> Folder:
    """At most `count` images, at even steps from the files and folders named."""
    paths: list[bytes] = []
    for name in names:
        if not Path(name).exists():
            raise FileNotFoundError(f"--images {name}: does not exist; name a file or folder of images")
        paths += list_images(name) if Path(name).is_dir() else [os.fsencode(name)]
    if not paths:
        raise ValueError(f"--images {' '.join(names)}: no images found; name a file or folder of images")
    chosen = [paths[i * len(paths) // count] for i in range(count)] if len(paths) > count else paths
    return Folder(chosen)


def load_weights(model: PixMIM, weights: Weights, args: Namespace) -> None:
    """Load the weights into the model; ValueError if they do not fit."""
    fused, shares = getattr(model.encoder, "fuse_layers", ()), weights.state.get("proj_weights", ())
    if fused and len(shares) not in (0, len(fused)):
        counts = f"fuses {len(shares)} layers, not {len(fused)}"
        raise ValueError(f"--checkpoint {args.checkpoint} {counts}; name them with --fuse_layers")
    if weights.family and weights.grid not in (None, model.encoder.grid):
        weights = resize_weights(weights, args.input_size)
    try:
        model.load_state_dict(pixmim_names(weights.state))
    except RuntimeError as error:
        differs = "; ".join(str(error).split("\n\t")[1:])
        raise ValueError(
            f"--checkpoint {args.checkpoint} does not fit --model {args.model} with --input_size {args.input_size} and "
            f"these --decoder_* flags: {differs[:200]}"
        ) from error


def print_assumptions(args: Namespace) -> None:
    """Print one line if neither --checkpoint nor a flag states the loss or the mask ratio that the picture shows."""
    assumed = {"mask_ratio": f"--mask_ratio {cli.METHOD['mask_ratio']}"}
    if not args.masks:
        raw = "raw pixels, as mae_visualize_*, need --no-norm_pix_loss"
        assumed["norm_pix_loss"] = f"--norm_pix_loss as mae_pretrain_*_full; {raw}"
    if missing := [name for name in assumed if getattr(args, name) is None]:
        values = ", ".join(assumed[name] for name in missing)
        print(f"{args.checkpoint} does not state {' and '.join(missing)}; assumed: {values}")


def scale_to_pixels(batch: dict) -> Tensor:
    """Images (B, C, H, W) in [0, 1] of a batch."""
    return batch["images"].permute(0, 3, 1, 2).float() / 255


def draw_mask_noise(model: PixMIM, args: Namespace, count: int, epoch: int) -> Tensor:
    """Noise (count, U) of images 0 to count - 1 in an epoch, as util/data/batches.py draws it."""
    draws = [generator(args.seed, MASK, epoch, i).random(model.noise_length, np.float32) for i in range(count)]
    return torch.from_numpy(np.stack(draws))


def draw_encoder(args: Namespace, weights: Weights | None, batch: dict, device: torch.device) -> np.ndarray:
    """--attention, --ep_attention or --pca, of any encoder and at any --input_size."""
    encoder = load_encoder(args, build_encoder, weights, **pooling(weights)).to(device).eval()
    images = Normalize(args, device)(batch)
    if args.ep_attention:
        if weights is None or "ep.queries" not in weights.state:
            raise ValueError(f"--ep_attention: {args.checkpoint} is not a classifier of main_linprobe.py --pool ep")
        maps = Probe.from_classifier(encoder, weights.state).to(device).attention_maps(images)
        return draw_queries(maps, scale_to_pixels(batch))
    if args.attention and not encoder.num_prefix_tokens:
        raise ValueError(f"--attention: --model {args.model} has no class token; use --pca")
    if args.attention:
        return draw_attention(encoder, images, scale_to_pixels(batch))
    return draw_components(patch_features(encoder, images), scale_to_pixels(batch))


def draw_filter_radii(args: Namespace, pixels: Tensor) -> np.ndarray:
    """--filter: images under low-pass filters."""
    scaled = {round(radius * min(args.input_size) / 224) for radius in RADII} | {args.lowpass_radius}
    mean, std = [0.0] * args.in_chans, [1.0] * args.in_chans

    def low_pass(radius: float) -> LowPass:
        return LowPass(args.input_size, radius, mean, std, args.lowpass).to(pixels.device)

    return draw_filters(pixels, args.filter or sorted(scaled - {0}), args.lowpass_radius, low_pass)


def draw_method(args: Namespace, weights: Weights | None, batch: dict, device: torch.device) -> np.ndarray:
    """--masks, --spectrum or the reconstruction."""
    model, count = build_model(args), len(batch["images"])
    if args.masks:
        noise = [draw_mask_noise(model, args, count, epoch) for epoch in range(MASKS)]
        grid = model.encoder.grid
        masks = [mask_from_noise(x, args.mask_ratio, grid, args.mask_unit).removed.unflatten(1, grid) for x in noise]
        return draw_masks(scale_to_pixels(batch).cpu(), masks)
    load_weights(model, weights, args)
    model.to(device).eval()
    noise = draw_mask_noise(model, args, count, 0).to(device)
    reconstruction = reconstruct(model, Normalize(args, device)(batch), noise, args)
    if not args.spectrum:
        return draw_reconstruction(reconstruction)
    radius = reconstruction.radius or cli.default_radius(args.input_size)
    below, above = (255 * power**0.5 for power in split_power(reconstruction.filled - reconstruction.images, radius))
    print(json.dumps({"radius": radius, "rms_below": below, "rms_above": above}))
    return draw_spectrum(reconstruction)


def draw_segments(args: Namespace, weights: Weights | None) -> tuple[np.ndarray, int]:
    """--segment: (picture, number of images) of --count images of val at even steps, then those of the lowest mIoU."""
    if len(args.images) != 1:
        raise ValueError(f"--segment --images {' '.join(args.images)}: name one folder, as for main_segment.py")
    given = {"data_path": args.images, "batch_size": 16, "amp": "off", "num_workers": 0}
    world = init_world(args.device, "off")
    model, args = load_segmenter(Namespace(**vars(args) | given), build_encoder, weights, world)
    val = mask_folder(args, "val")
    args = resolve_pixels(args, val)
    count, chosen, worst = min(args.count, len(val)), [], []
    wanted = {i * len(val) // count for i in range(count)}
    for found in predict_images(args, world, model, mask_loader(args, world, val)):
        if (found.truth < 0).all():
            continue
        score = Confusion(len(val.classes), world.device)
        score.add(found.truth, found.classes[0])
        miou = score.result(world, val.classes)["miou"]
        chosen += [(miou, found)] if found.image in wanted else []
        worst = sorted([*worst, (miou, found)], key=lambda pair: pair[0])[:WORST]
    labels = [f"{kind}{miou:.1f}" for kind, part in (("", chosen), ("worst: ", worst)) for miou, _ in part]
    shown = [found for _, found in (*chosen, *worst)]
    parts = zip(*((f.pixels, f.truth, f.classes[0]) for f in shown), strict=True)
    columns = ([x.numpy(force=True) for x in part] for part in parts)
    return draw_segmentation(*columns, labels, val.classes), len(shown)


def write_picture(args: Namespace, pixels: np.ndarray, count: int) -> None:
    save_picture(args.output, pixels)
    print(f"{args.output}: {count} images, {pixels.shape[1]} x {pixels.shape[0]}")


def main() -> None:
    args, weights = read_architecture(get_parser().parse_args(), ENCODERS, (*MODEL_FLAGS, *cli.METHOD))
    of_encoder = args.attention or args.ep_attention or args.pca
    if not (of_encoder or args.segment or args.masks or args.filter is not None or (weights and weights.has_decoder)):
        raise ValueError(
            f"--checkpoint {args.checkpoint} has no decoder: the reconstruction and --spectrum need a pre-training checkpoint "
            "with one; --attention, --ep_attention, --pca, --masks and --filter do not"
        )
    if weights and not (of_encoder or args.segment) and args.filter is None:
        print_assumptions(args)
    args = cli.resolve_defaults(args)
    if args.segment:
        write_picture(args, *draw_segments(args, weights))
        return
    device = init_world(args.device, "off").device
    source = find_images(args.images, args.count)
    args = resolve_pixels(args, source)
    samples = Samples(source, eval_transform(args.input_size, args.crop_pct), args)
    batch = load_batch(samples, range(len(source)), device)
    if args.filter is not None:
        pixels = draw_filter_radii(args, scale_to_pixels(batch))
    else:
        draw = draw_encoder if of_encoder else draw_method
        pixels = draw(args, weights, batch, device)
    write_picture(args, pixels, len(source))


if __name__ == "__main__":
    cli.run_main(main)
