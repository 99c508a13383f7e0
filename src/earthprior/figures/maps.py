"""Maps beside labels and imagery: what was to be found, what was found, and where the two differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from earthprior.figures.imagery import Stretch, show, views
from earthprior.figures.style import QUIET, caption, file_title, image_grid, plain, short, styled
from earthprior.palette import ABSENT, PRESENT, Colour, class_colours

Array: TypeAlias = NDArray[Any]

MAX_PANELS = 8

FALSE_ALARM, MISSED, WRONG = (213, 94, 0), (0, 114, 178), (40, 40, 40)
"""Of two classes: found where there is none, and there but not found; of more: any other class than the label's."""

PROBABILITY = "magma"

_COLUMN_IN, _LEFT_IN, _HEAD_IN, _LINE_IN, _CAPTION_IN = 1.55, 0.24, 0.2, 0.17, 0.38


@dataclass(frozen=True)
class MapPanel:
    """One chip with its maps.

    Attributes:
        title: The chip's name, as plain text.
        chip: (C, H, W), physical values, any dtype.
        valid: (H, W), true where there is data.
        label: (H, W) numbers of classes, -1 where there is no label; None for a chip without labels.
        probabilities: (K, H, W) in [0, 1], of the classes in their order.
    """

    title: str
    chip: Array
    valid: Array
    label: Array | None
    probabilities: Array


def maps_figure(panels: Sequence[MapPanel], classes: Sequence[str | int], bands: Sequence[str]) -> Figure:
    """A row for each chip: imagery, label, map, of two classes the probability of the second, and the errors.

    Args:
        panels: At most 8 are shown.
        classes: Their names, in the order of the numbers.
        bands: Names in band order.
    """
    stretch = Stretch.of([panel.chip for panel in panels], [panel.valid for panel in panels])
    panels = panels[:MAX_PANELS]
    imagery = views(bands)
    labelled = any(panel.label is not None for panel in panels)
    binary = len(classes) == 2
    heads = [*imagery, *["label"] * labelled, "map"]
    heads += [f"probability of {classes[1]}"] * binary + ["errors"] * labelled
    colours = class_colours(classes)
    legends = [_class_legend(classes, colours), *[_error_legend(binary)] * labelled]
    per_line = [_per_line(legend, len(heads) * _COLUMN_IN) for legend in legends]
    lines = [-(-len(legend) // count) for legend, count in zip(legends, per_line, strict=True)]
    foot_in = _CAPTION_IN + _LINE_IN * sum(lines)
    with styled():
        heads_in = [_HEAD_IN, *[0.0] * (len(panels) - 1)]
        figure, grid = image_grid(len(panels), len(heads), _COLUMN_IN, _LEFT_IN, heads_in, foot_in + 0.06)
        for row, panel in zip(grid, panels, strict=True):
            cells = iter(row)
            for view in imagery.values():
                show(next(cells), stretch.rgba(panel.chip, panel.valid, view))
            _show_maps(panel, cells, colours, labelled, binary)
            _name(row[0], panel.title)
        for axes, head in zip(grid[0], heads, strict=True):
            axes.set_title(plain(short(head)), fontsize=7, color=QUIET, weight="normal", pad=3)
        for legend, count, used in zip(legends, per_line, lines, strict=True):
            _legend(figure, legend, count, foot_in)
            foot_in -= _LINE_IN * used
        caption(figure, _caption(panels, binary, labelled))
    return figure


def _show_maps(panel: MapPanel, cells: Any, colours: Sequence[Colour], labelled: bool, binary: bool) -> None:
    found = panel.probabilities.argmax(axis=0)
    if labelled:
        axes = next(cells)
        if panel.label is None:
            _say(axes, "no label")
        else:
            show(axes, _painted(panel.label, colours, panel.valid & (panel.label >= 0)))
    show(next(cells), _painted(found, colours, panel.valid))
    if binary:
        share = np.ma.masked_where(~panel.valid, panel.probabilities[1])
        show(next(cells), share, cmap=PROBABILITY, vmin=0, vmax=1)
    if labelled:
        axes = next(cells)
        if panel.label is None:
            axes.set_axis_off()
        else:
            show(axes, _errors(found, panel.label, panel.valid & (panel.label >= 0), binary))


def _painted(numbers: Array, colours: Sequence[Colour], shown: Array) -> Array:
    """RGBA (H, W, 4) in [0, 1], transparent where it is not shown."""
    table = np.array(colours, np.float64) / 255
    rgb = table[np.where(shown, numbers, 0)]
    return np.concatenate([rgb, shown[..., None].astype(np.float64)], axis=-1)


def _errors(found: Array, label: Array, shown: Array, binary: bool) -> Array:
    if not binary:
        return _painted((found != label).astype(int), [ABSENT, WRONG], shown)
    kinds = np.where(found == 1, np.where(label == 1, 1, 2), np.where(label == 1, 3, 0))
    return _painted(kinds, [ABSENT, PRESENT, FALSE_ALARM, MISSED], shown)


def _class_legend(classes: Sequence[str | int], colours: Sequence[Colour]) -> list[tuple[str, Colour]]:
    return [(str(name), colour) for name, colour in zip(classes, colours, strict=True)]


def _error_legend(binary: bool) -> list[tuple[str, Colour]]:
    if binary:
        return [("errors: found", PRESENT), ("false alarm", FALSE_ALARM), ("missed", MISSED)]
    return [("errors: right", ABSENT), ("wrong", WRONG)]


def _per_line(legend: Sequence[tuple[str, Colour]], width_in: float) -> int:
    """How many of its entries fit beside one another."""
    return max(1, int(width_in / (0.38 + 0.058 * max(len(name) for name, _ in legend))))


def _legend(figure: Figure, legend: Sequence[tuple[str, Colour]], per_line: int, top_in: float) -> None:
    handles = [
        Patch(facecolor="#{:02x}{:02x}{:02x}".format(*colour), edgecolor=QUIET, linewidth=0.4, label=plain(name))
        for name, colour in legend
    ]
    place = (_LEFT_IN / figure.get_figwidth(), top_in / figure.get_figheight())
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=place, ncols=per_line, fontsize=7, borderaxespad=0,
        borderpad=0, handlelength=1.1, handleheight=1.0, columnspacing=1.2, labelcolor=QUIET,
    )  # fmt: skip


def _name(axes: Axes, title: str) -> None:
    axes.text(
        -0.03, 0.5, plain(short(file_title(title))), transform=axes.transAxes,
        rotation=90, ha="right", va="center", fontsize=6.5, color=QUIET,
    )  # fmt: skip


def _say(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=7, color=QUIET)


def _caption(panels: Sequence[MapPanel], binary: bool, labelled: bool) -> str:
    text = "Imagery under one stretch, 2nd to 98th percentile per band. The map shows the most probable class"
    text += ", the second where it is above one half; its probability from 0 (black) to 1 (light)." if binary else "."
    gaps = any(not panel.valid.all() for panel in panels)
    bare = labelled and any(panel.label is not None and (panel.label < 0).any() for panel in panels)
    missing = " and ".join(["no data"] * gaps + ["no label"] * bare)
    return text + (f" Hatched: {missing}." if missing else "")
