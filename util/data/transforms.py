"""Transforms: crops for training and evaluation, normalisation on the device."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.functional import resized_crop

from util.args import default_crop_pct
from util.crop import SimpleResizedCrop, resize_to_cover
from util.rng import SeededTransform

T_MODES = {mode.value: mode for mode in T.InterpolationMode}


def pretrain_transform(crop: str, size: tuple[int, int], interpolation: str) -> Callable:
    """`src`: SimpleResizedCrop; `rrc`: MAE's RandomResizedCrop. `Normalize` flips on the device."""
    if crop == "src":
        return SimpleResizedCrop(size, interpolation)
    return SeededTransform(T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=T_MODES[interpolation]))


def clamped_window(width: int, height: int, u: Sequence[float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) at u (4,) in [0, 1): 8 to 100 % of the area, aspect ratio 3/4 to 4/3, clamped to the image."""
    area, ratio = (0.08 + 0.92 * u[0]) * width * height, (4 / 3) ** (2 * u[1] - 1)
    h, w = (min(max(round(math.sqrt(x)), 1), most) for x, most in ((area / ratio, height), (area * ratio, width)))
    return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w


def clamped_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    window = clamped_window(*image.size, torch.rand(4, dtype=torch.float64).tolist())
    return resized_crop(image, *window, [*size], T_MODES["bicubic"])


def probe_transform(size: tuple[int, int]) -> Callable:
    """Crop of the linear probe of facebookresearch/mae and of the release: drawn once, clamped to the image, bicubic.

    torchvision's RandomResizedCrop draws again until the crop fits, which gives smaller crops.
    """
    return SeededTransform(partial(clamped_crop, size=size))


def eval_transform(size: tuple[int, int], crop_pct: float | None = None, interpolation: str = "bicubic") -> Callable:
    """Resize to cover the input size / crop_pct, then crop the centre; None = `default_crop_pct`."""
    height, width = (int(side / (crop_pct or default_crop_pct(size))) for side in size)
    resize = partial(resize_to_cover, size=(height, width), interpolation=interpolation)
    return SeededTransform(T.Compose([resize, T.CenterCrop(size)]))


class Normalize:
    """Batch with uint8 images (B, H, W, C) -> normalised (B, C, H, W) float32, flipped where batch["flip"] is true."""

    def __init__(self, args, device: torch.device):
        self.mean, self.std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (args.mean, args.std))

    def __call__(self, batch: dict) -> Tensor:
        images = batch["images"].permute(0, 3, 1, 2)
        if "flip" in batch:
            images = torch.where(batch["flip"].view(-1, 1, 1, 1), images.flip(3), images)
        return images.float().div(255).sub(self.mean).div(self.std)
