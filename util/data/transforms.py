"""Transforms: crops for training and evaluation, normalisation on the device."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchvision import transforms as T

from util.crop import SimpleResizedCrop, resize_to_cover
from util.rng import SeededTransform

T_MODES = {mode.value: mode for mode in T.InterpolationMode}


def pretrain_transform(crop: str, size: tuple[int, int], interpolation: str) -> Callable:
    """`src`: SimpleResizedCrop; `rrc`: MAE's RandomResizedCrop. `Normalize` flips on the device."""
    if crop == "src":
        return SimpleResizedCrop(size, interpolation)
    return SeededTransform(T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=T_MODES[interpolation]))


def eval_transform(size: tuple[int, int], interpolation: str = "bicubic") -> Callable:
    """Resize to cover 256 / 224 of the input size, then crop the centre."""
    height, width = (int(side * 256 / 224) for side in size)
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
