"""What features look like: maps in false colours, and the chips that they call alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from earthprior.figures.imagery import Array, Stretch, row_labels, short_title, show, views
from earthprior.figures.style import NETWORK, QUIET, caption, image_grid, plain, styled

_WIDTH_IN, _LEFT_IN, _HEAD_IN, _FOOT_IN = 10.66, 0.36, 0.2, 0.4


@dataclass(frozen=True)
class FeatureMap:
    """A chip, and how networks see it.

    Args:
        title: The chip's, plain text.
        chip: (C, H, W), physical values.
        valid: Mask (H, W), true = data.
        maps: By network, colours (h, w, 3) in [0, 1] over the same ground.
    """

    title: str
    chip: Array
    valid: Array
    maps: Mapping[str, Array]


@dataclass(frozen=True)
class Shown:
    """A chip (C, H, W) in physical values, its mask (H, W), and what stands above it."""

    title: str
    chip: Array
    valid: Array


def feature_maps_figure(maps: Sequence[FeatureMap], bands: Sequence[str], names: Mapping[str, str]) -> Figure:
    """Chips in a row, and below them what each network makes of them, in colours of three components.

    Args:
        maps: The chips; all shown.
        bands: Names in band order.
        names: What the rows are called, by network.
    """
    title, view = next(iter(views(bands).items()))
    stretch = Stretch.of([one.chip for one in maps], [one.valid for one in maps])
    cell_in = min(1.68, (_WIDTH_IN - _LEFT_IN) / max(4, len(maps)) - 0.03)
    with styled():
        figure, grid = image_grid(
            1 + len(names), len(maps), cell_in, _LEFT_IN, [_HEAD_IN] + [0.0] * len(names), _FOOT_IN
        )
        for column, one in enumerate(maps):
            height, width = one.valid.shape
            show(grid[0][column], stretch.rgba(one.chip, one.valid, view))
            _title(grid[0][column], one.title, cell_in)
            for row, name in enumerate(names, 1):
                colours = one.maps[name]
                rows = np.arange(len(colours)) * height // len(colours)
                columns = np.arange(colours.shape[1]) * width // colours.shape[1]
                opaque = one.valid[np.ix_(rows, columns)]
                show(grid[row][column], np.dstack([colours, opaque]), extent=(0, width, height, 0))
        row_labels(grid, [title, *names.values()])
        caption(
            figure,
            "Below each chip the three main components of the features as red, green and blue, each from the 2nd to "
            "the 98th percentile. A row shares one decomposition, so equal colours in it mean equal features; between "
            "rows colours do not compare.",
        )
    return figure


def neighbours_figure(rows: Sequence[Sequence[Shown]], bands: Sequence[str], note: str) -> Figure:
    """Per row a chip, framed, and the chips nearest to it.

    Args:
        rows: The asked chip first; all of one length but where chips are too few.
        bands: Names in band order.
        note: For the caption.
    """
    title, view = next(iter(views(bands).items()))
    every = [one for row in rows for one in row]
    stretch = Stretch.of([one.chip for one in every], [one.valid for one in every])
    columns = max(len(row) for row in rows)
    cell_in = min(1.6, (_WIDTH_IN - _LEFT_IN) / columns - 0.03)
    with styled():
        figure, grid = image_grid(len(rows), columns, cell_in, 0.12, [_HEAD_IN] * len(rows), _FOOT_IN)
        for cells, row in zip(grid, rows, strict=True):
            for place, axes in enumerate(cells):
                if place >= len(row):
                    axes.set_axis_off()
                    continue
                show(axes, stretch.rgba(row[place].chip, row[place].valid, view))
                _title(axes, row[place].title, cell_in)
                if place == 0:
                    for spine in axes.spines.values():
                        spine.set(visible=True, color=NETWORK, linewidth=2.5)
        caption(figure, f"Shown: {title}, all under one stretch. {note}")
    return figure


def _title(axes: object, title: str, cell_in: float) -> None:
    axes.set_title(  # type: ignore[attr-defined]
        plain(short_title(title, int(cell_in * 72 / 3.7))), fontsize=6.5, color=QUIET, weight="normal", pad=2
    )
