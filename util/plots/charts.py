"""Charts by matplotlib: lines, and points in rows."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

# Okabe and Ito's colours, which people with any colour vision can distinguish; each line also has its own dash
COLORS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":", "-.", "-", "--", ":")
STYLE: Any = {
    "font.size": 15, "lines.linewidth": 2.5, "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#dedede",
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "axes.titlesize": "medium", "legend.fontsize": "small",
}  # fmt: skip


@contextmanager
def new_figure(width: float, height: float) -> Iterator[tuple[Any, list[np.ndarray]]]:
    """(figure of this size in inches, list to which its pixels (H, W, 3) uint8 are added at the end of the block)."""
    from matplotlib import rc_context  # 0.5 s, so only where charts are drawn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pixels: list[np.ndarray] = []
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        yield figure, pixels
        canvas.draw()
        pixels.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def draw_points(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> np.ndarray:
    """Chart (H, W, 3) uint8 of title -> name -> values: a panel for each title, four abreast, in it a row of points for each name.

    A line marks the mean of each row; the rows are those of the first panel.
    """
    names = [*next(iter(panels.values()))]
    lines, abreast = math.ceil(len(panels) / 4), min(len(panels), 4)
    with new_figure(0.1 * max(map(len, names)) + 3.6 * abreast, lines * (1 + 0.45 * len(names))) as (figure, pixels):
        subplots = [*figure.subplots(lines, abreast, sharey=True, squeeze=False).flat]
        for unused in subplots[len(panels) :]:
            unused.remove()
        for axes, (title, rows) in zip(subplots, panels.items(), strict=False):
            for y, name in enumerate(names):
                if values := rows.get(name):
                    color = COLORS[y % len(COLORS)]
                    axes.plot(values, [y] * len(values), "o", color=color, markersize=8, alpha=0.6)
                    axes.plot(np.mean(values), y, "|", color=color, markersize=24, markeredgewidth=3)
            axes.set_yticks(range(len(names)), names, fontsize="small")
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_title(title, fontsize="small")
            axes.tick_params(axis="x", labelsize="small")
            axes.margins(x=0.1)
    return pixels[0]


def draw_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, x_label: str, *, log: bool = False,
    floor: float = 0.0, mark: tuple[float, str] | None = None,
) -> np.ndarray:  # fmt: skip
    """Line chart (600 or more, 760, 3) uint8 of name -> (x, y); the title describes y.

    `log`: logarithmic y axis; values below `floor` are drawn at it. `mark`: (x, label) of a vertical line.
    """
    many = len(lines) > 4  # their legend would cover them
    with new_figure(7.6, 6 + 0.3 * many * len(lines)) as (figure, pixels):
        axes = figure.subplots()
        axes.set_prop_cycle(color=COLORS, linestyle=DASHES)
        for name, (xs, ys) in lines.items():
            marker = "o" if len(xs) <= 12 else None  # single measurements; one alone makes no line
            axes.plot(xs, np.maximum(ys, floor) if log else ys, label=name, marker=marker)
        if log:
            axes.set_yscale("log")
        if mark:
            axes.axvline(mark[0], color="#5a5a5a", linestyle=":", linewidth=1.5, label=mark[1])
        axes.set_title(title)
        axes.set_xlabel(x_label)
        if many:
            figure.legend(loc="outside lower left")
        else:
            axes.legend(loc="best")
    return pixels[0]
