"""What denoising looks like: clean, noisy, the estimate of each denoiser, and its error."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from earthprior.figures.imagery import Array, Stretch, row_labels, show, views
from earthprior.figures.style import QUIET, caption, image_grid, plain, styled

_WIDTH_IN, _LEFT_IN, _GAP_IN, _LINE_IN = 10.66, 0.4, 0.03, 0.14
_IN_ONE_ROW = 2
"""So many estimates have their errors beside them; of more they stand in a row of their own below."""


@dataclass(frozen=True)
class Panel:
    """A chip at one noise level, all arrays (C, H, W) in physical units.

    Args:
        title: What stands at the left, plain text.
        clean: The chip.
        noisy: xt / alpha in physical units, so that noise is seen on an unchanged chip.
        estimates: Each denoiser's x0_hat, by its name; None where it cannot answer at this level.
        valid: Mask (H, W).
    """

    title: str
    clean: Array
    noisy: Array
    estimates: Mapping[str, Array | None]
    valid: Array


def denoising_figure(panels: Sequence[Panel], bands: Sequence[str]) -> Figure:
    """Panels of the same denoisers, each under the stretch of its clean chip.

    The errors are root mean squares over bands, in units of each band's stretch; all of a panel share one scale.
    """
    names = list(panels[0].estimates)
    below = len(names) > _IN_ONE_ROW
    columns = ["clean", "noisy", *(name if below else f"{name} x0_hat" for name in names)]
    columns += [] if below else [f"{name} error" for name in names]
    cell_in = min(1.68, (_WIDTH_IN - _LEFT_IN) / len(columns) - _GAP_IN)
    heads = [_wrapped(name, cell_in) for name in columns]
    rows = len(panels) * (1 + below)
    head_in = 0.22 + _LINE_IN * max(head.count("\n") for head in heads)
    title, view = next(iter(views(bands).items()))
    with styled():
        heads_in = [head_in, *[0.0] * (rows - 1)]
        if below:
            heads_in[2::2] = [0.08] * (len(panels) - 1)
        figure, grid = image_grid(rows, len(columns), cell_in, _LEFT_IN, heads_in, 0.4)
        # Where errors stand beside the estimates, both kinds of row are the same ones.
        image_rows, error_rows = grid[:: 1 + below], grid[below :: 1 + below]
        for panel, images, errors in zip(panels, image_rows, error_rows, strict=True):
            stretch = Stretch.of([panel.clean], [panel.valid])
            for axes, image in zip(images, [panel.clean, panel.noisy, *panel.estimates.values()], strict=False):
                if image is None:
                    _say_unreached(axes)
                else:
                    show(axes, stretch.rgba(image, panel.valid, view))
            _show_errors(errors[-len(names) :], panel, stretch)
        row_labels(image_rows, [panel.title for panel in panels])
        if below:
            row_labels([row[2:] for row in error_rows], ["error"] * len(panels))
            for axes in (axes for row in error_rows for axes in row[:2]):
                axes.set_axis_off()
        for axes, head in zip(grid[0], heads, strict=True):
            axes.set_title(plain(head), pad=3)
        caption(
            figure,
            f"Shown: {title}, each row under its clean chip's 2nd to 98th percentile stretch. Errors: root mean square "
            "over bands in units of the stretch; one colour scale per row, black is 0, the brightest the row's 99th "
            "percentile.",
        )
    return figure


def _show_errors(cells: Sequence[Axes], panel: Panel, stretch: Stretch) -> None:
    """The errors of a panel's estimates under one scale."""
    known = {name: _error(image, panel, stretch) for name, image in panel.estimates.items() if image is not None}
    measured = panel.valid.any()
    top = max([float(np.percentile(error[panel.valid], 99)) for error in known.values() if measured] or [1.0])
    for axes, name in zip(cells, panel.estimates, strict=True):
        if name not in known:
            axes.set_axis_off()
            continue
        error = known[name]
        show(axes, np.ma.array(error, mask=~panel.valid), cmap="magma", vmin=0.0, vmax=max(top, 1e-12))
        if measured:
            rms = float(np.sqrt(np.mean(error[panel.valid] ** 2)))
            axes.text(
                0.97, 0.03, f"rms {rms:.3f}", transform=axes.transAxes, ha="right", va="bottom", fontsize=6.5,
                color="white", bbox={"facecolor": "black", "alpha": 0.55, "pad": 1.5, "lw": 0},
            )  # fmt: skip


def _say_unreached(axes: Axes) -> None:
    axes.set_axis_off()
    text = "level not\nreached"
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=7, color=QUIET)


def _wrapped(name: str, width_in: float) -> str:
    """A column's name on at most three lines."""
    return "\n".join(textwrap.wrap(name, int(width_in * 72 / 5.6), max_lines=3, placeholder=" ..."))


def _error(image: Array, panel: Panel, stretch: Stretch) -> Array:
    """Root mean square difference from the clean chip over bands, (H, W), in units of the stretch."""
    span = (stretch.high - stretch.low)[:, None, None]
    difference = (np.asarray(image, np.float64) - np.asarray(panel.clean, np.float64)) / span
    rms: Array = np.sqrt(np.mean(difference**2, axis=0))
    return rms
