"""Labelled grids of images."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def wrapped(label: str, font, width: float) -> list[str]:
    """A label in lines that fit the width, broken between words."""
    lines: list[str] = []
    for word in label.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def draw_columns(
    columns: dict[str, np.ndarray], rows: Sequence[str] = (), gap: int = 8, width: int = 224
) -> np.ndarray:
    """Labelled columns of images (B, H, W, 3) uint8 side by side, small images enlarged to about `width`.

    `rows` are labels left of the images, one for each. Letters are at least a 70th of the whole picture's width.
    """
    zoom = max(1, round(width / next(iter(columns.values())).shape[2]))
    count, height, width, _ = next(iter(columns.values())).shape
    height, width = height * zoom, width * zoom
    size = max(20, len(columns) * width // 70)
    font = ImageFont.load_default(size=size)
    line = round(1.2 * size)
    labels = {label: wrapped(label, font, width - 2 * gap) for label in columns}
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
