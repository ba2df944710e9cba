"""Pre-training of a batch: the model that the flags describe, its loss, and the picture of it."""

from argparse import Namespace
from collections.abc import Callable
from inspect import signature

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from models_pixmim import LowPass, PixMIM, patch_statistics, patchify, take, unpatchify
from util.args import channel_statistics, encoder_options


def lowpass_radius(args: Namespace) -> float:
    """Cut-off in bins: as given, else 40 at 224 px and in proportion to the shorter side."""
    return 40 * min(args.input_size) / 224 if args.lowpass_radius is None else args.lowpass_radius


def build_target(args: Namespace) -> nn.Module:
    """What is predicted: the low-passed image, or with radius 0 the image itself (MAE)."""
    radius = lowpass_radius(args)
    if radius == 0:
        return nn.Identity()
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


# ----------------------------------------------------------------------------------------------------------- the picture


@torch.no_grad()
def panel(model: PixMIM, images: Tensor, noise: Tensor, args: Namespace) -> np.ndarray:
    """A row for each image (H', W', 3) uint8: input, target, masked input, prediction, what the filter removed."""
    training = model.training
    model.eval()
    _, prediction, mask = model(images, noise)
    model.train(training)
    mean, std = (
        torch.tensor(v, device=images.device).view(-1, 1, 1)
        for v in channel_statistics(args.in_chans, args.mean, args.std)
    )
    patch, grid = model.encoder.patch, model.encoder.grid
    target, visible = model.target(images), patchify(images, patch)
    grey = ((0.5 - mean) / std).expand_as(images)
    if model.norm_pix_loss:
        centre, scale = patch_statistics(take(patchify(target, patch), mask.drop))
        prediction = prediction * scale + centre
    filled = visible.scatter(1, mask.drop[..., None].expand_as(prediction), prediction)
    hidden = torch.where(mask.removed[..., None], patchify(grey, patch), visible)
    filtered = isinstance(model.target, LowPass)
    how = "true patch mean and std" if model.norm_pix_loss else "pixels"
    columns = {"input": images}
    if filtered:
        columns[f"low-pass target, r = {model.target.radius:g}"] = target
    columns["masked input"] = unpatchify(hidden, patch, grid)
    columns[f"prediction ({how})"] = unpatchify(filled, patch, grid)
    if filtered:
        columns["removed by the filter + grey"] = images - target + grey
    return draw({label: to_uint8(x * std + mean) for label, x in columns.items()})


def to_uint8(pixels: Tensor) -> np.ndarray:
    """(B, C, H, W) in [0, 1] -> (B, H, W, 3) uint8; of other channel counts the first, or the first three."""
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def draw(columns: dict[str, np.ndarray], gap: int = 6, width: int = 224) -> np.ndarray:
    """Labelled columns of images (B, H, W, 3) side by side on white, small images enlarged to about `width`."""
    zoom = max(1, round(width / next(iter(columns.values())).shape[2]))
    columns = {label: images.repeat(zoom, axis=1).repeat(zoom, axis=2) for label, images in columns.items()}
    count, height, width, _ = next(iter(columns.values())).shape
    font = ImageFont.load_default(size=max(11, width // 17))
    header = 2 * int(font.size)
    canvas = Image.new("RGB", (gap + len(columns) * (width + gap), header + count * (height + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (label, images) in enumerate(columns.items()):
        left = gap + column * (width + gap)
        pen.text((left + width / 2, header / 2), label, fill="black", font=font, anchor="mm")
        for row, image in enumerate(images):
            canvas.paste(Image.fromarray(image), (left, header + row * (height + gap)))
    return np.asarray(canvas)
