"""SimpleResizedCrop, the crop of PixMIM: resize the short side, pad by 4 reflected pixels, crop a random window, flip.

Needs only Pillow and NumPy. The resize is deterministic; only the window and the flip are random.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

MAX_PIXELS = 2**24  # of a resized image, or 64 inputs if these have more: limits the time for a very long image
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def check_pixels(old: tuple[int, int], new: tuple[int, int], size: tuple[int, int]) -> None:
    """ValueError if an image (width, height) `old` would have too many pixels as `new`, to cover size (H, W)."""
    if new[0] * new[1] > max(MAX_PIXELS, 64 * size[0] * size[1]):
        resized = f"{new[0]} x {new[1]} to cover {size}"
        raise ValueError(f"is {old[0]} x {old[1]} and would be {resized}: too long; crop it")


def resize_to_cover(image: Image.Image, size: tuple[int, int], interpolation: str = "bilinear") -> Image.Image:
    """Smallest resize of the same aspect ratio that covers size (H, W); torchvision's Resize(side) for a square."""
    (height, width), (w, h) = size, image.size
    if width * h >= height * w:  # the width limits
        height = max(height, int(width * h / w))
    else:
        width = max(width, int(height * w / h))
    check_pixels((w, h), (width, height), size)
    return image.resize((width, height), INTERPOLATIONS[interpolation])


def reflect_slices(start: int, side: int, n: int) -> Iterator[tuple[slice, slice]]:
    """(target, source) slices that fill `side` lines, from line `start` on, from n lines reflected at both ends."""
    before, after = max(-start, 0), max(start + side - n, 0)
    yield slice(before, side - after), slice(start + before, start + side - after)
    if before:
        yield slice(before), slice(before, 0, -1)
    if after:
        yield slice(side - after, side), slice(n - 2, n - 2 - after if n - 2 - after >= 0 else None, -1)


def crop_window(pixels: np.ndarray, size: tuple[int, int], u: np.ndarray, padding: int = 4, out=None) -> np.ndarray:
    """Window (H, W, C) at u (2,) in [0, 1) of pixels (h, w, C), which are reflected by `padding` at each edge.

    Equals RandomCrop(size, padding=4, padding_mode="reflect") without the padded copy. `out`: array for the result.
    """
    (h, w, c), (height, width) = pixels.shape, size
    room = (h - height + 2 * padding + 1, w - width + 2 * padding + 1)
    top, left = (int(draw * n) - padding for n, draw in zip(room, u, strict=True))
    result = np.empty((height, width, c), pixels.dtype) if out is None else out
    columns = [*reflect_slices(left, width, w)]
    for rows, from_rows in reflect_slices(top, height, h):
        for cols, from_cols in columns:
            result[rows, cols] = pixels[from_rows, from_cols]
    return result


class SimpleResizedCrop:
    """Bands of an image -> uint8 (H, W, C). The caller flips with probability 0.5 (paper, section 3.3).

    Bands are PIL images: one RGB image, or a grey image per channel. The result (h, w, C) of `resize`, which is
    deterministic, can be stored and passed instead of the bands.
    """

    def __init__(self, size: tuple[int, int], interpolation: str = "bilinear"):
        if min(size) <= 4:
            raise ValueError(f"a crop of {size[0]} x {size[1]} is too small: sides must exceed the 4 reflected pixels")
        self.size, self.interpolation = size, interpolation

    def resize(self, bands: Sequence[Image.Image]) -> np.ndarray:
        return np.dstack([np.asarray(resize_to_cover(band, self.size, self.interpolation)) for band in bands])

    def __call__(self, image: Sequence[Image.Image] | np.ndarray, rng: np.random.Generator, out=None) -> np.ndarray:
        resized = image if isinstance(image, np.ndarray) else self.resize(image)
        return crop_window(resized, self.size, rng.random(2), out=out)
