"""What the rows of a bench say: curves over labelled chips, and how many labels pretraining saves."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from earthprior.bench.plan import JUDGED, METHODS, Fit
from earthprior.bench.table import Row

PRETRAINED, SCRATCH = "finetune", "scratch"
ASKED = 16
"""Labelled chips that the headline asks about, where there is such a budget."""


@dataclass(frozen=True)
class Point:
    """One method at one budget.

    Args:
        method: A name in `METHODS`.
        budget: None means all.
        labels: How many chips that was.
        values: The score by seed.
        low: The lower end of the interval over judged chips, averaged over seeds; NaN where one has none.
        high: The upper end.
        dials: The values of the method's dial.
        seconds: That a fit took, on average.
    """

    method: str
    budget: int | None
    labels: int
    values: dict[int, float]
    low: float
    high: float
    dials: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float:
        """Over seeds."""
        return math.fsum(self.values.values()) / len(self.values)


@dataclass(frozen=True)
class Answer:
    """How many labels training from scratch needs for what the pretrained network reaches with some.

    Args:
        pretrained: The point that is to be reached.
        needed: Labelled chips, between budgets on a straight line over log2; None where no budget reaches it.
        at_least: Whether the smallest budget reaches it already, so that fewer may do.
        most: The most that were tried from scratch.
    """

    pretrained: Point
    needed: float | None
    at_least: bool
    most: int


@dataclass(frozen=True)
class Difference:
    """Pretrained with few labels beside scratch with more, seed by seed.

    Args:
        few: Labels of the pretrained network.
        more: Labels from scratch.
        values: Pretrained less scratch, of the seeds that both have.
    """

    few: int
    more: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return math.fsum(self.values) / len(self.values)


def points(rows: Sequence[Row], metric: str, fits: Collection[Fit]) -> list[Point]:
    """The judged fits of a plan, by method and budget, in the order of `METHODS` and of labels.

    Args:
        rows: Of the table.
        metric: The score's name.
        fits: What counts; the table may hold more.
    """
    found: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        if row.fit.purpose == JUDGED and row.fit in fits and math.isfinite(row.scores[metric].value):
            found.setdefault((row.fit.method, row.fit.budget), []).append(row)
    made = [_point(method, budget, group, metric) for (method, budget), group in found.items()]
    return sorted(made, key=lambda point: (list(METHODS).index(point.method), point.labels))


def _point(method: str, budget: int | None, group: Sequence[Row], metric: str) -> Point:
    rows = sorted(group, key=lambda row: row.fit.seed)
    scores, count = [row.scores[metric] for row in rows], len(rows)
    return Point(
        method, budget, rows[0].labels, {row.fit.seed: row.scores[metric].value for row in rows},
        math.fsum(score.low for score in scores) / count, math.fsum(score.high for score in scores) / count,
        tuple(dict.fromkeys(row.value for row in rows)), math.fsum(row.seconds for row in rows) / count,
    )  # fmt: skip


def answers(found: Sequence[Point], pretrained: str = PRETRAINED) -> list[Answer]:
    """For each budget of the pretrained network; none before both were asked.

    Of a bench that is not done, only seeds that all points of both have: draws differ more than methods do.
    """
    both = [point for point in found if point.method in (pretrained, SCRATCH)]
    seeds = set.intersection(*[set(point.values) for point in both]) if both else set()
    if seeds:
        both = [replace(p, values={seed: p.values[seed] for seed in sorted(seeds)}) for p in both]
    curve = [point for point in both if point.method == SCRATCH]
    if not curve:
        return []
    return [_answer(point, curve) for point in both if point.method == pretrained]


def headline(found: Sequence[Answer]) -> Answer | None:
    """The one about `ASKED` labels, or about the budget next to that."""
    return min(found, key=lambda one: abs(math.log2(one.pretrained.labels / ASKED)), default=None)


def _answer(point: Point, curve: Sequence[Point]) -> Answer:
    most = curve[-1].labels
    for place, there in enumerate(curve):
        if there.mean < point.mean:
            continue
        if place == 0:
            return Answer(point, there.labels, True, most)
        here = curve[place - 1]
        share = (point.mean - here.mean) / (there.mean - here.mean)
        return Answer(point, here.labels * (there.labels / here.labels) ** share, False, most)
    return Answer(point, None, False, most)


def differences(found: Sequence[Point]) -> list[Difference]:
    """Each budget of the pretrained network beside the same and the next one from scratch."""
    curve = [point for point in found if point.method == SCRATCH]
    made = []
    for point in (point for point in found if point.method == PRETRAINED):
        for other in [other for other in curve if other.labels >= point.labels][:2]:
            common = [seed for seed in point.values if seed in other.values]
            if common:
                values = tuple(point.values[seed] - other.values[seed] for seed in common)
                made.append(Difference(point.labels, other.labels, values))
    return made
