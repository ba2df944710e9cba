"""Radial power spectrum of images, and a chart of it."""

import numpy as np
import torch
from torch import Tensor

from util.plots.charts import plot


def rings(size: tuple[int, int]) -> Tensor:
    """Ring of each frequency, (H, W) int64 in the order of torch.fft.fft2: k holds distances above k - 1 up to k bins.

    So the rings up to an integer radius are what the `centered` filter of that radius keeps. Ring 0 is the mean.
    """
    k = [(torch.arange(n) + n // 2) % n - n // 2 for n in size]  # integers, as in models_pixmim.low_pass_disc
    return (k[0][:, None] ** 2 + k[1] ** 2).double().sqrt().ceil().long()


def radial_power(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, K) float64: power of each ring, averaged over channels; all rings add up to the mean square."""
    height, width = images.shape[-2:]
    power = torch.fft.fft2(images.double()).abs().square().mean(1).flatten(1) / (height * width) ** 2
    ring = rings((height, width)).flatten().to(images.device)
    return power.new_zeros(len(images), int(ring.max()) + 1).index_add_(1, ring, power)


def split_power(images: Tensor, radius: float) -> tuple[float, float]:
    """(mean square at most `radius` bins from zero, mean square beyond) of images (B, C, H, W)."""
    power = radial_power(images).mean(0)
    inside = torch.arange(len(power), device=power.device) <= radius
    return power[inside].sum().item(), power[~inside].sum().item()


def spectrum_chart(images: dict[str, Tensor], radius: float | None) -> np.ndarray:
    """Chart (H', W', 3) uint8 of the power of each whole ring but the mean, averaged over the images of each name."""
    shortest = min(next(iter(images.values())).shape[-2:])
    rings = list(range(1, shortest // 2 + 1))  # those beyond are corners
    curves = {name: radial_power(x).mean(0)[rings].tolist() for name, x in images.items()}
    floor = 1e-7 * max(max(curve) for curve in curves.values())  # a filtered image has rounding errors beyond
    return plot(
        {name: (rings, curve) for name, curve in curves.items()},
        "power of each ring of frequencies (pixels in [0, 1])",
        "frequency, cycles per image side",
        log=True,
        floor=floor,
        mark=None if radius is None else (radius, f"cut-off, r = {radius:g}"),
    )
