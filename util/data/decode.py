"""Decoding: one image file, recognised by its content -> upright bands of 8-bit pixels."""

import os
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from util.data.arrays import GEOTIFF, TIFF, read_foreign, read_values
from util.data.pixels import PixelOptions, RawImage, to_bands

Image.MAX_IMAGE_PIXELS = None  # Pillow warns at half of its limit; PixelOptions.max_pixels is checked instead
# for some others Pillow runs Ghostscript
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".npy",
    ".jp2", ".j2k", ".avif", ".heic", ".heif", ".dcm", ".dicom",
)  # fmt: skip
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"GIF8", b"RIFF", b"\x93NUMPY", *TIFF)


def has_image_content(path: bytes) -> bool:
    """Whether a file without extension, or with one of digits as DICOM's identifiers, begins as an image does."""
    extension = os.path.splitext(path)[1][1:]
    if (extension and not extension.isdigit()) or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        head = file.read(132)
    return head.startswith(SIGNATURES) or head[128:] == b"DICM" or head[4:12] in (b"ftypheic", b"ftypavif")


def flatten(image: Image.Image, in_chans: int, drop_alpha: bool) -> Image.Image:
    """RGB or grey image. Alpha is blended over white or dropped."""
    # Converted only if necessary: copies would add a tenth to the time of decoding.
    if image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA" and not drop_alpha:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if in_chans == 1 and image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # Pillow has no conversion from LAB to grey
    mode = "L" if in_chans == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def colour_values(image: Image.Image, alpha: str) -> RawImage:
    """Channels of an 8-bit image."""
    if image.mode in ("PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    pixels = np.atleast_3d(np.asarray(image))
    return RawImage(pixels, image.mode.startswith("RGB"), alpha if image.mode.endswith("A") else "")


def read_image(path: bytes | BytesIO, options: PixelOptions) -> list[Any]:
    """[RGB] or [grey] image, upright (EXIF), or a grey image for each of another number of channels.

    With options.raw the `RawImage` values, or [] for an 8-bit image. Errors name what the image has and the flag that helps.
    """
    file = path if isinstance(path, BytesIO) else os.fsdecode(path)
    image: Any
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        image = read_foreign(file, options, error)
    if isinstance(image, RawImage):
        return [image] if options.raw else to_bands(image, options)
    with image:
        options.check_size((image.height, image.width))
        if image.format == "TIFF":
            image.filename = ""  # else Pillow maps the file and forgets to transpose
        stored = read_values(image, file, options)
        tags = getattr(image, "tag_v2", {})
        if not stored and (not options.raw or tags):
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            alpha = "alpha" if not tags else "band" if any(tag in tags for tag in GEOTIFF) else "tiff"
            in_doubt = alpha == "band" and options.alpha == "auto" and image.mode == "RGBA"
            if options.keeps_colours and not (options.raw or in_doubt):
                return [flatten(image, options.in_chans, options.alpha == "drop")]
            stored = colour_values(image, alpha)
    if options.raw:
        return [stored] if stored else []
    assert stored
    return to_bands(stored, options)
