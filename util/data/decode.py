"""Decoding: one image file -> upright bands of 8-bit pixels."""

import os
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

Image.MAX_IMAGE_PIXELS = None  # Pillow warns at half of its limit; MAX_PIXELS is checked instead
MAX_PIXELS = 2**28  # of an image; a file of a few bytes may claim more
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # for some others Pillow runs Ghostscript
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".npy")


def read_image(path: bytes | BytesIO, in_chans: int) -> list[Image.Image]:
    """[RGB] or [grey] image, upright (EXIF), alpha blended over white; of a (H, W, C) uint8 .npy its C grey bands."""
    file = path if isinstance(path, BytesIO) else os.fsdecode(path)
    if file.getvalue().startswith(b"\x93NUMPY") if isinstance(file, BytesIO) else file.lower().endswith(".npy"):
        pixels = np.atleast_3d(np.load(file))
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != in_chans:
            raise ValueError(f"holds {pixels.dtype} {pixels.shape}, not uint8 (height, width, {in_chans})")
        return [Image.fromarray(band) for band in pixels.transpose(2, 0, 1)]
    if in_chans not in (1, 3):
        raise ValueError(f"--in_chans {in_chans} needs .npy files of that many channels")
    image: Image.Image
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        image.load()
        # In place, and converted only if necessary: copies would add a tenth to the time of decoding.
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            pixels = np.asarray(image)
            if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError(f"has pixels of mode {image.mode} outside 16 bits")
            image = Image.fromarray((pixels // 257).astype(np.uint8))
        if image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        mode = "L" if in_chans == 1 else "RGB"
        return [image if image.mode == mode else image.convert(mode)]
