"""Radial spectrum against explicit sums over every frequency and pixel."""

import cmath
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from models_pixmim import LowPass, low_pass_disc
from util.plots.spectrum import draw_power, radial_power, ring_index, split_power


def power_by_hand(pixels: np.ndarray) -> dict[int, float]:
    """Ring -> power of one channel, by the definition of the discrete Fourier transform."""
    height, width = pixels.shape
    power: dict[int, float] = {}
    for u in range(-(height // 2), height - height // 2):
        for v in range(-(width // 2), width - width // 2):
            wave = sum(
                pixels[y, x] * cmath.exp(-2j * math.pi * (u * y / height + v * x / width))
                for y in range(height)
                for x in range(width)
            )
            ring = next(k for k in range(height + width) if u * u + v * v <= k * k)
            power[ring] = power.get(ring, 0) + abs(wave) ** 2 / (height * width) ** 2
    return power


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (6, 10)])
def test_ring_powers_equal_those_of_an_explicit_transform(size):
    images = torch.rand(2, 3, *size)
    by_hand = [power_by_hand(channel) for channel in images[1].double().numpy()]
    expected = [sum(p.get(k, 0) for p in by_hand) / 3 for k in range(int(ring_index(size).max()) + 1)]
    assert_close(radial_power(images)[1], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("size", [(16, 16), (9, 24)])
def test_ring_powers_sum_to_the_mean_square(size):
    images = torch.randn(3, 2, *size)
    assert_close(radial_power(images).sum(1), images.double().square().mean((1, 2, 3)))  # Parseval


def test_ring_0_holds_the_mean_and_a_wave_is_in_its_own_ring():
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    wave = 0.3 + torch.cos(2 * math.pi * (3 * y + 4 * x) / 16)  # 5 bins from zero, of power 1/2
    expected = torch.zeros(13, dtype=torch.float64)
    expected[0], expected[5] = 0.09, 0.5
    assert_close(radial_power(wave.expand(1, 1, 16, 16))[0, :13], expected, atol=1e-12, rtol=1e-6)


def test_the_centered_filter_keeps_exactly_the_rings_up_to_its_radius():
    assert torch.equal(ring_index((20, 24)) <= 7, low_pass_disc((20, 24), 7, "centered"))
    images = torch.rand(2, 3, 16, 16)
    low = LowPass((16, 16), 4, (0, 0, 0), (1, 1, 1), "centered")(images)
    below, above = split_power(low, 4)
    assert above < 1e-12  # rounding errors of float32
    assert below == pytest.approx(split_power(images, 4)[0], rel=1e-5)
    removed = split_power(images - low, 4)
    assert removed == pytest.approx((0, split_power(images, 4)[1]), rel=1e-5, abs=1e-9)


def test_the_chart_shows_complete_rings_without_the_mean(monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "util.plots.spectrum.draw_lines", lambda lines, *words, **options: drawn.update(lines=lines, **options)
    )
    images = torch.rand(2, 3, 16, 12)
    draw_power({"input": images}, 4)
    (xs, ys), power = drawn["lines"]["input"], radial_power(images).mean(0)
    assert xs == [1, 2, 3, 4, 5, 6]
    assert ys == pytest.approx(power[1:7].tolist())
    assert drawn["mark"] == (4, "cut-off, r = 4")
    draw_power({"input": images}, None)
    assert drawn["mark"] is None
