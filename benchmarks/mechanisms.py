"""python -m benchmarks.mechanisms: what the paper argues for target and crop (sections 3.2 and 3.3), made measurable.

perturb: copies of validation images without some kind of information, for kNN (--val_path). crops: how much of each image and of
its annotated objects SimpleResizedCrop (src) and MAE's RandomResizedCrop (rrc) keep.
"""

import argparse
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import gaussian_blur

from models_pixmim import LowPass
from util.args import Parser, SizeAction, number, run_main
from util.crop import crop_window, resize_to_cover
from util.data.masks import folder_pairs, read_mask
from util.data.sources import labelled_source
from util.data.transforms import eval_transform
from util.rng import CROP, MASK, generator, seed_everything


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    perturb = commands.add_parser("perturb", help="write perturbed validation images")
    perturb.add_argument("--data_path", required=True, metavar="DIR", help="folder with val/<class>/")
    perturb.add_argument("--out", required=True, metavar="DIR", help="folder for KIND/val/<class>/IMAGE.png")
    perturb.add_argument("--radius", type=number(float, 1), default=23.0, help="cut-off of the low-pass filter in bins")
    perturb.add_argument("--patch_size", type=number(int, 1), default=16, help="side of the patches that are shuffled")
    crops = commands.add_parser("crops", help="print the shares that the crops keep, in percent")
    crops.add_argument("--data_path", required=True, metavar="DIR", help="folder with train/{images,masks}")
    crops.add_argument("--draws", type=number(int, 1), default=10000, help="crops of each kind over all images")
    for each in (perturb, crops):
        size = {"type": number(int, 1), "nargs": "+", "action": SizeAction, "default": (128, 128), "metavar": "H"}
        each.add_argument("--input_size", help="side of the training input in pixels, or H W", **size)
        each.add_argument("--seed", type=number(int, 0), default=0, help="seed of the crops, or of noise and shuffling")
    return parser


def perturbations(args: Namespace) -> dict[str, Callable[[Tensor, np.random.Generator], Tensor]]:
    """Kind -> function of an image (3, H, W) in [0, 1] and a generator."""
    low_pass = LowPass(args.input_size, args.radius, [0.0] * 3, [1.0] * 3, "centered")
    p, luma = args.patch_size, torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)

    def shuffle(x: Tensor, rng: np.random.Generator) -> Tensor:
        patches = x.unfold(1, p, p).unfold(2, p, p)  # (3, h, w, p, p)
        order = torch.from_numpy(rng.permutation(patches[0, :, :, 0, 0].numel()))
        moved = patches.flatten(1, 2)[:, order].unflatten(1, patches.shape[1:3])
        return moved.permute(0, 1, 3, 2, 4).reshape(x.shape)

    return {
        "none": lambda x, rng: x,
        "lowpassed": lambda x, rng: low_pass(x[None])[0],
        "highpassed": lambda x, rng: x - low_pass(x[None])[0] + 0.5,
        "blurred": lambda x, rng: gaussian_blur(x, [13, 13], [2.0, 2.0]),
        "noised": lambda x, rng: x + 0.1 * torch.from_numpy(rng.standard_normal(x.shape, np.float32)),
        "grey": lambda x, rng: (x * luma).sum(0, keepdim=True).expand(3, -1, -1),
        "shuffled": shuffle,
    }


def perturb(args: Namespace) -> None:
    """Write each kind of each validation image as the encoder sees it: resized to cover the input, centre crop, PNG."""
    source, transform = labelled_source(args.data_path, "val"), eval_transform(args.input_size, crop_pct=1.0)
    kinds = perturbations(args)
    for i in range(len(source)):
        with Image.open(source.content(i)) as image:
            pixels = transform([image.convert("RGB")], generator(args.seed, CROP, 0, i))
        x = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        for kind, change in kinds.items():
            changed = change(x, generator(args.seed, MASK, 0, i)).clamp(0, 1).mul(255).round().byte()
            file = Path(args.out, kind, "val", source.relative_name(i)).with_suffix(".png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(changed.permute(1, 2, 0).numpy()).save(file)
    print(json.dumps({"images": len(source), "kinds": [*kinds]}))


def kept_by_src(mask: np.ndarray, side: tuple[int, int], rng: np.random.Generator) -> tuple[float, float]:
    """(share of the image, share of the mask (H, W)) in a SimpleResizedCrop."""
    area = np.asarray(resize_to_cover(Image.fromarray(mask.astype(np.float32)), side))
    index = crop_window(np.arange(area.size).reshape(*area.shape, 1), side, rng.random(2))
    kept = np.unique(index)  # reflected pixels count once
    return len(kept) / area.size, float(area.ravel()[kept].sum() / area.sum())


def kept_by_rrc(mask: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """(share of the image, share of the mask (H, W)) in MAE's RandomResizedCrop."""
    seed_everything(int(rng.bit_generator.random_raw()))
    y, x, h, w = RandomResizedCrop.get_params(torch.empty(1, *mask.shape), scale=[0.2, 1.0], ratio=[3 / 4, 4 / 3])
    return h * w / mask.size, float(mask[y : y + h, x : x + w].sum() / mask.sum())


def crops(args: Namespace) -> None:
    """Print mean, standard deviation and the share of crops that lose more than half, for images and annotated objects."""
    _, paths = folder_pairs(Path(args.data_path), "train", ade=False)
    masks = [mask for mask in (read_mask(path, None) > 0 for path in paths) if mask.any()]
    draws = []
    for i in range(args.draws):
        mask = masks[i % len(masks)]
        src = kept_by_src(mask, args.input_size, generator(args.seed, CROP, 0, i))
        draws.append((*src, *kept_by_rrc(mask, generator(args.seed, CROP, 1, i))))
    shares = 100 * np.array(draws).T
    names = ("src image", "src objects", "rrc image", "rrc objects")
    for name, x in zip(names, shares, strict=True):
        found = {"mean": x.mean(), "std": x.std(), "below_50": 100 * (x < 50).mean()}
        print(json.dumps({"kept": name, **{key: round(value, 1) for key, value in found.items()}, "draws": args.draws}))


def main() -> None:
    args = get_parser().parse_args()
    {"perturb": perturb, "crops": crops}[args.command](args)


if __name__ == "__main__":
    run_main(main)
