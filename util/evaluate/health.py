"""Checks of a pre-training run: example images before the first step, loss against a constant prediction."""

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def format_values(values: Iterable[float]) -> str:
    """Numbers as a flag takes them, three digits each."""
    return " ".join(f"{float(value):.3g}" for value in values)


def patch_variance(images: Tensor, patch: int) -> float:
    """Mean variance within patches of images (B, C, H, W), each channel around its own mean."""
    return images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).var((3, 5)).mean().item()


@torch.no_grad()
def check_examples(model: Any, images: Tensor, args: Namespace) -> list[str]:
    """Warnings about normalised example images (B, C, H, W) and the target made of them."""
    warnings = []
    mean, std = torch.tensor(args.mean), torch.tensor(args.std)
    centre, spread = images.mean((0, 2, 3)).cpu(), images.std((0, 2, 3)).cpu()
    if (spread * std).max() < 0.02:  # five grey levels
        warnings.append(
            f"warning: --data_path {args.data_path}: {len(images)} example images have almost one colour; check the images"
        )
    elif centre.abs().max() > 2.5 or spread.min() < 0.15 or spread.max() > 6:
        warnings.append(
            f"warning: --mean {format_values(mean)} --std {format_values(std)} normalise the example images to "
            f"{format_values(centre)} +- {format_values(spread)} instead of about 0 +- 1; for pixels in [0, 1] these images "
            f"have --mean {format_values(centre * std + mean)} --std {format_values(spread * std)}"
        )
    radius, patch = getattr(model.target, "radius", None), model.encoder.patch
    if radius is not None:
        share = patch_variance(model.target(images), patch) / max(patch_variance(images, patch), 1e-12)
        if share < 0.1:
            warnings.append(
                f"warning: --lowpass_radius {radius:g} keeps {share:.1%} of the variance within patches, so targets are "
                "nearly constant; raise it, see the table of radii in docs/decisions.md"
            )
    if not model.norm_pix_loss:
        warnings.append(
            "note: --no-norm_pix_loss: the loss depends mostly on the brightness of each patch; the paper normalises "
            "patches (--norm_pix_loss)"
        )
    return warnings


@torch.no_grad()
def compare_with_constant(model: Any, images: Tensor, noise: Tensor) -> tuple[float, float]:
    """(loss of the model, loss of the best constant prediction) on normalised images (B, C, H, W)."""
    training = model.training
    model.eval()
    loss, _, mask = model(images, noise)
    target, _, _ = model.targets(images, mask)
    model.train(training)
    return loss.item(), target.var(correction=0).item()


def check_loss(epoch: int, model: Any, images: Tensor, noise: Tensor, args: Namespace) -> str | None:
    """Warning if, after the warm-up, the model is no better than a constant on the example images; else None."""
    if epoch < args.warmup_epochs:
        return None
    loss, constant = compare_with_constant(model, images, noise)
    if loss < 0.95 * constant:
        return None
    return (
        f"warning: epoch {epoch}: the loss of the example images is {loss:.3f}, that of a constant prediction {constant:.3f}; "
        f"the model learns nothing: lower --blr {args.blr:g}, or see docs/healthy_run.md"
    )
