"""SimpleResizedCrop compared with torchvision's transforms, the crop of the probe with written-out draws."""

import math
from argparse import Namespace
from itertools import product

import numpy as np
import pytest
import torch
from conftest import DEVICE, MODEL, one_rank, smooth
from torchvision import transforms as T

import main_linprobe
from util.crop import SimpleResizedCrop, crop_window, resize_to_cover
from util.data.transforms import clamped_window
from util.rng import CROP, generator

SIZES = ((70, 50), (50, 70), (45, 45), (32, 32), (20, 13))  # width, height


def rng_drawing(u) -> Namespace:
    """A generator that always draws `u`."""
    return Namespace(random=lambda n: np.array(u))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_equals_torchvision_s_bit_for_bit(interpolation):
    for width_height, seed in product(SIZES, range(10)):
        image = smooth(np.random.default_rng(0), *width_height)
        resized = T.Resize(32, T.InterpolationMode(interpolation))(image)
        height, width = resized.height + 8, resized.width + 8  # padded by 4 on each side
        torch.manual_seed(seed)
        expected = T.RandomCrop(32, padding=4, padding_mode="reflect")(resized)
        torch.manual_seed(seed)
        top, left, _, _ = T.RandomCrop.get_params(torch.empty(3, height, width), (32, 32))
        u = (top + 0.5) / (height - 31), (left + 0.5) / (width - 31)  # centre of the interval of u with this offset
        crop = SimpleResizedCrop((32, 32), interpolation)([image], rng_drawing(u))
        assert np.array_equal(crop, np.asarray(expected))


def test_every_window_is_a_crop_of_the_reflected_image():
    for shape in ((16, 24), (20, 20), (33, 21)):
        pixels = np.arange(shape[0] * shape[1] * 3).reshape(*shape, 3)
        padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)), mode="reflect")
        rows, cols = shape[0] + 8 - 16 + 1, shape[1] + 8 - 20 + 1  # offsets of a 16 x 20 window
        for top, left in product(range(rows), range(cols)):
            cut = crop_window(pixels, (16, 20), np.array([(top + 0.5) / rows, (left + 0.5) / cols]))
            assert np.array_equal(cut, padded[top : top + 16, left : left + 20])


def test_all_offsets_are_equally_frequent():
    pixels = np.arange(20)[:, None, None].repeat(16, axis=1)  # the value is the row
    drawn = np.random.default_rng(0).random((2000, 2))
    # Row 8 of a window is never a reflection: its value gives the first row, -4 to 8.
    starts = [int(crop_window(pixels, (16, 16), u)[8, 0, 0]) - 8 for u in [(0, 0), (np.nextafter(1, 0), 0), *drawn]]
    assert (starts[0], starts[1]) == (-4, 8)
    offsets, counts = np.unique(starts, return_counts=True)
    assert offsets.tolist() == list(range(-4, 9))
    assert abs(counts / len(starts) - 1 / 13).max() < 0.03  # 5 standard deviations of 2,000 draws


def test_resize_to_cover_gives_the_smallest_image_that_covers_the_size():
    for width_height, size in product(SIZES, ((32, 48), (48, 32), (16, 64), (40, 40))):
        image = smooth(np.random.default_rng(0), *width_height)
        resized = resize_to_cover(image, size)
        assert resized.height >= size[0]
        assert resized.width >= size[1]
        assert resized.height == size[0] or resized.width == size[1]
        scale = max(size[0] / image.height, size[1] / image.width)
        assert abs(resized.height - scale * image.height) <= 1  # the aspect ratio is kept to a pixel
        assert abs(resized.width - scale * image.width) <= 1


def test_all_bands_get_the_same_crop():
    image = smooth(np.random.default_rng(0), 40, 30)
    crop = SimpleResizedCrop((24, 24))
    together = crop([image], np.random.default_rng(5))
    assert np.array_equal(together, crop(image.split(), np.random.default_rng(5)))
    out = np.zeros((24, 24, 3), np.uint8)
    crop([image], np.random.default_rng(5), out)
    assert np.array_equal(together, out)


def test_refuses_a_crop_too_small_to_reflect():
    with pytest.raises(ValueError, match="crop of 4 x 9 "):
        SimpleResizedCrop((4, 9))


@pytest.mark.parametrize("probe_as", ["mae", "mmselfsup"])
def test_probe_crop_is_one_draw_clamped_to_the_image(probe_as, photos, tmp_path):
    words = ["--checkpoint", "none", "--data_path", photos, "--probe_as", probe_as, "--batch_size", 8, *MODEL, *DEVICE]
    args = main_linprobe.get_parser().parse_args([*map(str, words)])
    state, _ = main_linprobe.setup(args, lambda args: one_rank(tmp_path, **vars(args)))
    for index, (width, height) in enumerate([(50, 37), (80, 30), (30, 80), (2, 2)] * 5):
        image = smooth(np.random.default_rng(index), width, height)
        torch.manual_seed(int(generator(0, CROP, 1, index).bit_generator.random_raw()))
        area, aspect, top, left = torch.rand(4, dtype=torch.float64).tolist()
        area = (0.08 + (1 - 0.08) * area) * width * height
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * aspect)
        w, h = min(round(math.sqrt(area * aspect)), width), min(round(math.sqrt(area / aspect)), height)
        w, h = max(w, 1), max(h, 1)  # of 2 x 2 pixels
        top, left = math.floor(top * (height - h + 1)), math.floor(left * (width - w + 1))
        expected = image.crop((left, top, left + w, top + h)).resize((16, 16), resample=3)  # bicubic
        cropped = state.loader.dataset.transform([image], generator(0, CROP, 1, index))
        assert np.array_equal(cropped, np.asarray(expected))


@pytest.mark.parametrize(("width", "height", "area", "full"), [(500, 375, 0.518, 0.256), (800, 300, 0.414, None)])
def test_probe_crops_are_as_large_as_those_of_mae(width, height, area, full):
    windows = np.array([clamped_window(width, height, u) for u in np.random.default_rng(0).random((20000, 4))])
    tops, lefts, heights, widths = windows.T
    assert (heights * widths).mean() / (width * height) == pytest.approx(area, abs=0.006)  # three standard errors
    assert min(tops.min(), lefts.min()) == 0
    assert (tops + heights).max() == height
    assert (lefts + widths).max() == width
    if full:
        assert (heights == height).mean() == pytest.approx(full, abs=0.01)
