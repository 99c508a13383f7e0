"""What probes found: which features serve, and what they are worth beside what needs no training."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from earthprior.figures.imagery import Array
from earthprior.figures.style import INK, LINEAR, MEAN, NETWORK, QUIET, axes_grid, new_figure, plain, styled

COLOURS = {"network": NETWORK, "untrained": "#8fb0d6", "context": LINEAR, "statistics": LINEAR}

Interval = tuple[float, float, float]


def serving_figure(
    scores: Array, blocks: Sequence[str], rhos: Sequence[float], serving: tuple[int, int], name: str
) -> Figure:
    """The validation score of every block at every noise level; the one that serves is framed.

    Args:
        scores: (blocks, rhos); NaN where there is none.
        blocks: What the rows are.
        rhos: Noise-to-signal ratios.
        serving: Row and column of the one that serves.
        name: Of the score.
    """
    with styled():
        figure = new_figure(max(4.6, 2.2 + 0.66 * len(rhos)), 0.95 + 0.24 * len(blocks))
        axes = figure.subplots()
        axes.grid(False)
        low, high = float(np.nanmin(scores)), float(np.nanmax(scores))
        axes.imshow(scores, cmap="Blues", aspect="auto", vmin=low - 0.25 * (high - low), vmax=high + 0.1 * (high - low))
        for row in range(len(blocks)):
            for column in range(len(rhos)):
                value = scores[row, column]
                text = "-" if np.isnan(value) else f"{value:.3f}"
                dark = high > low and (value - low) / (high - low) > 0.6
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
        axes.add_patch(
            Rectangle((serving[1] - 0.5, serving[0] - 0.5), 1, 1, fill=False, edgecolor=LINEAR, linewidth=2.4, zorder=5)
        )
        axes.set_xticks(range(len(rhos)), [f"{rho:g}" for rho in rhos])
        axes.set_yticks(range(len(blocks)), [plain(block) for block in blocks])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel("noise-to-signal ratio rho")
        axes.set_title(f"{capitalized(name)} by block and noise level", loc="left")
    return figure


def scores_figure(
    scores: Mapping[str, Mapping[str, Interval]], names: Mapping[str, str], name: str, chance: float | None = None
) -> Figure:
    """One score of every representation, with its interval; a panel per probe, all on one scale.

    Args:
        scores: By probe and representation: value, low, high; NaN ends where there is no interval.
        names: What representations are called.
        name: Of the score.
        chance: What guessing scores, a dashed line.
    """
    shown = list(next(iter(scores.values())))
    with styled():
        figure = new_figure(10.4, 0.85 + 0.36 * len(shown))
        cells = axes_grid(figure, 1, len(scores), sharey=True, sharex=True)[0]
        for axes, (probe, found) in zip(cells, scores.items(), strict=True):
            for place, representation in enumerate(shown):
                value, low, high = found[representation]
                if np.isnan(value):
                    continue
                axes.barh(place, value, height=0.62, color=COLOURS.get(representation, MEAN))
                if not np.isnan(low):
                    axes.plot([low, high], [place, place], color=INK, lw=1.3, marker="|", ms=6, zorder=3)
                end = value if np.isnan(high) else high
                axes.annotate(
                    f"{value:.3f}", (max(end, 0), place), xytext=(5, 0), textcoords="offset points", va="center",
                    fontsize=7.5, color=INK,
                )  # fmt: skip
            if chance is not None:
                axes.axvline(chance, color=QUIET, lw=1, ls="--", zorder=2)
            axes.set_title(f"{capitalized(probe)}: {name}")
            axes.grid(False, axis="y")
            axes.margins(x=0.12)
        cells[0].set_yticks(range(len(shown)), [_wrapped(names[one]) for one in shown])
        cells[0].invert_yaxis()
    return figure


def capitalized(text: str) -> str:
    """Its first letter large, the others as they are."""
    return f"{text[:1].upper()}{text[1:]}"


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(plain(name), 34))
