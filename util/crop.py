"""SimpleResizedCrop, the crop of PixMIM: resize the short side, crop a window at most 4 pixels out of it, flip.

Needs Pillow and NumPy only. The resize is deterministic: only the window and the flip are random.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resize_to_cover(image: Image.Image, size: tuple[int, int], interpolation: str = "bilinear") -> Image.Image:
    """The smallest resize, aspect ratio kept, that covers size (H, W); for a square, torchvision's Resize(side)."""
    height, width = size
    if width * image.height >= height * image.width:  # the width is the tighter side
        height = max(height, int(width * image.height / image.width))
    else:
        width = max(width, int(height * image.width / image.height))
    return image.resize((width, height), INTERPOLATIONS[interpolation])


def window(pixels: np.ndarray, size: tuple[int, int], u: np.ndarray, padding: int = 4) -> np.ndarray:
    """Window (H, W, C) of pixels (h, w, C), reflected `padding` pixels beyond each edge; u (2,) in [0, 1) places it.

    RandomCrop(size, padding=4, padding_mode="reflect") without the padded copy.
    """
    for axis, (side, draw) in enumerate(zip(size, u, strict=True)):
        n = pixels.shape[axis]
        start = int(draw * (n + 2 * padding - side + 1)) - padding
        index = np.abs(np.arange(start, start + side))
        pixels = pixels.take(n - 1 - np.abs(n - 1 - index), axis=axis)
    return pixels


class SimpleResizedCrop:
    """Bands of PIL images -> uint8 (H, W, C), to be flipped with probability 0.5 on the device (paper, section 3.3).

    An RGB image is one band; an image of any other number of channels is a list of grey ones.
    """

    def __init__(self, size: tuple[int, int], interpolation: str = "bilinear"):
        self.size, self.interpolation = size, interpolation

    def __call__(self, bands: Sequence[Image.Image], rng: np.random.Generator) -> np.ndarray:
        resized = np.dstack([np.asarray(resize_to_cover(band, self.size, self.interpolation)) for band in bands])
        return window(resized, self.size, rng.random(2))
