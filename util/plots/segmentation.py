"""Image grids of a segmentation: image, mask, prediction, with a legend of the classes."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from util.plots.grids import draw_columns

IGNORED = (128, 128, 128)


def class_colours(count: int) -> np.ndarray:
    """(count + 1, 3) uint8, distinct; the last one, index -1, is that of ignored pixels."""
    hues = [colorsys.hsv_to_rgb(i * 0.618 % 1, (1.0, 0.6)[i % 2], (0.95, 0.6, 0.8)[i % 3]) for i in range(count)]
    return np.array([*(np.array(hues) * 255).round().astype(np.uint8), IGNORED], np.uint8)


def draw_legend(entries: dict[str, np.ndarray], width: int, size: int = 20) -> np.ndarray:
    """(h, width, 3) uint8: a coloured square and the name of each entry, as many in a line as fit."""
    font, places, x, y = ImageFont.load_default(size=size), [], size // 2, size // 2
    for name in entries:
        length = round(font.getlength(name)) + 3 * size
        if x > size and x + length > width:
            x, y = size // 2, y + round(1.6 * size)
        places.append((x, y))
        x += length
    canvas = Image.new("RGB", (width, y + 2 * size), "white")
    pen = ImageDraw.Draw(canvas)
    for (x, y), (name, colour) in zip(places, entries.items(), strict=True):
        pen.rectangle((x, y, x + size, y + size), fill=tuple(map(int, colour)), outline="black")
        pen.text((x + 1.4 * size, y + size / 2), name, fill="black", font=font, anchor="lm")
    return np.asarray(canvas)


def draw_segmentation(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], predictions: Sequence[np.ndarray], rows: Sequence[str],
    classes: Sequence[str], side: int = 256,
) -> np.ndarray:  # fmt: skip
    """Grid (H', W', 3) uint8, a row per image: image (h, w, C) uint8, mask and prediction (h, w), -1 = ignored, and a legend.

    `rows`: label of each image. The legend has the classes that occur.
    """
    colours = class_colours(len(classes))

    def column(pictures: Sequence[np.ndarray], resample: Image.Resampling) -> np.ndarray:
        padded = (ImageOps.pad(Image.fromarray(x), (side, side), resample, color="white") for x in pictures)
        return np.stack([*map(np.asarray, padded)])

    shown = [image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2) for image in images]
    columns = {"image": column(shown, Image.Resampling.BICUBIC)}
    for label, maps in (("mask", masks), ("prediction", predictions)):
        columns[label] = column([colours[x] for x in maps], Image.Resampling.NEAREST)
    found = sorted({int(k) for x in (*masks, *predictions) for k in np.unique(x)} - {-1})
    names = {f"{k} {classes[k]}" if classes[k] != str(k) else classes[k]: colours[k] for k in found}
    grid = draw_columns(columns, rows)
    return np.concatenate([grid, draw_legend(names | {"ignored": colours[-1]}, grid.shape[1])])
