"""Label-efficiency curves: a score over labelled chips, one line per method."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from earthprior.bench.findings import Answer, Point
from earthprior.figures.style import INK, LINEAR, MEAN, NETWORK, QUIET, caption, legend_above, new_figure, styled

LOOKS: dict[str, tuple[str, str, str]] = {
    "finetune": (NETWORK, "-", "o"),
    "probe": ("#6f9dce", "--", "o"),
    "scratch": (LINEAR, "-", "s"),
    "untrained": ("#e0b184", "--", "s"),
    "context_mlp": (MEAN, "-", "^"),
    "context": (MEAN, "--", "^"),
}
"""Colour, line and mark: blue is pretrained, orange is not, grey is no network; dashed is a linear classifier."""

NAMES = {
    "finetune": "pretrained, fine-tuned",
    "probe": "pretrained, frozen",
    "scratch": "from scratch",
    "untrained": "untrained, frozen",
    "context_mlp": "pixels with context, MLP",
    "context": "pixels with context, linear",
}
APART = 0.045
"""Of neighbouring methods at one budget, in powers of two."""


def labels_figure(found: Sequence[Point], metric: str, judged: str, answer: Answer | None = None) -> Figure:
    """Means over seeds as lines, seeds as dots, intervals over judged chips as bars.

    Args:
        found: At least one.
        metric: The score's name, for the eye.
        judged: On what it was judged, for the caption.
        answer: What is marked: the pretrained network's score and where scratch comes to it.
    """
    methods = [name for name in LOOKS if any(point.method == name for point in found)]
    with styled():
        figure = new_figure(8.6, 4.9)
        axes = figure.subplots()
        for place, name in enumerate(methods):
            colour, line, mark = LOOKS[name]
            curve = [point for point in found if point.method == name]
            shift = 2 ** (APART * (place - (len(methods) - 1) / 2))
            xs = [point.labels * shift for point in curve]
            axes.plot(xs, [p.mean for p in curve], line, marker=mark, color=colour, label=NAMES[name], zorder=3)
            for x, point in zip(xs, curve, strict=True):
                axes.plot([x] * len(point.values), list(point.values.values()), ".", color=colour, ms=3.5, alpha=0.6)
                if math.isfinite(point.low) and math.isfinite(point.high):
                    axes.vlines(x, point.low, point.high, color=colour, lw=1, alpha=0.45, zorder=2)
        if answer is not None:
            _mark(axes, answer)
        ticks = sorted({point.labels for point in found})
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xlabel("labelled chips")
        axes.set_title(metric)
        legend_above(axes)
        caption(figure, _caption(found, judged))
    return figure


def _mark(axes: Axes, answer: Answer) -> None:
    """The level that scratch is to reach, and where it does."""
    point = answer.pretrained
    end = answer.needed or answer.most
    if not answer.at_least and end > point.labels:
        axes.plot([point.labels, end], [point.mean] * 2, ":", color=INK, lw=1, zorder=1)
        text = f"scratch: {answer.needed:.0f} chips" if answer.needed else f"scratch: more than {answer.most}"
        axes.annotate(
            text, (end, point.mean), xytext=(0, 5), textcoords="offset points", ha="right", fontsize=7.5, color=QUIET,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip


def _caption(found: Sequence[Point], judged: str) -> str:
    least, seeds = (end(len(point.values) for point in found) for end in (min, max))
    number = f"{'up to ' * (least < seeds)}{seeds}"
    lines = f"means over {number} seeds (which chips are labelled, and the training); dots: single seeds"
    return (
        f"Lines: {lines if seeds > 1 else 'one seed'}. Bars: 95 % intervals, bootstrap over {judged}"
        f"{', averaged over seeds' * (seeds > 1)}; all methods are judged on the same chips, so differences between "
        "them are surer than the bars look. Methods of one budget are drawn a little apart."
    )
