"""Line charts by matplotlib."""

from collections.abc import Mapping, Sequence
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


def draw_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    x_label: str,
    *,
    log: bool = False,
    floor: float = 0.0,
    mark: tuple[float, str] | None = None,
) -> np.ndarray:
    """Line chart (600, 760, 3) uint8 of name -> (x, y); the title describes y.

    `log`: logarithmic y axis; values below `floor` are drawn at it. `mark`: (x, label) of a vertical line.
    """
    from matplotlib import rc_context  # 0.5 s, so only where charts are drawn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 6), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
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
        axes.legend(loc="best")
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
