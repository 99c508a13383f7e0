"""Curves: training over epochs, and denoisers over noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from earthprior.figures.style import INK, LINEAR, MEAN, NETWORK, QUIET, axes_grid, legend_above, new_figure, styled

if TYPE_CHECKING:
    import pandas as pd

COLOURS = {"network": NETWORK, "linear": LINEAR, "mean": MEAN}
LABELS = {"network": "network", "linear": "linear (Wiener) filter", "mean": "training mean"}


def history_figure(history: pd.DataFrame) -> Figure:
    """Losses, denoising gain and learning rate over epochs.

    Args:
        history: One row an epoch; of the columns epoch, train_loss, loss (validation), gain_db/mean and lr those
            that exist are shown.
    """
    epochs = history.get("epoch", history.index)
    with styled():
        figure = new_figure(10.4, 2.7)
        (losses, gain, rate) = axes_grid(figure, 1, 3)[0]
        for column, label, colour in (("train_loss", "training", QUIET), ("loss", "validation", NETWORK)):
            if column in history:
                losses.plot(epochs, history[column], marker="o", color=colour, label=label)
        losses.set_title("Loss")
        if losses.lines:
            legend_above(losses)
        if "gain_db/mean" in history:
            gain.plot(epochs, history["gain_db/mean"], marker="o", color=NETWORK)
            _zero_line(gain)
        gain.set_title("Validation gain over the linear filter, dB")
        if "lr" in history:
            rate.plot(epochs, history["lr"], marker="o", color=QUIET)
            rate.set_ylim(bottom=0)
        rate.set_title("Learning rate")
        for axes in (losses, gain, rate):
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if not axes.lines:
                axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=QUIET)
    return figure


def gain_figure(levels: pd.DataFrame) -> Figure:
    """Denoising gain of the network over the linear filter per noise level; below 0 the filter is better.

    Args:
        levels: One row per level with columns rho and gain_db.
    """
    rows = levels.sort_values("rho")
    with styled():
        figure = new_figure(5.2, 2.9)
        axes = figure.subplots()
        positions = range(len(rows))
        axes.bar(positions, rows["gain_db"], width=0.62, color=NETWORK)
        for place, value in zip(positions, rows["gain_db"], strict=True):
            axes.annotate(
                f"{value:+.2f}", (place, value), xytext=(0, 3 if value >= 0 else -3), textcoords="offset points",
                ha="center", va="bottom" if value >= 0 else "top", fontsize=7.5, color=INK,
            )  # fmt: skip
        _zero_line(axes)
        axes.margins(y=0.16)
        axes.set_xticks(list(positions), [f"{rho:g}" for rho in rows["rho"]])
        axes.grid(False, axis="x")
        axes.set_title("Gain over the linear filter, dB")
        axes.set_xlabel("noise-to-signal ratio rho")
    return figure


def levels_figure(levels: pd.DataFrame) -> Figure:
    """eps-MSE, PSNR and SSIM of each denoiser over noise levels.

    Args:
        levels: One row per level with columns rho and `<metric>_<denoiser>`, metrics eps_mse, psnr and ssim.
    """
    with styled():
        figure = new_figure(10.4, 2.9)
        cells = axes_grid(figure, 1, 3)[0]
        for axes, column, title in zip(
            cells, ("eps_mse", "psnr", "ssim"), ("eps-MSE (lower is better)", "PSNR of x0_hat, dB", "SSIM of x0_hat"),
            strict=True,
        ):  # fmt: skip
            for name, colour in COLOURS.items():
                if f"{column}_{name}" in levels:
                    values = levels[f"{column}_{name}"]
                    axes.plot(levels["rho"], values, marker="o", color=colour, label=LABELS[name])
            axes.set_title(title)
            _rho_axis(axes, sorted(set(levels["rho"])))
        cells[0].set_yscale("log")
        if cells[0].lines:
            cells[0].legend()
    return figure


def _rho_axis(axes: Axes, levels: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(levels)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("noise-to-signal ratio rho")


def _zero_line(axes: Axes) -> None:
    """0 dB is the linear filter itself."""
    axes.axhline(0, color=LINEAR, lw=1.2, zorder=1)
    axes.annotate(
        "linear\nfilter", (1, 0), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
        ha="left", va="center", fontsize=7, color=LINEAR, annotation_clip=False,
    )  # fmt: skip
