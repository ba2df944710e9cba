"""Pixels: the values of an image as stored -> bands of 8-bit pixels, as --bands, --value_range and --alpha say."""

import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

MAX_PIXELS = 2**28  # of an image; a file of a few bytes may claim more


@dataclass(frozen=True)
class PixelOptions:
    """What is read of an image, and how its values become 8-bit pixels."""

    in_chans: int
    bands: tuple[int, ...] = ()  # 1 = first; () = all
    # ("auto",), ("full",), (low, high, ... per channel), ("percentile", p, q),
    # or the decision of `resolve_pixels` for images that are not 8-bit: ("auto", "int" or "float", low, high, ...)
    value_range: tuple = ("auto",)
    alpha: str = "auto"
    raw: bool = False  # return the values as stored, and nothing for 8-bit images: for `resolve_pixels`
    max_pixels: int = MAX_PIXELS

    @classmethod
    def from_args(cls, args: Namespace) -> "PixelOptions":
        """Options of these arguments; ValueError if --bands or --value_range does not fit --in_chans."""
        given = vars(args)
        bands, value_range = tuple(given.get("bands") or ()), tuple(given.get("value_range") or ("auto",))
        options = cls(args.in_chans, bands, value_range, given.get("alpha") or "auto")
        if bands and len(bands) != args.in_chans and (len(bands), args.in_chans) != (1, 3):
            words = " ".join(map(str, bands))
            counts = f"{len(bands)} bands for --in_chans {args.in_chans}"
            raise ValueError(f"--bands {words}: {counts}; name one per channel")
        if value_range[0] not in ("auto", "full", "percentile") and len(value_range) not in (2, 2 * args.in_chans):
            count = f"{len(value_range)} numbers for --in_chans {args.in_chans}"
            raise ValueError(f"--value_range: {count}; give LOW HIGH for all channels, or one such pair per channel")
        return options

    @property
    def keeps_colours(self) -> bool:
        """Whether an 8-bit image that has its alpha blended or dropped is used as it is."""
        whole = not self.bands and self.in_chans in (1, 3) and self.alpha != "channel"
        return whole and self.value_range[0] in ("auto", "full")

    def check_size(self, shape: tuple[int, ...], itemsize: int = 4) -> None:
        """ValueError for more pixels than allowed, before they are allocated."""
        if math.prod(map(int, shape)) * itemsize > 4 * self.max_pixels:
            size = " x ".join(map(str, shape))
            raise ValueError(
                f"has {size} pixels or values, more than {4 * self.max_pixels // itemsize}; `python -m util.cache build "
                "--tile N` cuts large images"
            )


@dataclass
class RawImage:
    """Values of an image file, upright, and what the file says of them."""

    values: np.ndarray  # (H, W, C) of any type of number
    colour: bool = False  # red, green, blue
    # what the last channel is: "alpha"; "tiff", the same as a TIFF says; "band" = maybe alpha; "" = a band
    alpha: str = ""
    declared: tuple[float, float] | None = None  # smallest and largest possible value
    inverted: bool = False  # the smallest value is white

    def __post_init__(self) -> None:
        if self.values.dtype.kind not in "buif":
            raise ValueError(f"holds {self.values.dtype}, not numbers")

    @property
    def is_8bit(self) -> bool:
        return self.values.dtype in (np.uint8, np.bool_)


def range_of_type(dtype: np.dtype) -> tuple[float, float]:
    """Value range of a type: that of its bits for integers, 0 to 1 for floats."""
    return (0, 1) if dtype.kind in "bf" else (np.iinfo(dtype).min, np.iinfo(dtype).max)


def value_limits(raw_image: RawImage, values: np.ndarray, value_range: tuple) -> tuple[Any, Any]:
    """(low, high), each a number or one per channel, of the values that become 0 and 255."""
    mode, numbers = value_range[0], value_range
    if mode == "full" or (mode == "auto" and raw_image.is_8bit):
        return range_of_type(values.dtype)
    if mode == "percentile":
        return tuple(np.nanpercentile(values.astype(np.float64), value_range[1:], axis=(0, 1)))
    if mode == "auto":
        kind = "float" if values.dtype.kind == "f" else "int"
        if value_range[1:2] != (kind,):
            what = f"was chosen for other images ({' '.join(map(str, value_range[1:]))})"
            why = what if value_range[1:] else "was chosen without such an image"
            raise ValueError(f"holds {values.dtype} values, for which --value_range auto {why}; give full or LOW HIGH")
        numbers = value_range[2:]
    return np.array(numbers[::2], np.float64), np.array(numbers[1::2], np.float64)


def scale(values: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """Values from low to high -> 0 to 255, rounded and clipped; NaN becomes 0."""
    if values.dtype == np.uint8 and np.all(low == 0) and np.all(high == 255):
        return values
    kind = np.float32 if values.dtype.itemsize <= 2 else np.float64
    span = np.maximum(np.subtract(high, low, dtype=np.float64), 1e-30)
    scaled = (values.astype(kind) - np.asarray(low, kind)) * np.asarray(255 / span, kind) + kind(0.5)
    return np.nan_to_num(np.clip(scaled, 0, 255), nan=0).astype(np.uint8)


def blend(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """8-bit pixels (H, W, C) over white, where alpha (H, W, 1) is 255 for opaque."""
    opaque = alpha.astype(np.uint16)
    return ((pixels * opaque + 255 * (255 - opaque) + 127) // 255).astype(np.uint8)


def choose_channels(raw_image: RawImage, options: PixelOptions) -> tuple[np.ndarray, np.ndarray | None]:
    """(Values (H, W, C) of the channels wanted, alpha (H, W, 1) or None); a grey image gives three equal channels.

    ValueError that names the remedy for another number of channels.
    """
    values, alpha = raw_image.values, None
    use = options.alpha if options.alpha != "auto" else "channel" if raw_image.alpha == "band" else "composite"
    if raw_image.alpha and use != "channel":
        alpha, values = (values[..., -1:] if use == "composite" else None), values[..., :-1]
    count, wanted = values.shape[2], options.in_chans
    if options.bands:
        words = " ".join(map(str, options.bands))
        if max(options.bands) > count:
            raise ValueError(f"has {count} bands, not all of --bands {words} (1 = first)")
        values = values[..., [band - 1 for band in options.bands]]
    if values.shape[2] == 1 and wanted == 3:
        values = np.repeat(values, 3, axis=2)
    luminance = raw_image.colour and not options.bands and (values.shape[2], wanted) == (3, 1)
    if values.shape[2] != wanted and not luminance:
        some = " ".join(map(str, range(1, wanted + 1)))
        more = " or --alpha drop or composite" if raw_image.alpha and use == "channel" else ""
        more = " or --alpha channel" if raw_image.alpha and use != "channel" else more
        remedy = f"pick with --bands {some} (1 = first), or use --in_chans {count}{more}"
        raise ValueError(f"has {count} bands or pages, not --in_chans {wanted}; {remedy}")
    return values, alpha


def to_bands(raw_image: RawImage, options: PixelOptions) -> list[Image.Image]:
    """[RGB] or [grey] image, or of another number of channels a grey image each."""
    values, alpha = choose_channels(raw_image, options)
    pixels = scale(values, *value_limits(raw_image, values, options.value_range))
    if raw_image.inverted:
        pixels = 255 - pixels
    if alpha is not None:
        pixels = blend(pixels, scale(alpha, *range_of_type(alpha.dtype)))
    if pixels.shape[2] == 3:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        return [image.convert("L") if options.in_chans == 1 else image]
    return [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(pixels, 2, 0)]
