"""A study at a glance: its history, its trials' curves, what mattered, and the front of two objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from earthprior.figures.style import INK, LINEAR, MEAN, NETWORK, QUIET, axes_grid, new_figure, plain, styled
from earthprior.figures.trials import Trial, reached_values, shortened, shown_from, unit_apart

FAINT = "#cdd2d8"
SHADES = LinearSegmentedColormap.from_list("shades", ["#c3d5ea", "#6f9dce", "#123f73"])
"""From pale (early, poor) to dark blue (late, good)."""

_NAMED_ON_THE_FRONT = 24
_MANY = 100


def history_figure(trials: Sequence[Trial], metrics: Sequence[str]) -> Figure:
    """Each trial's value over its number, and the best so far; one panel per objective.

    Args:
        trials: At least one of them has a value.
        metrics: The objectives' names.
    """
    with styled():
        figure = new_figure(10.4, 0.4 + 2.7 * len(metrics))
        for objective, (axes,) in enumerate(axes_grid(figure, len(metrics), 1)):
            finished = [trial for trial in trials if trial.values]
            _best_so_far(axes, finished, objective)
            values = reached_values(trials, objective)
            mark_values(axes, trials, objective, lambda trial: trial.number, shown_from(values))
            limit(axes, values, metrics[objective])
            failed = [trial.number for trial in trials if trial.state == "failed"]
            if failed:
                axes.plot(
                    failed, np.full(len(failed), 0.02), "x", transform=axes.get_xaxis_transform(), color=INK,
                    ms=4.5, mew=1.1, label="failed", clip_on=False, zorder=4,
                )  # fmt: skip
            axes.set_title(plain(metrics[objective]))
            axes.set_xlabel("trial" if objective == len(metrics) - 1 else "")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlim(-0.7, max(trial.number for trial in trials) + 0.7)
            _legend_row(axes)
    return figure


def curves_figure(trials: Sequence[Trial], metric: str, best: int | None) -> Figure:
    """The first objective over epochs, one line per trial.

    Args:
        trials: At least one of them has a curve.
        metric: The objective's name.
        best: Number of the trial to stand out.
    """
    drawn = [trial for trial in trials if trial.curve]
    with styled():
        figure = new_figure(10.4, 3.6)
        axes = figure.subplots()
        for state, colour, name in (("pruned", FAINT, "pruned"), ("finished", "#8fb3dc", "finished")):
            _lines(axes, [t for t in drawn if t.state == state and t.number != best], colour, name)
        _lines(axes, [t for t in drawn if t.state not in ("pruned", "finished")], MEAN, "unfinished", ls=":")
        ends = {trial.number: (max(trial.curve), trial.curve[max(trial.curve)]) for trial in drawn}
        stopped = [ends[trial.number] for trial in drawn if trial.state == "pruned"]
        if stopped:
            axes.plot(*zip(*stopped, strict=True), "x", color=MEAN, ms=4, mew=1, label="pruned here")
        for trial in (trial for trial in drawn if trial.number == best):
            _lines(axes, [trial], NETWORK, f"trial {best}, the best", lw=2.2)
            axes.plot(*ends[trial.number], "o", color=NETWORK)
        low = shown_from([value for _, value in ends.values()])
        limit(axes, [value for t in drawn if ends[t.number][1] >= low for value in t.curve.values()], metric)
        axes.set_title(plain(metric))
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
        _legend_row(axes)
    return figure


def importances_figure(importances: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bars of each dial's share, one panel per objective.

    Args:
        importances: By objective, shares by dial.
    """
    names = list(next(iter(importances.values())))
    with styled():
        figure = new_figure(5.6 if len(importances) == 1 else 10.4, 0.75 + 0.27 * len(names))
        for axes, (metric, shares) in zip(axes_grid(figure, 1, len(importances))[0], importances.items(), strict=True):
            places = range(len(names))
            axes.barh(places, [shares[name] for name in names], height=0.62, color=NETWORK)
            for place, name in zip(places, names, strict=True):
                axes.annotate(
                    f"{shares[name]:.0%}", (shares[name], place), xytext=(3, 0), textcoords="offset points",
                    va="center", fontsize=7.5, color=INK,
                )  # fmt: skip
            axes.set_yticks(list(places), [plain(shortened(name, 34)) for name in names])
            axes.invert_yaxis()
            axes.grid(False, axis="y")
            axes.set_xlim(0, 1.08 * max(shares.values()) + 0.02)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.set_title(f"Share of the differences in {plain(unit_apart(metric)[0])}")
    return figure


def pareto_figure(trials: Sequence[Trial], metrics: Sequence[str], front: Sequence[int]) -> Figure:
    """Two objectives against each other; the trials of the front are joined and numbered.

    Args:
        trials: Those finished are shown.
        metrics: The two objectives' names.
        front: Numbers of the trials that no other beats in both.
    """
    finished = [trial for trial in trials if trial.values]
    best = sorted((trial for trial in finished if trial.number in set(front)), key=lambda trial: tuple(trial.values))
    with styled():
        figure = new_figure(6.4, 4.4)
        axes = figure.subplots()
        rest = [trial.values for trial in finished if trial not in best]
        if rest:
            axes.plot(*zip(*rest, strict=True), "o", color=MEAN, ms=4, alpha=0.7, label="beaten in both")
        xs, ys = zip(*(trial.values for trial in best), strict=True)
        axes.step(xs, ys, where="pre", color=NETWORK, lw=1, alpha=0.6)
        axes.plot(xs, ys, "o", color=NETWORK, ms=6, label="the front")
        for trial in best if len(best) <= _NAMED_ON_THE_FRONT else ():
            axes.annotate(
                f"{trial.number}", (trial.values[0], trial.values[1]), xytext=(4, 3), textcoords="offset points",
                fontsize=7.5, color=INK,
            )  # fmt: skip
        values = list(zip(*(trial.values for trial in finished), strict=True))
        axes.set_xlim(*_padded(values[0]))
        axes.set_ylim(*_padded(values[1]))
        axes.set_xlabel(plain(metrics[0]))
        axes.set_ylabel(plain(metrics[1]))
        _legend_row(axes)
    return figure


def mark_values(
    axes: Axes,
    trials: Sequence[Trial],
    objective: int,
    place: Callable[[Trial], float],
    low: float,
    by_age: bool = False,
) -> None:
    """Finished and pruned trials as marks; what lies below the picture is a triangle at its lower edge.

    Args:
        axes: Where.
        trials: Those without a value are left out.
        objective: Which value.
        place: Where on the x axis.
        low: The least value that the picture shows.
        by_age: Whether later trials are darker.
    """
    reached = [(trial, value) for trial in trials if (value := trial.reached(objective)) is not None]
    if not reached:
        return
    last = max(trial.number for trial, _ in reached) or 1
    size = 22 if len(reached) <= _MANY else 11
    for state, marker, alpha in (("pruned", "x", 0.7), ("finished", "o", 1.0)):
        inside = [(trial, value) for trial, value in reached if trial.state == state and value >= low]
        if inside:
            shades = [SHADES(trial.number / last) for trial, _ in inside]
            axes.scatter(
                [place(trial) for trial, _ in inside], [value for _, value in inside], s=size, marker=marker,
                c=MEAN if state == "pruned" else shades if by_age else NETWORK, linewidths=1, label=state, zorder=3,
                alpha=alpha,
            )  # fmt: skip
    below = [(trial, value) for trial, value in reached if value < low]
    if below:
        axes.scatter(
            [place(trial) for trial, _ in below], np.full(len(below), 0.03), transform=axes.get_xaxis_transform(),
            s=20, marker="v", c=[NETWORK if trial.state == "finished" else MEAN for trial, _ in below],
            label="below the picture", zorder=3,
        )  # fmt: skip


def limit(axes: Axes, values: Sequence[float], metric: str = "") -> None:
    """Set the y limits to where the good trials are, with the linear filter's line where a gain comes near it."""
    bottom, top = _padded(values)
    axes.set_ylim(bottom, top)
    if metric.startswith("gain") and bottom < 0 < top:
        axes.axhline(0, color=LINEAR, lw=1.2, zorder=1, label="linear filter")


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = shown_from(values), max(values)
    room = 0.07 * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, high + room


def _best_so_far(axes: Axes, finished: Sequence[Trial], objective: int) -> None:
    if finished:
        numbers = [trial.number for trial in finished]
        best = np.maximum.accumulate([trial.values[objective] for trial in finished])
        axes.step(numbers, best, where="post", color=NETWORK, lw=1.2, alpha=0.55, label="best so far", zorder=2)


def _lines(axes: Axes, trials: Sequence[Trial], colour: str, name: str, lw: float = 1.0, ls: str = "-") -> None:
    if trials:
        lines = [sorted(trial.curve.items()) for trial in trials]
        alpha = 0.5 if len(trials) > _MANY // 2 else 1.0
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=lw, linestyles=ls, label=name, alpha=alpha))
        dots = [line[0] for line in lines if len(line) == 1]
        if dots:
            axes.plot(*zip(*dots, strict=True), ".", color=colour)


def _legend_row(axes: Axes) -> None:
    """A legend at the right of the title's line, in one row."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, names, loc="lower right", bbox_to_anchor=(1, 0.985), ncols=len(names), borderaxespad=0,
            handlelength=1.2, columnspacing=1, labelcolor=QUIET,
        )  # fmt: skip
