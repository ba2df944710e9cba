"""SimpleResizedCrop, the crop of PixMIM: resize the short side, crop a window at most 4 pixels out of it, flip.

Needs Pillow and NumPy only. The resize is deterministic: only the window and the flip are random.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

MAX_PIXELS = 2**27  # of a resized image: a line of pixels must not become gigabytes
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resize_to_cover(image: Image.Image, size: tuple[int, int], interpolation: str = "bilinear") -> Image.Image:
    """The smallest resize, aspect ratio kept, that covers size (H, W); for a square, torchvision's Resize(side)."""
    height, width = size
    if width * image.height >= height * image.width:  # the width is the tighter side
        height = max(height, int(width * image.height / image.width))
    else:
        width = max(width, int(height * image.width / image.height))
    if height * width > MAX_PIXELS:
        raise ValueError(f"is {image.width} x {image.height} and would be {width} x {height} to cover {size}: too long")
    return image.resize((width, height), INTERPOLATIONS[interpolation])


def reflected(start: int, side: int, n: int) -> Iterator[tuple[slice, slice]]:
    """(where, whence): how `side` lines from `start` on are filled from n lines that are mirrored at their edges."""
    before, after = max(-start, 0), max(start + side - n, 0)
    yield slice(before, side - after), slice(start + before, start + side - after)
    if before:
        yield slice(before), slice(before, 0, -1)
    if after:
        yield slice(side - after, side), slice(n - 2, n - 2 - after if n - 2 - after >= 0 else None, -1)


def window(pixels: np.ndarray, size: tuple[int, int], u: np.ndarray, padding: int = 4, out=None) -> np.ndarray:
    """Window (H, W, C) of pixels (h, w, C), mirrored `padding` pixels beyond each edge; u (2,) in [0, 1) places it.

    RandomCrop(size, padding=4, padding_mode="reflect") without the padded copy. `out` is memory for it.
    """
    starts = [
        int(draw * (n + 2 * padding - side + 1)) - padding for n, side, draw in zip(pixels.shape, size, u, strict=False)
    ]
    result = np.empty((*size, pixels.shape[2]), pixels.dtype) if out is None else out
    columns = [*reflected(starts[1], size[1], pixels.shape[1])]
    for where, whence in reflected(starts[0], size[0], pixels.shape[0]):
        for across, from_across in columns:
            result[where, across] = pixels[whence, from_across]
    return result


class SimpleResizedCrop:
    """Bands of PIL images -> uint8 (H, W, C), to be flipped with probability 0.5 on the device (paper, section 3.3).

    An RGB image is one band; an image of any other number of channels is a list of grey ones. `resize` draws nothing:
    its result (h, w, C) can be kept and given instead of the bands.
    """

    def __init__(self, size: tuple[int, int], interpolation: str = "bilinear"):
        if min(size) <= 4:
            raise ValueError(f"a crop of {size[0]} x {size[1]} is too small to mirror 4 pixels beyond its edges")
        self.size, self.interpolation = size, interpolation

    def resize(self, bands: Sequence[Image.Image]) -> np.ndarray:
        return np.dstack([np.asarray(resize_to_cover(band, self.size, self.interpolation)) for band in bands])

    def __call__(self, image: Sequence[Image.Image] | np.ndarray, rng: np.random.Generator, out=None) -> np.ndarray:
        resized = image if isinstance(image, np.ndarray) else self.resize(image)
        return window(resized, self.size, rng.random(2), out=out)
