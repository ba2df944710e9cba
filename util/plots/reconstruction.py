"""Image grids of the pre-training task: reconstruction, masks, low-pass filters.

Letters: B images, C channels, H W pixels, h w patches.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from util.log import Log
from util.plots.grids import draw_columns, enlarge_maps, to_uint8
from util.plots.spectrum import draw_power, split_power


class Reconstruction(NamedTuple):
    """Reconstruction of images by a model. Tensors are (B, C, H, W) in pixels of [0, 1]."""

    images: Tensor
    target: Tensor
    masked: Tensor  # the images, grey where patches are removed
    filled: Tensor  # the images, with predictions where patches are removed
    error: Tensor  # prediction minus target where patches are removed, zero elsewhere
    radius: float | None  # cut-off of the target in bins; None = raw pixels
    scale: str  # how predictions became pixels


@torch.no_grad()
def reconstruct(model: Any, images: Tensor, noise: Tensor, args: Namespace) -> Reconstruction:
    """Reconstruction of normalised images (B, C, H, W); with norm_pix_loss by the true mean and std of each patch."""
    training = model.training
    model.eval()
    prediction, mask = model.predict_removed(images, noise)
    _, centre, scale = model.targets(images, mask)
    model.train(training)
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (args.mean, args.std))
    target = model.target(images)
    removed = mask.removed.unflatten(1, model.encoder.grid)
    predicted = paste_patches(target, prediction * scale + centre, mask.predict, model.encoder.patch)
    where = enlarge_maps(removed, model.encoder.patch).unsqueeze(1)
    pixels, targets, filled = (x * std + mean for x in (images, target, torch.where(where, predicted, images)))
    error, radius = predicted * std + mean - targets, getattr(model.target, "radius", None)
    how = "true patch mean and std" if model.norm_pix_loss else "pixels"
    return Reconstruction(pixels, targets, mask_images(pixels, removed), filled, error, radius, how)


def paste_patches(images: Tensor, patches: Tensor, index: Tensor, patch: int) -> Tensor:
    """Copy of images (B, C, H, W) in which `patches` (B, R, p * p * C) replace those numbered `index` (B, R)."""
    images = images.clone(memory_format=torch.contiguous_format)
    # (B, h, w, p, p, C) view
    grid = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 3, 5, 1)
    rows = torch.arange(len(images), device=images.device)[:, None]
    grid[rows, index // grid.shape[2], index % grid.shape[2]] = patches.unflatten(2, (patch, patch, -1))
    return images


def mask_images(pixels: Tensor, removed: Tensor) -> Tensor:
    """Images (B, C, H, W), grey where `removed` (B, h, w) is true."""
    where = enlarge_maps(removed, pixels.shape[-1] // removed.shape[-1])
    return pixels.masked_fill(where.unsqueeze(1), 0.5)


def draw_reconstruction(reconstruction: Reconstruction) -> np.ndarray:
    """Grid (H', W', 3) uint8, a row per image: input, target, masked input, prediction, what the filter removed.

    Grey images are drawn in grey: three channels with different statistics are predicted with different errors.
    """
    columns = {"input": reconstruction.images}
    if reconstruction.radius is not None:
        columns[f"low-pass target, r = {reconstruction.radius:g}"] = reconstruction.target
    columns["masked input"] = reconstruction.masked
    columns[f"prediction ({reconstruction.scale})"] = reconstruction.filled
    if reconstruction.radius is not None:
        columns["removed by the filter + grey"] = reconstruction.images - reconstruction.target + 0.5
    if (reconstruction.images - reconstruction.images[:, :1]).abs().max() < 1e-3:
        columns = {label: x.mean(1, keepdim=True) for label, x in columns.items()}
    return draw_columns({label: to_uint8(x) for label, x in columns.items()})


def draw_spectrum(reconstruction: Reconstruction) -> np.ndarray:
    """Chart (H', W', 3) uint8 of the power of each frequency; the prediction is pasted into the target."""
    images = {} if reconstruction.radius is None else {"input": reconstruction.images}
    images["input = target" if reconstruction.radius is None else "target"] = reconstruction.target
    return draw_power(
        images | {"prediction": reconstruction.target + reconstruction.error, "error": reconstruction.error},
        reconstruction.radius,
    )


def log_pictures(log: Log, reconstruction: Reconstruction, epoch: int) -> None:
    """Write grid and spectrum to TensorBoard, and the power of the error below and above the cut-off to the log."""
    if not reconstruction.filled.isfinite().all():
        log.info(f"warning: epoch {epoch}: predictions are not finite; no pictures are drawn")
        return
    log.image("reconstruction", draw_reconstruction(reconstruction), epoch)
    log.image("spectrum", draw_spectrum(reconstruction), epoch)
    if reconstruction.radius is not None:
        below, above = split_power(reconstruction.error, reconstruction.radius)
        log.scalars({"epoch": epoch, "error_below_cutoff": below, "error_above_cutoff": above})


def draw_masks(pixels: Tensor, masks: list[Tensor]) -> np.ndarray:
    """Grid (H', W', 3) uint8, a row per image: the image and its visible patches under each mask (B, h, w), True = removed."""
    columns = {f"mask {i + 1}": to_uint8(mask_images(pixels, removed)) for i, removed in enumerate(masks)}
    return draw_columns({"input": to_uint8(pixels), **columns})


def draw_filters(pixels: Tensor, radii: list[float], own: float, low_pass: Callable) -> np.ndarray:
    """Grid (H', W', 3) uint8, two rows per image: what filters of these radii keep and what they remove.

    `low_pass` maps a radius to the filter of images in [0, 1]; `own` is the radius of the model's target.
    """
    blank = torch.ones_like(pixels)
    columns = {"input": to_uint8(torch.stack([pixels, blank], 1).flatten(0, 1))}
    for radius in radii:
        kept = low_pass(radius)(pixels)
        label = f"r = {radius:g}" + (" (the target)" if radius == own else "")
        columns[label] = to_uint8(torch.stack([kept, pixels - kept + 0.5], 1).flatten(0, 1))
    return draw_columns(columns, rows=["kept", "removed + grey"] * len(pixels))
