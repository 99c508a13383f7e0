"""The one style of all figures, and how they reach the disk."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from earthprior.files import replacing

NETWORK, LINEAR, MEAN = "#1f5fa8", "#c8791b", "#8a8f98"
"""One colour per denoiser, the same in every figure: blue is learned, orange is the linear filter, grey is trivial."""

REAL, SAMPLED = "#4d5560", NETWORK
"""Real chips are neutral, what the network made has the network's colour."""

INK, QUIET, GRID = "#22262b", "#5d646d", "#e3e6ea"

_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.6,
    "text.color": INK,
}

DPI = 120


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style while a figure is built; it is restored after, so that a caller's own plots keep theirs."""
    with matplotlib.rc_context(_RC):  # type: ignore[arg-type]
        yield


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure on an Agg canvas, white, with constrained layout.

    Args:
        width_in: Width, inches.
        height_in: Height, inches.
    """
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def axes_grid(figure: Figure, rows: int, columns: int, **options: Any) -> list[list[Axes]]:
    """A grid of axes, always as a list of rows."""
    return [list(row) for row in figure.subplots(rows, columns, squeeze=False, **options)]


def image_grid(
    rows: int, columns: int, cell_in: float, left_in: float, heads_in: Sequence[float], foot_in: float
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of square cells at exact places, for images side by side.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        cell_in: Width and height of a cell, inches.
        left_in: Room for the rows' labels, inches.
        heads_in: Room above each row (rows,), inches.
        foot_in: Room for the caption, inches.
    """
    gap_in = 0.03
    width = left_in + columns * (cell_in + gap_in)
    height = sum(heads_in) + rows * (cell_in + gap_in) + foot_in
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    grid, top = [], height
    for head in heads_in:
        top -= head + cell_in + gap_in
        lefts = [left_in + column * (cell_in + gap_in) for column in range(columns)]
        grid.append([figure.add_axes((x / width, top / height, cell_in / width, cell_in / height)) for x in lefts])
    return figure, grid


def legend_above(axes: Axes) -> None:
    """The legend at the right of the title's line, where no curve can be."""
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 0.985), ncols=2, borderaxespad=0, handlelength=1.4, columnspacing=1
    )


def plain(text: str) -> str:
    """Text from data (names of bands, of chips) as it is: two dollars in it would start a formula."""
    return text.replace("$", r"\$")


def file_title(path: str) -> str:
    """The file's name without folder and extension."""
    return path.rsplit("/", 1)[-1].removesuffix(".tif")


def short(text: str, width: int = 26) -> str:
    """Of a long text the end: names of files differ there."""
    return text if len(text) <= width else f"...{text[3 - width :]}"


def caption(figure: Figure, text: str) -> None:
    """Quiet lines of text at the lower left, as wide as the figure."""
    characters = int(figure.get_figwidth() * 72 / 4.1)
    if figure.get_layout_engine() is None:
        y = 0.05 / figure.get_figheight()
        figure.text(0.05 / figure.get_figwidth(), y, textwrap.fill(text, characters), fontsize=7.5, color=QUIET)
    else:
        figure.supxlabel(textwrap.fill(text, characters), x=0.006, ha="left", fontsize=7.5, color=QUIET)


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as PNG: complete or not at all, and the same bytes for the same content."""
    with styled(), replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=figure.dpi, metadata={"Software": None})
