"""Radial power spectrum of images and its chart."""

import numpy as np
import torch
from torch import Tensor

from util.plots.charts import draw_lines


def ring_index(size: tuple[int, int]) -> Tensor:
    """Ring of each frequency, (H, W) int64 in the order of torch.fft.fft2; ring k has distances above k - 1 and up to k bins.

    The `centered` filter of an integer radius keeps the rings up to that radius. Ring 0 is the mean.
    """
    k = [(torch.arange(n) + n // 2) % n - n // 2 for n in size]  # integers, as in models_pixmim.low_pass_disc
    return (k[0][:, None] ** 2 + k[1] ** 2).double().sqrt().ceil().long()


def radial_power(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, K) float64: power of each ring, averaged over channels; the rings sum to the mean square."""
    height, width = images.shape[-2:]
    power = torch.fft.fft2(images.double()).abs().square().mean(1).flatten(1) / (height * width) ** 2
    ring = ring_index((height, width)).flatten()
    return power.new_zeros(len(images), int(ring.max()) + 1).index_add_(1, ring.to(images.device), power)


def split_power(images: Tensor, radius: float) -> tuple[float, float]:
    """(power up to `radius` bins from zero, power beyond) of images (B, C, H, W), as mean squares."""
    power = radial_power(images).mean(0)
    inside = torch.arange(len(power), device=power.device) <= radius
    return power[inside].sum().item(), power[~inside].sum().item()


def draw_power(images: dict[str, Tensor], radius: float | None) -> np.ndarray:
    """Chart (H', W', 3) uint8 of the power of each complete ring except the mean, averaged over the images of each name."""
    shortest = min(next(iter(images.values())).shape[-2:])
    rings = list(range(1, shortest // 2 + 1))  # larger rings are incomplete: corners of the spectrum
    curves = {name: radial_power(x).mean(0)[rings].tolist() for name, x in images.items()}
    floor = 1e-7 * max(max(curve) for curve in curves.values())  # hides the rounding errors of a filtered image
    lines = {name: (rings, curve) for name, curve in curves.items()}
    mark = None if radius is None else (radius, f"cut-off, r = {radius:g}")
    title, x_label = "power per frequency ring (pixels in [0, 1])", "frequency, cycles per image side"
    return draw_lines(lines, title, x_label, log=True, floor=floor, mark=mark)
