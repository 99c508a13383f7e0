"""Curves: training over epochs, denoisers over noise levels, and several runs over each other."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from earthprior.figures.style import (
    INK,
    LINEAR,
    MEAN,
    NETWORK,
    QUIET,
    axes_grid,
    legend_above,
    new_figure,
    plain,
    styled,
)

if TYPE_CHECKING:
    import pandas as pd

COLOURS = {"network": NETWORK, "linear": LINEAR, "mean": MEAN}
LABELS = {"network": "network", "linear": "linear (Wiener) filter", "mean": "training mean"}

RUN_STYLES = (
    (NETWORK, "-", "o"),
    ("#cc3311", "--", "s"),
    ("#009988", "-.", "^"),
    ("#22262b", ":", "D"),
    ("#ee3377", "-", "v"),
    ("#33bbee", "--", "P"),
    ("#7a6a00", "-.", "X"),
    ("#7b3fa0", ":", "*"),
)
"""Colour, line and marker of each of several runs, told apart without colour, too; none has the linear filter's.

Source: most colours are Paul Tol's "vibrant", https://personal.sron.nl/~pault/.
"""

_LINEAR_DB = 3.0
_MARKERS = 12


@dataclass(frozen=True)
class RunCurves:
    """What is drawn of one of several runs.

    Args:
        title: Its name in the legend, plain text.
        history: One row an epoch; of the columns step, chips (seen), gain (dB) and lr those that exist are drawn.
        best: Row of the epoch that was kept, or None.
        levels: Gain in dB by noise-to-signal ratio, at that epoch; may be empty.
    """

    title: str
    history: pd.DataFrame
    best: int | None
    levels: Mapping[float, float]


def history_figure(
    history: pd.DataFrame, headline: str = "gain_db/mean", title: str = "Validation gain over the linear filter, dB"
) -> Figure:
    """Losses, the number that is judged by, and learning rate over epochs.

    Args:
        history: One row an epoch; of the columns epoch, train_loss, loss (validation), `headline` and lr those that
            exist are shown.
        headline: The column of that number.
        title: What it is.
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
        if headline in history:
            gain.plot(epochs, history[headline], marker="o", color=NETWORK)
            if headline == "gain_db/mean":
                _zero_line(gain)
        gain.set_title(title)
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
                    (line,) = axes.plot(levels["rho"], values, marker="o", color=colour, label=LABELS[name])
                    # Where the gain is small the network's lies on the filter's, and both shall be seen.
                    line.set_zorder({"network": 4, "linear": 3, "mean": 2}[name])
                    if name == "linear":
                        line.set(linestyle="--", fillstyle="none", markersize=7)
            axes.set_title(title)
            _rho_axis(axes, sorted(set(levels["rho"])))
        cells[0].set_yscale("log")
        if cells[0].lines:
            cells[0].legend()
    return figure


def comparison_figure(runs: Sequence[RunCurves]) -> Figure:
    """Gain over steps and over chips seen, gain per noise level, and learning rate, of up to eight runs."""
    with styled():
        figure = new_figure(10.4, 6.0 + 0.18 * -(-len(runs) // 2))
        (steps, chips), (levels, rate) = axes_grid(figure, 2, 2, gridspec_kw={"hspace": 0.06})
        for run, (colour, line, marker) in zip(runs, RUN_STYLES, strict=False):
            look: dict[str, Any] = {"color": colour, "ls": line, "marker": marker}
            every = max(1, len(run.history) // _MARKERS)
            for axes, x, y in ((steps, "step", "gain"), (chips, "chips", "gain"), (rate, "step", "lr")):
                if {x, y} <= set(run.history):
                    axes.plot(run.history[x], run.history[y], markevery=every, **look)
                    if run.best is not None and y == "gain":
                        kept = run.history.iloc[run.best]
                        axes.plot(kept[x], kept[y], marker="o", ms=10, mfc="none", mec=colour, mew=1.4, zorder=4)
            rhos = sorted(run.levels)
            levels.plot(rhos, [run.levels[rho] for rho in rhos], label=_entry(run.title), **look)
        for axes, title, x in (
            (steps, "Validation gain over the linear filter, dB", "optimizer steps"),
            (chips, "The same, over chips seen", "chips seen (steps x batch_size)"),
            (rate, "Learning rate", "optimizer steps"),
        ):
            axes.set_title(title)
            axes.set_xlabel(x)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_xlim(left=0)
        levels.set_title("Gain per noise level at the best epoch, dB")
        _rho_axis(levels, sorted({rho for run in runs for rho in run.levels}))
        rate.set_ylim(bottom=0)
        for axes in (steps, chips, levels):
            _gain_axis(axes)
        figure.legend(loc="outside upper left", ncols=2, handlelength=3.5)
    return figure


def _entry(title: str) -> str:
    return plain(textwrap.shorten(title, 70, placeholder=" ..."))


def _gain_axis(axes: Axes) -> None:
    """Linear, or where a curve lies far below the linear filter logarithmic there: it would press all others flat."""
    if axes.dataLim.y0 < -_LINEAR_DB:
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_locator(FixedLocator([-50, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylabel("dB, logarithmic beyond 1")
    _zero_line(axes)


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
