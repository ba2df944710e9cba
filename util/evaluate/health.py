"""Checks of a pre-training run: example images before the first step, loss against a constant prediction."""

import math
from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from util.log import read_records
from util.run import Run

SHARE = "share_of_constant"  # key in log.jsonl


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
        where = f"--data_path {' '.join(args.data_path)}"
        warnings.append(f"warning: {where}: {len(images)} example images have almost one colour; check the images")
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


HIGH_LR = 3e-3  # above the peak learning rates of published recipes, at most 2.4e-3
REMEDIES = {
    "trivial": "the target is trivial; check --lowpass_radius, --mean and --std. {rate} is not the cause",
    "diverged": "training diverged; lower {rate}",
    "high": "lower {rate}, which is above those of published recipes",
    "falling": "it is still falling; train longer (--epochs), or raise {rate}",
    "slow": "it hardly falls; raise {rate}",
    "constant": "it stays there; try another {rate}, and look at the target in the pictures on TensorBoard",
}


def explain_loss(shares: Sequence[float], lr: float, steps: int, warmup_epochs: float, epochs: int) -> str | None:
    """Key of REMEDIES if nothing is learned; None if something is, or if it is too early to tell.

    `shares` are the losses of the example images, as shares of the loss of a constant prediction: before training, then after
    each epoch of `steps` updates. `lr` is the peak learning rate. The thresholds were measured (docs/healthy_run.md).
    """
    epoch, now = len(shares) - 1, shares[-1]
    if epoch < max(1, warmup_epochs) or 0.01 < now < 0.95:
        return None
    if now <= 0.01:
        return "trivial"
    if now > 1.1 * min(shares):
        return "diverged"
    if epoch < epochs / 2 and (epoch - warmup_epochs) * steps < 300:
        return None
    if lr > HIGH_LR:
        return "high"
    if shares[epoch // 2] - now > 0.01:
        return "falling"
    return "slow" if now > 1.05 else "constant"


class LossCheck:
    """Logs the loss of the example images after each epoch, and warns once for each cause why nothing is learned."""

    def __init__(self, run: Run, model: Any, images: Tensor, noise: Tensor, starts: bool):
        """`starts`: the run begins, so that the model is untrained."""
        self.run, self.model, self.examples = run, model, (images, noise)
        self.shares = {record["epoch"]: record[SHARE] for record in read_records(run.log.path) if SHARE in record}
        if starts and 0 not in self.shares:
            self.add(0)

    def add(self, epoch: int) -> None:
        """Log the loss of the example images after this many epochs; one that is not finite is no share of a constant's."""
        loss, constant = compare_with_constant(self.model, *self.examples)
        if not math.isfinite(loss):
            self.run.log.info(f"warning: epoch {epoch}: the loss of the example images is not finite")
            self.run.log.scalars({"epoch": epoch, "example_loss": None})
            return
        self.shares[epoch] = loss / max(constant, 1e-12)
        self.run.log.scalars({"epoch": epoch, "example_loss": loss, SHARE: self.shares[epoch]})

    def after_epoch(self, epoch: int, steps: int) -> None:
        """Log the loss after this epoch of `steps` updates, and warn if nothing is learned for a new cause."""
        if epoch not in self.shares:
            self.add(epoch)
        if epoch not in self.shares:
            return
        args, now = self.run.args, self.shares[epoch]
        known = [self.shares.get(n, now) for n in range(epoch + 1)]  # a run of an earlier version has no early values
        schedule = self.run.lr, steps, args.warmup_epochs, args.epochs
        *earlier, cause = (explain_loss(known[:n], *schedule) for n in range(1, epoch + 2))
        if cause and cause not in earlier:
            remedy = REMEDIES[cause].format(rate=f"--blr {args.blr:g} (peak learning rate {self.run.lr:.3g})")
            self.run.log.info(
                f"warning: the loss of the example images is {now:.3f} of that of a constant prediction after {epoch * steps} "
                f"updates; {remedy}. See docs/healthy_run.md"
            )
