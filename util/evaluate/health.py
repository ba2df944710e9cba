"""Checks of a pre-training run: example images before the first step, loss against a constant prediction."""

from argparse import Namespace

import torch
from torch import Tensor

from models_pixmim import LowPass, PixMIM, patch_statistics, patchify, take


def listed(values: Tensor | tuple[float, ...]) -> str:
    """Numbers as a flag takes them."""
    return " ".join(f"{float(value):.3g}" for value in values)


def detail(images: Tensor, patch: int) -> float:
    """Variance within patches, each channel around its own mean."""
    return patchify(images, patch).unflatten(2, (patch * patch, -1)).var(2).mean().item()


@torch.no_grad()
def warnings_at_start(model: PixMIM, images: Tensor, args: Namespace) -> list[str]:
    """What is wrong with normalised example images (B, C, H, W) or with the target that is made of them."""
    said = []
    mean, std = args.mean, args.std
    centre, spread = images.mean((0, 2, 3)), images.std((0, 2, 3))
    pixel_std = spread.cpu() * torch.tensor(std)
    pixel_mean = centre.cpu() * torch.tensor(std) + torch.tensor(mean)
    if pixel_std.max() < 0.02:  # five grey levels
        said.append(
            f"warning: {len(images)} images of --data_path {args.data_path} are nearly of one colour: look at them"
        )
    elif centre.abs().max() > 2.5 or spread.min() < 0.15 or spread.max() > 6:
        said.append(
            f"warning: --mean {listed(mean)} --std {listed(std)} make the example images {listed(centre)} +- "
            f"{listed(spread)} instead of about 0 +- 1; pixels are in [0, 1], and of these images --mean "
            f"{listed(pixel_mean)} --std {listed(pixel_std)} would be true"
        )
    if isinstance(model.target, LowPass):
        share = detail(model.target(images), model.encoder.patch) / max(detail(images, model.encoder.patch), 1e-12)
        if share < 0.1:
            said.append(
                f"warning: --lowpass_radius {model.target.radius:g} leaves {share:.1%} of the variance within patches, "
                "nearly constant targets: raise it; docs/decisions.md has a table of radii"
            )
    if not model.norm_pix_loss:
        said.append(
            "note: --no-norm_pix_loss: the loss is mostly each patch's brightness; leave the flag out unless you mean it"
        )
    return said


@torch.no_grad()
def losses(model: PixMIM, images: Tensor, noise: Tensor) -> tuple[float, float]:
    """(loss of the model, loss of the best constant) on normalised images: what predicting their mean would score."""
    training = model.training
    model.eval()
    loss, _, mask = model(images, noise)
    model.train(training)
    target = take(patchify(model.target(images).float(), model.encoder.patch), mask.drop)
    if model.norm_pix_loss:
        centre, scale = patch_statistics(target)
        target = (target - centre) / scale
    return loss.item(), target.var(correction=0).item()


def warning_after(epoch: int, model: PixMIM, images: Tensor, noise: Tensor, args: Namespace) -> str | None:
    """A line if, the warm-up over, the model is no better than a constant on the example images."""
    if epoch < args.warmup_epochs:
        return None
    loss, constant = losses(model, images, noise)
    if loss < 0.95 * constant:
        return None
    return (
        f"warning: after epoch {epoch} the loss of the example images is {loss:.3f}, that of predicting their mean "
        f"{constant:.3f}: nothing is learned; lower --blr ({args.blr:g} now), or find the cause in docs/healthy_run.md"
    )
