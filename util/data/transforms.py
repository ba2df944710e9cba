"""Transforms: crops for training and evaluation, normalisation on the device."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import functional as F

from util.args import default_crop_pct
from util.crop import SimpleResizedCrop, resize_to_cover
from util.rng import SeededTransform

T_MODES = {mode.value: mode for mode in T.InterpolationMode}


def pretrain_transform(crop: str, size: tuple[int, int], interpolation: str) -> Callable:
    """`src`: SimpleResizedCrop; `rrc`: MAE's RandomResizedCrop. `Normalize` flips on the device."""
    if crop == "src":
        return SimpleResizedCrop(size, interpolation)
    return SeededTransform(T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=T_MODES[interpolation]))


class ClampedResizedCrop(T.RandomResizedCrop):
    """Crop of facebookresearch/mae's linear probe: one draw of area and aspect ratio, each side clamped to the image.

    torchvision draws again until the window fits, so that its crops are smaller.
    """

    @staticmethod
    def get_params(img, scale, ratio) -> tuple[int, int, int, int]:
        """Top, left, height, width of the window."""
        _, *size = F.get_dimensions(img)
        area = size[0] * size[1] * torch.empty(1).uniform_(*scale).item()
        aspect = math.exp(torch.empty(1).uniform_(*map(math.log, ratio)).item())
        window = [min(round(math.sqrt(x)), side) for x, side in zip((area / aspect, area * aspect), size, strict=True)]
        top, left = (int(torch.randint(n - m + 1, (1,))) for n, m in zip(size, window, strict=True))
        return top, left, window[0], window[1]


def probe_transform(size: tuple[int, int]) -> Callable:
    """Training crop of the linear probe, 0.08 to 1 of the area. `Normalize` flips on the device."""
    return SeededTransform(ClampedResizedCrop(size, interpolation=T_MODES["bicubic"]))


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
