"""Line charts."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, told apart with any colour vision; each with a dash of its own (lengths on and off, in pixels)
STYLES = (
    ((0, 114, 178), ()), ((213, 94, 0), (14, 6)), ((0, 158, 115), (3, 5)), ((0, 0, 0), (14, 5, 3, 5)),
    ((204, 121, 167), ()), ((230, 159, 0), (14, 6)), ((86, 180, 233), (3, 5)),
)  # fmt: skip


GREY, FAINT = (90, 90, 90), (222, 222, 222)


FINE = 3  # charts are drawn this many times larger and reduced: smooth lines


def side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (H, W, 3) of one height in one."""
    return np.concatenate(pictures, axis=1)


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers that span what is between them."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (5, 2, 1) if (high - low) / (step * factor) >= 3)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Axis:
    """Numbers -> pixels between two ends, linear or logarithmic."""

    def __init__(self, values: Sequence[float], first: float, last: float, log: bool = False, margin: float = 0.0):
        self.log, self.first, self.last = log, first, last
        self.low, self.high = self.scaled(min(values)), self.scaled(max(values))
        if log:
            self.low, self.high = float(math.floor(self.low)), float(math.ceil(self.high))
        if self.low == self.high:
            self.low, self.high = self.low - 1, self.high + 1
        margin *= self.high - self.low
        self.low, self.high = self.low - margin, self.high + margin

    def scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        share = (self.scaled(value) - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)

    def ticks(self) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high)
        step = math.ceil((self.high - self.low) / 9)
        return [10.0**k for k in range(int(self.low), int(self.high) + 1, step)]


def dashed(points: Sequence[tuple[float, float]], pattern: Sequence[float]) -> list[list[tuple[float, float]]]:
    """The visible pieces of a line through points; an empty pattern is a solid one."""
    if not pattern:
        return [list(points)]
    pieces, piece, lengths, on = [], [points[0]], cycle(pattern), True
    left = next(lengths)
    for (x0, y0), (x1, y1) in pairwise(points):
        length, at = math.hypot(x1 - x0, y1 - y0), 0.0
        while length - at > left:
            at += left
            piece.append((x0 + (x1 - x0) * at / length, y0 + (y1 - y0) * at / length))
            pieces += [piece] if on else []
            piece, on, left = [piece[-1]], not on, next(lengths)
        left -= length - at
        piece.append((x1, y1))
    return pieces + ([piece] if on else [])


class Chart:
    """Coordinates of the picture as it will be, drawn `FINE` times as large."""

    def __init__(self, width: int, height: int, size: int):
        self.image = Image.new("RGB", (width * FINE, height * FINE), "white")
        self.pen, self.size = ImageDraw.Draw(self.image), size
        self.font = ImageFont.load_default(size=size * FINE)
        self.small = ImageFont.load_default(size=round(0.7 * size * FINE))

    def text(self, x: float, y: float, text: str, anchor: str, fill="black", font=None) -> None:
        self.pen.text((x * FINE, y * FINE), text, fill=fill, font=font or self.font, anchor=anchor)

    def length(self, text: str) -> float:
        return self.font.getlength(text) / FINE

    def line(self, points: Sequence[tuple[float, float]], fill, width: float, pattern: Sequence[float] = ()) -> None:
        for piece in dashed(points, pattern):
            scaled = [(x * FINE, y * FINE) for x, y in piece]
            self.pen.line(scaled, fill=fill, width=round(width * FINE), joint="curve")

    def dots(self, points: Sequence[tuple[float, float]], fill, radius: float) -> None:
        for x, y in points:
            self.pen.circle((x * FINE, y * FINE), radius * FINE, fill=fill)

    def number(self, x: float, y: float, value: float, log: bool) -> None:
        """A number right-aligned at x; powers of ten as such."""
        if not log:
            self.text(x, y, f"{value:g}", "rm")
            return
        exponent = str(round(math.log10(value)))
        wide = self.small.getlength(exponent) / FINE
        self.text(x - wide, y, "10", "rm")
        self.text(x, y - 0.4 * self.size, exponent, "rm", font=self.small)

    def finished(self) -> np.ndarray:
        return np.asarray(self.image.reduce(FINE))


def legend(chart: Chart, names: Sequence[str], left: float, top: float, right: float) -> float:
    """Names beside samples of their lines, in rows between left and right; where they end."""
    sample, space, x, middle = 40, 26, left, top
    for name, (colour, pattern) in zip(names, cycle(STYLES), strict=False):
        wide = sample + 8 + chart.length(name)
        if x > left and x + wide > right:
            x, middle = left, middle + 1.3 * chart.size
        chart.line([(x, middle), (x + sample, middle)], colour, 3.5, pattern)
        chart.text(x + sample + 8, middle, name, "lm")
        x += wide + space
    return middle + 0.65 * chart.size


def plot(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    heading: str,
    x_label: str,
    *,
    log: bool = False,
    floor: float = 0.0,
    mark: tuple[float, str] | None = None,
    size: int = 22,
) -> np.ndarray:
    """Line chart (H, W, 3) uint8 of name -> (x, y); `heading` says what y is.

    `log`: decades on the y axis; values below `floor` are drawn there. `mark`: (x, label) of a vertical line.
    """
    width, height = 760, 600
    right, bottom = width - 1.2 * size, height - 3.2 * size
    chart = Chart(width, height, size)
    chart.text(size, 1.2 * size, heading, "lm")
    top = legend(chart, list(lines), size, 2.6 * size, right) + 0.6 * size
    lines = {name: (xs, [max(value, floor) for value in ys]) for name, (xs, ys) in lines.items()}
    every_x, every_y = ([v for pair in lines.values() for v in pair[i]] for i in (0, 1))
    y = Axis(every_y, bottom, top, log, 0 if log else 0.05)
    left = size + max(chart.length("1000" if log else f"{value:g}") for value in y.ticks())
    x = Axis(every_x, left, right)
    for value in y.ticks():
        chart.line([(left, y(value)), (right, y(value))], FAINT, 1.5)
        chart.number(left - 8, y(value), value, log)
    for value in x.ticks():
        chart.line([(x(value), bottom), (x(value), bottom + 6)], GREY, 1.5)
        chart.text(x(value), bottom + 10, f"{value:g}", "mt")
    chart.text((left + right) / 2, height - 0.9 * size, x_label, "mm")
    chart.line([(left, top), (left, bottom), (right, bottom)], GREY, 2)
    if mark:
        chart.line([(x(mark[0]), top), (x(mark[0]), bottom)], GREY, 2, (6, 6))
        chart.text(x(mark[0]) + 8, top + 0.8 * size, mark[1], "lm", GREY)
    paths = [[(x(a), y(b)) for a, b in zip(xs, ys, strict=True)] for xs, ys in lines.values()]
    for path, (colour, pattern) in zip(paths, cycle(STYLES), strict=False):
        chart.line(path, colour, 3.5, pattern)
        if len(path) <= 12:  # each is a measurement, one alone is no line
            chart.dots(path, colour, 5)
    return chart.finished()
