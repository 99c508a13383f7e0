"""Chips as pictures: true colour and colour infrared, by the bands' names, under one shared stretch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from earthprior.figures.style import QUIET, caption, file_title, image_grid, plain, short, styled

Array: TypeAlias = NDArray[Any]

ROLES = {"true colour": ("red", "green", "blue"), "colour infrared": ("nir", "red", "green")}
"""Which bands, by name, make red, green and blue of a picture."""

MAX_CHIPS = 24

_FOOT_IN = 0.32


def views(bands: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The pictures that these bands allow: title -> band indices (three for colour, one for grey).

    Names are compared without case. Without any colour view the first band is shown in grey.
    """
    index = {name.lower(): place for place, name in enumerate(bands)}
    found = {
        title: tuple(index[role] for role in roles)
        for title, roles in ROLES.items()
        if all(role in index for role in roles)
    }
    return found or {f"band {bands[0]} in grey": (0,)}


@dataclass(frozen=True)
class Stretch:
    """A linear map from values to [0, 1] per band, from real pixels and used for everything compared with them.

    Args:
        low: Value shown as black, per band (C,).
        high: Value shown as white, per band (C,).
    """

    low: Array
    high: Array

    @classmethod
    def of(cls, chips: Sequence[Array], valids: Sequence[Array], low: float = 2.0, high: float = 98.0) -> Stretch:
        """The stretch between two percentiles of the valid pixels of all chips.

        Args:
            chips: Arrays (C, H, W); sizes may differ.
            valids: Masks (H, W), true = data.
            low: Percentile shown as black.
            high: Percentile shown as white.
        """
        pixels = [np.asarray(chip, np.float32)[:, valid] for chip, valid in zip(chips, valids, strict=True)]
        joined = np.concatenate(pixels, axis=1) if pixels else np.zeros((1, 0), np.float32)
        if joined.shape[1] == 0:
            return cls(np.zeros(joined.shape[0]), np.ones(joined.shape[0]))
        bottom, top = np.percentile(joined, [low, high], axis=1)
        return cls(bottom, np.where(top > bottom, top, bottom + 1.0))

    def rgba(self, chip: Array, valid: Array, view: tuple[int, ...]) -> Array:
        """A chip (C, H, W) as RGBA (H, W, 4) in [0, 1]; invalid pixels are transparent."""
        picked = list(view) * (3 if len(view) == 1 else 1)
        low, high = self.low[picked, None, None], self.high[picked, None, None]
        shown = np.clip((np.asarray(chip, np.float64)[picked] - low) / (high - low), 0.0, 1.0)
        shown = np.where(np.isfinite(shown), shown, 0.0)
        return np.concatenate([shown, valid[None].astype(np.float64)]).transpose(1, 2, 0)


def show(axes: Axes, image: Array, **options: Any) -> None:
    """An image without ticks over a hatched ground, which is what shows where pixels are missing."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    ground = Rectangle(
        (0, 0), 1, 1, transform=axes.transAxes, facecolor="#f1f2f4", edgecolor="#b9bec5", hatch="////", lw=0, zorder=-1
    )
    axes.add_patch(ground)
    axes.imshow(image, interpolation="nearest", **options)


def chips_figure(
    chips: Sequence[Array], valids: Sequence[Array], bands: Sequence[str], titles: Sequence[str], columns: int = 8
) -> Figure:
    """Chips in every view that their bands allow, all under one 2nd to 98th percentile stretch.

    Args:
        chips: Arrays (C, H, W), physical values, any dtype; at most 24 are shown.
        valids: Masks (H, W), true = data.
        bands: Names in band order.
        titles: One per chip, as plain text.
        columns: Chips side by side.
    """
    stretch = Stretch.of(chips, valids)
    chips, valids = chips[:MAX_CHIPS], valids[:MAX_CHIPS]
    shown = views(bands)
    columns = max(1, min(columns, len(chips)))
    groups = max(1, -(-len(chips) // columns))
    heads_in = [0.2 if row == 0 else 0.0 for _ in range(groups) for row in range(len(shown))]
    with styled():
        figure, grid = image_grid(groups * len(shown), columns, 10.2 / max(columns, 6), 0.22, heads_in, _FOOT_IN)
        for place in range(groups * columns):
            group, column = divmod(place, columns)
            for row, view in enumerate(shown.values()):
                axes = grid[group * len(shown) + row][column]
                if place >= len(chips):
                    axes.set_axis_off()
                    continue
                show(axes, stretch.rgba(chips[place], valids[place], view))
                if row == 0:
                    axes.set_title(plain(short_title(titles[place])), fontsize=6.5, color=QUIET, weight="normal", pad=2)
        row_labels(grid, [title for _ in range(groups) for title in shown])
        caption(figure, _caption(shown, any(not np.all(valid) for valid in valids)))
    return figure


def sample_figure(
    real: Sequence[Array], valids: Sequence[Array], sampled: Sequence[Array], bands: Sequence[str], columns: int = 8
) -> Figure:
    """Sampled chips beside real ones, both under the stretch of the real ones (the sampled, if no real pixel is valid).

    Args:
        real: Real chips (C, H, W), physical values; as many as `columns` are shown.
        valids: Their masks (H, W).
        sampled: Sampled chips (C, H, W), physical values.
        bands: Names in band order.
        columns: Chips side by side.
    """
    everywhere = [np.ones(chip.shape[1:], bool) for chip in sampled]
    measured = any(np.any(valid) for valid in valids)
    stretch = Stretch.of(real, valids) if measured else Stretch.of(sampled, everywhere)
    shown = views(bands)
    columns = max(1, min(columns, max(len(real), len(sampled))))
    blocks = [("real", list(real[:columns]), list(valids[:columns]))]
    for start in range(0, len(sampled), columns):
        part = slice(start, start + columns)
        blocks.append(("sampled", list(sampled[part]), everywhere[part]))
    heads_in = [0.06 if row == 0 else 0.0 for _ in blocks for row in range(len(shown))]
    with styled():
        figure, grid = image_grid(len(heads_in), columns, 10.2 / max(columns, 6), 0.36, heads_in, _FOOT_IN)
        for block, (_, chips, masks) in enumerate(blocks):
            for row, view in enumerate(shown.values()):
                for column, axes in enumerate(grid[block * len(shown) + row]):
                    if column < len(chips):
                        show(axes, stretch.rgba(chips[column], masks[column], view))
                    else:
                        axes.set_axis_off()
        row_labels(grid, [f"{name}\n{title}" for name, _, _ in blocks for title in shown])
        source = "real pixels" if measured else "sampled pixels"
        caption(figure, _caption(shown, any(not np.all(valid) for valid in blocks[0][2]), source))
    return figure


def short_title(title: str, width: int = 24) -> str:
    """The file's name without folder and extension, and of a long one the end."""
    return short(file_title(title), width)


def row_labels(grid: Sequence[Sequence[Axes]], labels: Sequence[str]) -> None:
    """What each row of images shows, upright at its left."""
    for row, label in zip(grid, labels, strict=True):
        row[0].text(
            -0.03, 0.5, plain(label), transform=row[0].transAxes, rotation=90, ha="right", va="center",
            fontsize=7, color=QUIET, linespacing=1.3,
        )  # fmt: skip


def _caption(shown: dict[str, tuple[int, ...]], gaps: bool, source: str = "valid pixels") -> str:
    text = f"All panels share one stretch: 2nd to 98th percentile of the {source}, per band."
    if next(iter(shown.values())) == (0,):
        text = f"{plain(next(iter(shown))).capitalize()}: the band names lack red, green, blue and nir. {text}"
    return text + (" Hatched: no data." if gaps else "")
