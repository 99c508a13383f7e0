"""The space that a study searched: one panel per dial, and all dials side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator

from earthprior.figures.study import FAINT, SHADES, limit, mark_values
from earthprior.figures.style import INK, QUIET, axes_grid, new_figure, plain, styled
from earthprior.figures.trials import Dial, Trial, reached_values, shortened, shown_from

PER_ROW = 4
MOST_SIDE_BY_SIDE = 11
"""With more axes than that the parallel coordinates cannot be read."""

_ABSENT = -0.13
"""Where a line crosses the axis of a dial that did not act, in axes heights."""


def slices_figure(trials: Sequence[Trial], dials: Sequence[Dial], metric: str, objective: int = 0) -> Figure:
    """What the trials reached over each dial; conditional dials show the trials that had them.

    Args:
        trials: At least one of them has a value.
        dials: One panel each, in this order.
        metric: The objective's name.
        objective: Which value.
    """
    rows = -(-len(dials) // PER_ROW)
    columns = min(len(dials), PER_ROW)
    with styled():
        figure = new_figure(max(2.6 * columns, 4.0), 2.35 * rows)
        cells = [axes for row in axes_grid(figure, rows, columns, sharey=True) for axes in row]
        values = reached_values(trials, objective)
        for dial, axes in zip(dials, cells, strict=False):
            having = [trial for trial in trials if dial.name in trial.params and trial.reached(objective) is not None]
            mark_values(axes, having, objective, partial(_place, dial), shown_from(values), by_age=True)
            _x_axis(axes, dial, having, objective)
            limit(axes, values, metric)
        for axes in cells[len(dials) :]:
            axes.set_axis_off()
        for row in range(rows):
            cells[row * columns].set_ylabel(plain(metric))
    return figure


def parallel_figure(trials: Sequence[Trial], dials: Sequence[Dial], metrics: Sequence[str]) -> Figure:
    """Every finished trial as a line through its settings to its value; pruned ones are grey.

    Args:
        trials: At least one of them has finished.
        dials: The axes, from the left.
        metrics: The objectives' names, the last axes.
    """
    finished = sorted((trial for trial in trials if trial.values), key=lambda trial: trial.values[0])
    pruned = [trial for trial in trials if trial.state == "pruned"]
    scales = [_Scale.of_dial(dial) for dial in dials]
    scales += [_Scale.of_values(name, reached_values(finished, place)) for place, name in enumerate(metrics)]
    with styled():
        figure = new_figure(10.4, 3.9)
        axes = figure.subplots()
        axes.grid(False)
        grey = [_line(scales[: len(dials)], trial) for trial in pruned]
        axes.add_collection(LineCollection(grey, colors=FAINT, linewidths=0.7, zorder=1))
        worth = [scales[len(dials)].height(trial.values[0]) for trial in finished]
        lines = [_line(scales, trial) for trial in finished]
        widths = [0.8 + 0.7 * part for part in worth]
        axes.add_collection(
            LineCollection(lines, colors=[SHADES(part) for part in worth], linewidths=widths, alpha=0.85, zorder=2)
        )
        axes.add_collection(LineCollection(lines[-1:], colors=INK, linewidths=2, zorder=3))
        for place, scale in enumerate(scales):
            scale.draw(axes, place)
        shown = [*finished, *pruned]
        absent = [place for place, dial in enumerate(dials) if any(dial.name not in t.params for t in shown)]
        for place in absent:
            axes.text(place - 0.045, _ABSENT, "not set", ha="right", va="center", fontsize=7, color=QUIET)
        axes.set_axis_off()
        axes.set_xlim(-0.42, len(scales) - 1 + 0.3)
        axes.set_ylim(_ABSENT - 0.04 if absent else -0.04, 1.04)
    return figure


@dataclass(frozen=True)
class _Scale:
    """An axis of the parallel coordinates.

    Args:
        name: What stands above it.
        low: At height 0, in `scale` units.
        high: At height 1.
        ticks: Heights and their labels.
        dial: None for an objective.
    """

    name: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    dial: Dial | None = None

    @classmethod
    def of_dial(cls, dial: Dial) -> _Scale:
        if dial.choices:
            top = len(dial.choices) - 1
            marks = [(float(place), shortened(name, 18)) for place, name in enumerate(dial.choices)]
            return cls(dial.name, -0.3, top + 0.3, marks, dial)
        low, high = _limits(dial)
        return cls(dial.name, low, high, _number_ticks(low, high, dial.log, dial.whole), dial)

    @classmethod
    def of_values(cls, name: str, values: Sequence[float]) -> _Scale:
        low, high = shown_from(values), max(values)
        if high <= low:
            low, high = low - 0.5, high + 0.5
        return cls(name, low, high, _number_ticks(low, high, False, False))

    def height(self, value: float) -> float:
        return float(np.clip((value - self.low) / (self.high - self.low), 0, 1))

    def draw(self, axes: Axes, place: int) -> None:
        axes.plot([place, place], [0, 1], color=QUIET, lw=0.8, zorder=4)
        outline = [withStroke(linewidth=2.2, foreground="white")]
        for value, text in self.ticks:
            height = self.height(value)
            axes.plot([place - 0.025, place], [height, height], color=QUIET, lw=0.8, zorder=4)
            axes.text(
                place - 0.045, height, plain(text) if self.dial and self.dial.choices else text, ha="right",
                va="center", fontsize=7, color=INK, path_effects=outline, zorder=5,
            )  # fmt: skip
        axes.text(
            place, 1.07, plain(_wrapped(self.name, 16)), ha="center", va="bottom", fontsize=8, color=INK,
            fontweight="normal" if self.dial else "bold",
        )  # fmt: skip


def _line(scales: Sequence[_Scale], trial: Trial) -> list[tuple[float, float]]:
    """The trial's way through the axes (axis, height)."""
    heights: list[float] = []
    objectives = iter(trial.values)
    for scale in scales:
        if scale.dial is None:
            heights.append(scale.height(next(objectives)))
        else:
            heights.append(scale.height(_place(scale.dial, trial)) if scale.dial.name in trial.params else _ABSENT)
    return list(enumerate(heights))


def _place(dial: Dial, trial: Trial) -> float:
    """Where a trial stands on the dial's axis; equal choices are spread a little, the same way in every picture."""
    value = trial.params[dial.name]
    if dial.choices:
        # The golden ratio's multiples fill an interval evenly, however many there are.
        return list(dial.choices).index(value) + 0.44 * ((trial.number * 0.6180339887) % 1 - 0.5)
    return dial.place(value)


def _limits(dial: Dial) -> tuple[float, float]:
    """Ends of a number's axis, decades where it is a log scale."""
    low, high = dial.place(dial.low), dial.place(dial.high)
    if high <= low:
        room = 0.5 if dial.log else 0.1 * abs(low) or 0.5
        low, high = low - room, high + room
    return low, high


def _number_ticks(low: float, high: float, log: bool, whole: bool) -> list[tuple[float, str]]:
    """Places on an axis from `low` to `high` and their labels; both are decades where `log`."""
    if log:
        found = LogLocator(subs=(1.0,) if high - low > 2 else (1.0, 2.0, 5.0), numticks=9).tick_values(
            10**low, 10**high
        )
        marks = [(float(np.log10(value)), f"{value:g}") for value in found]
    else:
        found = MaxNLocator(5, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high)
        marks = [(float(value), f"{value:.6g}") for value in found]
    room = 1e-9 * max(1.0, abs(low), abs(high))
    return [(value, text) for value, text in marks if low - room <= value <= high + room]


def _x_axis(axes: Axes, dial: Dial, having: Sequence[Trial], objective: int) -> None:
    axes.set_xlabel(plain(_wrapped(dial.name, 26)))
    if not dial.choices:
        low, high = _limits(dial)
        room = 0.04 * (high - low)
        axes.set_xlim(low - room, high + room)
        marks = _number_ticks(low, high, dial.log, dial.whole)
        axes.set_xticks([value for value, _ in marks], [text for _, text in marks])
        return
    axes.set_xlim(-0.5, len(dial.choices) - 0.5)
    axes.grid(False, axis="x")
    tilted = max(len(name) for name in dial.choices) * len(dial.choices) > 26
    axes.set_xticks(
        range(len(dial.choices)),
        [plain(shortened(name, 16)) for name in dial.choices],
        rotation=30 if tilted else 0,
        ha="right" if tilted else "center",
        rotation_mode="anchor",
    )
    for place, name in enumerate(dial.choices):
        values = [trial.values[objective] for trial in having if trial.values and trial.params[dial.name] == name]
        if values:
            axes.plot([place - 0.34, place + 0.34], [np.median(values)] * 2, color=INK, lw=1.4, zorder=2)


def _wrapped(name: str, characters: int) -> str:
    """A dotted key on two lines where it is long, broken at a dot if there is one."""
    if len(name) <= characters:
        return name
    section, dot, key = name.rpartition(".")
    if dot and len(section) < 2 * characters:
        return f"{section}.\n{shortened(key, 2 * characters)}"
    return textwrap.fill(shortened(name, 3 * characters), characters)
