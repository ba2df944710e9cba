"""SimpleResizedCrop against torchvision's own pipeline."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import smooth
from torchvision import transforms as T

from util.crop import SimpleResizedCrop, resize_to_cover, window

SIZES = {"landscape": (70, 50), "portrait": (50, 70), "square": (45, 45), "exact": (32, 32), "small": (20, 13)}


def fixed(u) -> Namespace:
    """A generator that draws `u`."""
    return Namespace(random=lambda n: np.array(u))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("width_height", SIZES.values(), ids=SIZES)
def test_crop_is_that_of_torchvision_bit_for_bit(width_height, interpolation):
    image = smooth(np.random.default_rng(0), *width_height)
    resized = T.Resize(32, T.InterpolationMode(interpolation))(image)
    height, width = resized.height + 8, resized.width + 8  # padded by 4 on each side
    for seed in range(10):
        torch.manual_seed(seed)
        expected = T.RandomCrop(32, padding=4, padding_mode="reflect")(resized)
        torch.manual_seed(seed)
        top, left, _, _ = T.RandomCrop.get_params(torch.empty(3, height, width), (32, 32))
        u = (top + 0.5) / (height - 31), (left + 0.5) / (width - 31)  # the middle of what this offset is drawn from
        crop = SimpleResizedCrop((32, 32), interpolation)([image], fixed(u))
        assert np.array_equal(crop, np.asarray(expected))


@pytest.mark.parametrize("shape", [(16, 24), (20, 20), (33, 21)])
def test_every_window_is_cut_from_the_reflected_image(shape):
    pixels = np.arange(shape[0] * shape[1] * 3).reshape(*shape, 3)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    rows, cols = shape[0] + 8 - 16 + 1, shape[1] + 8 - 20 + 1  # offsets of a 16 x 20 window
    for top in range(rows):
        for left in range(cols):
            cut = window(pixels, (16, 20), np.array([(top + 0.5) / rows, (left + 0.5) / cols]))
            assert np.array_equal(cut, padded[top : top + 16, left : left + 20])


def test_offsets_reach_both_extremes_and_all_between_equally_often():
    pixels = np.arange(20)[:, None, None].repeat(16, axis=1)  # the value is the row
    drawn = np.random.default_rng(0).random((2000, 2))
    # Row 8 of the window is never a reflection, so it tells where the window began: -4 ... 8.
    starts = [int(window(pixels, (16, 16), u)[8, 0, 0]) - 8 for u in [(0, 0), (np.nextafter(1, 0), 0), *drawn]]
    assert (starts[0], starts[1]) == (-4, 8)
    offsets, counts = np.unique(starts, return_counts=True)
    assert offsets.tolist() == list(range(-4, 9))
    assert abs(counts / len(starts) - 1 / 13).max() < 0.03  # 5 standard deviations of 2,000 draws


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (16, 64), (40, 40)])
@pytest.mark.parametrize("width_height", SIZES.values(), ids=SIZES)
def test_resized_image_covers_the_target_and_no_more(width_height, size):
    image = smooth(np.random.default_rng(0), *width_height)
    resized = resize_to_cover(image, size)
    assert resized.height >= size[0]
    assert resized.width >= size[1]
    assert resized.height == size[0] or resized.width == size[1]
    scale = max(size[0] / image.height, size[1] / image.width)
    assert abs(resized.height - scale * image.height) <= 1  # the aspect ratio is kept to a pixel
    assert abs(resized.width - scale * image.width) <= 1


def test_bands_are_cropped_alike():
    image = smooth(np.random.default_rng(0), 40, 30)
    crop = SimpleResizedCrop((24, 24))
    together = crop([image], np.random.default_rng(5))
    assert np.array_equal(together, crop(image.split(), np.random.default_rng(5)))
    memory = np.zeros((24, 24, 3), np.uint8)
    crop([image], np.random.default_rng(5), memory)
    assert np.array_equal(together, memory)


def test_a_crop_that_is_too_small_to_be_mirrored_is_refused():
    with pytest.raises(ValueError, match="a crop of 4 x 9 is too small to mirror 4 pixels"):
        SimpleResizedCrop((4, 9))
