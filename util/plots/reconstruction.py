"""Image grids of the pre-training task: reconstruction, masks, low-pass filters."""

from argparse import Namespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models_pixmim import LowPass, PatchMask, PixMIM, patch_statistics, patchify, take, unpatchify
from util.log import Log
from util.plots.grids import draw_columns
from util.plots.spectrum import spectrum_chart, split_power


class Reconstruction(NamedTuple):
    """What a model makes of images, each (B, C, H, W) in pixels of [0, 1]."""

    images: Tensor
    target: Tensor
    masked: Tensor  # the images, grey where patches are removed
    filled: Tensor  # the images with predictions where patches are removed
    error: Tensor  # prediction minus target where patches are removed, zero elsewhere
    radius: float | None  # cut-off of the target in bins, None = not filtered
    how: str  # the prediction became pixels


@torch.no_grad()
def reconstruct(model: PixMIM, images: Tensor, noise: Tensor, args: Namespace) -> Reconstruction:
    """The prediction of normalised images; with norm_pix_loss it gets the true mean and deviation of each patch."""
    training = model.training
    model.eval()
    _, prediction, mask = model(images, noise)
    model.train(training)
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (args.mean, args.std))
    patch, grid, how = model.encoder.patch, model.encoder.grid, "pixels"
    target = model.target(images)
    if model.norm_pix_loss:
        centre, scale = patch_statistics(take(patchify(target, patch), mask.drop))
        prediction, how = prediction * scale + centre, "true patch mean and std"
    where = mask.drop[..., None].expand_as(prediction)

    def replaced(x: Tensor) -> Tensor:
        return unpatchify(patchify(x, patch).scatter(1, where, prediction), patch, grid) * std + mean

    return Reconstruction(
        images * std + mean,
        target * std + mean,
        masked(images * std + mean, mask.drop, patch),
        replaced(images),
        replaced(target) - (target * std + mean),
        model.target.radius if isinstance(model.target, LowPass) else None,
        how,
    )


def masked(pixels: Tensor, drop: Tensor, patch: int) -> Tensor:
    """Images (B, C, H, W), grey where the patches `drop` (B, R) are."""
    patches = patchify(pixels, patch)
    patches = patches.scatter(1, drop[..., None].expand(-1, -1, patches.shape[2]), 0.5)
    return unpatchify(patches, patch, (pixels.shape[2] // patch, pixels.shape[3] // patch))


def panel(made: Reconstruction) -> np.ndarray:
    """A row for each image (H', W', 3) uint8: input, target, masked input, prediction, what the filter removed."""
    columns = {"input": made.images}
    if made.radius is not None:
        columns[f"low-pass target, r = {made.radius:g}"] = made.target
    columns["masked input"] = made.masked
    columns[f"prediction ({made.how})"] = made.filled
    if made.radius is not None:
        columns["removed by the filter + grey"] = made.images - made.target + 0.5
    return draw_columns({label: to_uint8(x) for label, x in columns.items()})


def spectrum(made: Reconstruction) -> np.ndarray:
    """Chart of the power of each frequency; the prediction is shown on the target's visible patches."""
    images = {} if made.radius is None else {"input": made.images}
    images["input = target" if made.radius is None else "target"] = made.target
    return spectrum_chart(images | {"prediction": made.target + made.error, "error": made.error}, made.radius)


def log_pictures(log: Log, made: Reconstruction, epoch: int) -> None:
    """Panel and spectrum on TensorBoard, and how much of the error lies below and above the cut-off."""
    if not made.filled.isfinite().all():
        log.info(f"warning: epoch {epoch}: predictions are not finite, there is nothing to draw")
        return
    log.image("reconstruction", panel(made), epoch)
    log.image("spectrum", spectrum(made), epoch)
    if made.radius is not None:
        below, above = split_power(made.error, made.radius)
        log.scalars({"epoch": epoch, "error_below_cutoff": below, "error_above_cutoff": above})


def to_uint8(pixels: Tensor) -> np.ndarray:
    """(B, C, H, W) in [0, 1] -> (B, H, W, 3) uint8; of other channel counts the first, or the first three."""
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def masks_picture(pixels: Tensor, masks: list[PatchMask], patch: int) -> np.ndarray:
    """A row for each image: the image and what the encoder sees of it under each mask."""
    seen = {f"mask {i + 1}": to_uint8(masked(pixels, mask.drop, patch)) for i, mask in enumerate(masks)}
    return draw_columns({"input": to_uint8(pixels), **seen})


def filter_picture(pixels: Tensor, radii: list[float], own: float, kind: str) -> np.ndarray:
    """Two rows for each image: what filters of these radii keep and what they remove; `own` is the model's radius."""
    channels, size = pixels.shape[1], tuple(pixels.shape[-2:])
    blank = torch.ones_like(pixels)
    columns = {"input": to_uint8(torch.stack([pixels, blank], 1).flatten(0, 1))}
    for radius in radii:
        kept = LowPass(size, radius, [0.0] * channels, [1.0] * channels, kind).to(pixels.device)(pixels)
        label = f"r = {radius:g}" + (" (the target)" if radius == own else "")
        columns[label] = to_uint8(torch.stack([kept, pixels - kept + 0.5], 1).flatten(0, 1))
    return draw_columns(columns, rows=["kept", "removed + grey"] * len(pixels))
