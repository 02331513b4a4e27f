"""Plots: small PNG files, the same bytes from the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[Sequence[float], Sequence[float]]


def new_figure(width: float = 5.2, height: float = 3.0) -> tuple[Figure, Axes]:
    """Return a figure and its axes, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG without the metadata that would differ between versions."""
    figure.savefig(path, metadata={"Software": None})


def line_plot(path: Path, series: Mapping[str, Series], *, x: str, y: str, title: str = "") -> None:
    """Write a line plot of named ``(x values, y values)`` series."""
    from matplotlib.ticker import EngFormatter

    figure, axes = new_figure()
    for name, (xs, ys) in series.items():
        axes.plot(xs, ys, label=name, linewidth=1.4)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel=x, ylabel=y, title=title)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
