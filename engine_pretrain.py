"""Pre-training of a batch: the model that the flags describe, its loss, and the pictures of it."""

from argparse import Namespace
from collections.abc import Callable
from inspect import signature
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models_pixmim import LowPass, PixMIM, low_pass_disc, patch_statistics, patchify, take, unpatchify
from spectrum import spectrum_chart, split_power
from util.args import channel_statistics, encoder_options
from util.draw import draw_columns
from util.log import Log


def lowpass_radius(args: Namespace) -> float:
    """Cut-off in bins: as given, else 40 at 224 px and in proportion to the shorter side."""
    return 40 * min(args.input_size) / 224 if args.lowpass_radius is None else args.lowpass_radius


def build_target(args: Namespace) -> nn.Module:
    """What is predicted: the low-passed image, or with radius 0 the image itself (MAE)."""
    radius = lowpass_radius(args)
    if radius == 0:
        return nn.Identity()
    height, width = args.input_size
    kept = low_pass_disc(args.input_size, radius, args.lowpass)
    if kept.all() or not kept.any():
        raise ValueError(
            f"--lowpass_radius {radius:g} keeps {'every' if kept.any() else 'no'} frequency of {height} x {width} px; 0 is the target of MAE"
        )
    return LowPass(args.input_size, radius, *channel_statistics(args.in_chans, args.mean, args.std), args.lowpass)


def build_model(args: Namespace, encoders) -> PixMIM:
    """The host with its target and decoder, initialised."""
    build, options = encoders[args.model], encoder_options(args)
    if args.fuse_layers:
        if "fuse_layers" not in signature(build).parameters:
            raise ValueError(f"--fuse_layers: --model {args.model} fuses no layers")
        options["fuse_layers"] = args.fuse_layers
    model = PixMIM(
        build(**options),
        build_target(args),
        decoder_dim=args.decoder_dim,
        decoder_depth=args.decoder_depth,
        decoder_heads=args.decoder_heads,
        mask_ratio=args.mask_ratio,
        mask_unit=args.mask_unit,
        norm_pix_loss=args.norm_pix_loss,
    )
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model


def pretrain_loss(normalize: Callable) -> Callable[[nn.Module, dict], Tensor]:
    """(model, batch) -> the loss of the batch."""

    def loss(model: nn.Module, batch: dict) -> Tensor:
        return model(normalize(batch), batch["noise"])[0]

    return loss


# ---------------------------------------------------------------------------------------------------------- the pictures


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
    mean, std = (
        torch.tensor(v, device=images.device).view(-1, 1, 1)
        for v in channel_statistics(args.in_chans, args.mean, args.std)
    )
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
        log.say(f"warning: epoch {epoch}: predictions are not finite, there is nothing to draw")
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
