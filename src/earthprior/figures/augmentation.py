"""What augmentation does: chips as they are, beside each change by itself and all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from earthprior.figures.imagery import Array, Stretch, row_labels, show, views
from earthprior.figures.style import INK, QUIET, caption, image_grid, plain, styled

_CELL_IN = 1.2
_LINES = 3
_NAME = 21


@dataclass(frozen=True)
class Column:
    """One way of changing the chips.

    Args:
        title: Its name, plain text.
        detail: Its setting, plain text, at most two lines.
        active: Whether training does it; else the heading is grey.
        chips: One view per row, arrays (C, H, W) in physical units.
        valids: Their masks (H, W).
        notes: What stands in each picture's corner, plain text; may be empty.
    """

    title: str
    detail: str
    active: bool
    chips: Sequence[Array]
    valids: Sequence[Array]
    notes: Sequence[str]


def augmentation_figure(
    columns: Sequence[Column], titles: Sequence[str], stretches: Sequence[Stretch], bands: Sequence[str]
) -> Figure:
    """Rows of chips, each under one stretch.

    Args:
        columns: The chips as they are, then changed.
        titles: One per row, plain text.
        stretches: One per row, of the whole chip.
        bands: Names in band order.
    """
    shown, view = next(iter(views(bands).items()))
    with styled():
        heads_in = [0.14 * _LINES + 0.03] + [0.0] * (len(titles) - 1)
        figure, grid = image_grid(len(titles), len(columns), _CELL_IN, 0.26, heads_in, 0.3)
        for row, (cells, stretch) in enumerate(zip(grid, stretches, strict=True)):
            for column, axes in zip(columns, cells, strict=True):
                show(axes, stretch.rgba(column.chips[row], column.valids[row], view))
                if column.notes[row]:
                    axes.text(
                        0.96, 0.04, plain(column.notes[row]), transform=axes.transAxes, ha="right", va="bottom",
                        fontsize=6, color="white", bbox={"facecolor": "black", "alpha": 0.55, "pad": 1.2, "lw": 0},
                    )  # fmt: skip
        for column, axes in zip(columns, grid[0], strict=True):
            lines = column.detail.split("\n")
            head = "\n".join([column.title, *lines, *[""] * (_LINES - 1 - len(lines))])
            colour = INK if column.active else QUIET
            axes.set_title(plain(head), fontsize=6.5, color=colour, weight="normal", pad=2, linespacing=1.25)
        # Of a name longer than a picture is high, the end: names differ there.
        row_labels(grid, [title if len(title) <= _NAME else f"...{title[3 - _NAME :]}" for title in titles])
        gaps = any(not valid.all() for column in columns for valid in column.valids)
        caption(
            figure,
            f"Shown: {plain(shown)}, each row under its whole chip's 2nd to 98th percentile stretch. rms: root mean "
            "square change over bands, in normalized units." + (" Hatched: no data." if gaps else ""),
        )
    return figure
