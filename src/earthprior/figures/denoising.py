"""What denoising looks like: clean, noisy, the linear filter's estimate, the network's, and its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from earthprior.figures.imagery import Array, Stretch, row_labels, show, views
from earthprior.figures.style import caption, image_grid, styled


@dataclass(frozen=True)
class Panel:
    """One row of the figure: a chip at one noise level, all arrays (C, H, W) in physical units.

    Args:
        title: What stands at the left, plain text.
        clean: The chip.
        noisy: xt / alpha in physical units, so that noise is seen on an unchanged chip.
        linear: The linear denoiser's x0_hat.
        network: The network's x0_hat.
        valid: Mask (H, W).
    """

    title: str
    clean: Array
    noisy: Array
    linear: Array
    network: Array
    valid: Array


COLUMNS = ("clean", "noisy", "linear x0_hat", "network x0_hat", "linear error", "network error")


def denoising_figure(panels: Sequence[Panel], bands: Sequence[str]) -> Figure:
    """Rows of panels, each under the stretch of its clean chip.

    The errors are root mean squares over bands, in units of each band's stretch; both share one scale per row.
    """
    title, view = next(iter(views(bands).items()))
    with styled():
        heads_in = [0.22 if row == 0 else 0.0 for row in range(len(panels))]
        figure, grid = image_grid(len(panels), len(COLUMNS), 1.68, 0.4, heads_in, 0.4)
        for row, panel in zip(grid, panels, strict=True):
            stretch = Stretch.of([panel.clean], [panel.valid])
            images = (panel.clean, panel.noisy, panel.linear, panel.network)
            for axes, image in zip(row, images, strict=False):
                show(axes, stretch.rgba(image, panel.valid, view))
            errors = [_error(image, panel, stretch) for image in (panel.linear, panel.network)]
            top = max([float(np.percentile(error[panel.valid], 99)) for error in errors if panel.valid.any()] or [1.0])
            for axes, error in zip(row[4:], errors, strict=True):
                show(axes, np.ma.array(error, mask=~panel.valid), cmap="magma", vmin=0.0, vmax=max(top, 1e-12))
                if panel.valid.any():
                    rms = float(np.sqrt(np.mean(error[panel.valid] ** 2)))
                    axes.text(
                        0.97, 0.03, f"rms {rms:.3f}", transform=axes.transAxes, ha="right", va="bottom", fontsize=6.5,
                        color="white", bbox={"facecolor": "black", "alpha": 0.55, "pad": 1.5, "lw": 0},
                    )  # fmt: skip
        row_labels(grid, [panel.title for panel in panels])
        for axes, name in zip(grid[0], COLUMNS, strict=True):
            axes.set_title(name, pad=3)
        caption(
            figure,
            f"Shown: {title}, each row under its clean chip's 2nd to 98th percentile stretch. Errors: root mean square "
            "over bands in units of the stretch; one colour scale per row, black is 0, the brightest the row's 99th "
            "percentile.",
        )
    return figure


def _error(image: Array, panel: Panel, stretch: Stretch) -> Array:
    """Root mean square difference from the clean chip over bands, (H, W), in units of the stretch."""
    span = (stretch.high - stretch.low)[:, None, None]
    difference = (np.asarray(image, np.float64) - np.asarray(panel.clean, np.float64)) / span
    rms: Array = np.sqrt(np.mean(difference**2, axis=0))
    return rms
