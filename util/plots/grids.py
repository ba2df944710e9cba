"""Labelled grids of images."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.files import write_atomic


def save_picture(path: str, pixels: np.ndarray) -> None:
    """Write pixels (H, W, 3) uint8 to a picture file, atomically; its folder is created."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, partial(Image.fromarray(pixels).save, format=Image.registered_extensions()[file.suffix.lower()]))


def to_uint8(pixels: Tensor) -> np.ndarray:
    """(B, C, H, W) in [0, 1] -> (B, H, W, 3) uint8: the first three channels, or the first as grey if C < 3."""
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def enlarge_maps(maps: Tensor, patch: int) -> Tensor:
    """(..., h, w) -> (..., H, W): each value fills its patch."""
    return maps.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def wrap_label(label: str, font, width: float) -> list[str]:
    """Lines of a label that fit the width in pixels, broken between words."""
    lines: list[str] = []
    for word in label.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def draw_columns(columns: dict[str, np.ndarray], rows: Sequence[str] = ()) -> np.ndarray:
    """Grid (H', W', 3) uint8 of label -> column of images (B, H, W, 3) uint8. Small images are enlarged to about 224 px.

    `rows`: labels left of the images, one per image. Letters are at least 1/70 of the grid's width.
    """
    count, height, width, _ = next(iter(columns.values())).shape
    gap, zoom = 8, max(1, round(224 / width))
    height, width = height * zoom, width * zoom
    size = max(20, len(columns) * width // 70)
    font = ImageFont.load_default(size=size)
    line = round(1.2 * size)
    labels = {label: wrap_label(label, font, width - 2 * gap) for label in columns}
    header = max(map(len, labels.values())) * line + gap
    left = gap + (math.ceil(max(map(font.getlength, rows))) + gap if rows else 0)
    canvas = Image.new("RGB", (left + len(columns) * (width + gap), header + count * (height + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for row, label in enumerate(rows):
        pen.text((left - gap, header + row * (height + gap) + height / 2), label, fill="black", font=font, anchor="rm")
    for column, (label, images) in enumerate(columns.items()):
        x = left + column * (width + gap)
        for number, text in enumerate(reversed(labels[label])):
            bottom = header - gap / 2 - (number + 0.5) * line
            pen.text((x + width / 2, bottom), text, fill="black", font=font, anchor="mm")
        for row, image in enumerate(images.repeat(zoom, axis=1).repeat(zoom, axis=2)):
            canvas.paste(Image.fromarray(image), (x, header + row * (height + gap)))
    return np.asarray(canvas)
