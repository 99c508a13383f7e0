"""What a bench fits, and in which order: seed by seed, small budgets first, so that one stopped early is of use.

Every method has one dial: the learning rate of a network, the penalty of a classifier on pixels. All are turned by one
procedure: each value of the list is tried with the chips of a budget and judged on chips held out of the train split;
the best one is what the judged fits of that method and budget use. Which chips are judged in the end decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from earthprior.params.bench import BenchParams

TUNING, JUDGED = "tuning", "judged"
TUNING_SEED = 0
"""One draw for all: which values are tried must not depend on which seeds are asked for."""


@dataclass(frozen=True)
class Method:
    """How labels become maps.

    Args:
        title: For the eye.
        dial: Which list of `bench` is tried, and which column of the table holds it.
        chance: Whether the seed does more than draw the chips.
    """

    title: str
    dial: Literal["lr", "l2"]
    chance: bool = True


METHODS: dict[str, Method] = {
    "finetune": Method("pretrained, all of it trained on", "lr"),
    "scratch": Method("the same network from scratch", "lr"),
    "probe": Method("pretrained and frozen, a linear classifier", "l2", chance=False),
    "untrained": Method("untrained and frozen, a linear classifier", "l2"),
    "context": Method("no network: pixels with local context, linear", "l2", chance=False),
    "context_mlp": Method("no network: pixels with local context, small MLP", "l2"),
}
"""In the order of reports, and of the fits of one budget."""


@dataclass(frozen=True)
class Fit:
    """One fit of a bench.

    Args:
        purpose: `TUNING`, where `value` is tried, or `JUDGED`.
        method: A name in `METHODS`.
        budget: How many chips are labelled; None means all.
        seed: Of the draw of chips and of the training.
        value: Of the method's dial where it is tried; None where the best one is to be used.
    """

    purpose: str
    method: str
    budget: int | None
    seed: int
    value: float | None = None

    @property
    def shown(self) -> str:
        """For a line of progress."""
        dial = f", {METHODS[self.method].dial} {self.value:g} tried" if self.value is not None else ""
        return f"{self.method}, {budget_text(self.budget)} labels, seed {self.seed}{dial}"


def budget_text(budget: int | None) -> str:
    """As params.yaml spells it."""
    return "all" if budget is None else str(budget)


def budgets(bench: BenchParams, available: int) -> list[int | None]:
    """In rising order; those of as many chips as there are, or more, are all the same one.

    Args:
        bench: The section.
        available: Labelled chips.
    """
    numbers = sorted(budget for budget in bench.budgets if isinstance(budget, int) and budget < available)
    return [*numbers, None] if len(numbers) < len(bench.budgets) else list(numbers)


def plan(bench: BenchParams, available: int) -> list[Fit]:
    """All fits in their order, each after those that choose its dial.

    Args:
        bench: The section.
        available: Labelled chips to draw from.
    """
    found: dict[Fit, None] = {}
    for seed in bench.seeds:
        for budget in budgets(bench, available):
            for method in METHODS:
                # With all labels there is one draw, and some fits have one solution.
                same = budget is None and seed != bench.seeds[0] and not METHODS[method].chance
                if method in bench.methods and not same:
                    fit = Fit(JUDGED, method, budget, seed)
                    found |= dict.fromkeys([*trials(fit, bench, available), fit])
    return list(found)


def trials(fit: Fit, bench: BenchParams, available: int) -> list[Fit]:
    """The fits that choose the dial of a judged one: the same for all seeds, and none where there is no choice."""
    values: Sequence[float] = getattr(bench, METHODS[fit.method].dial)
    if len(values) == 1:
        return []
    few = bench.tuning_labels
    budget = fit.budget if few is None else few if few < available else None
    return [Fit(TUNING, fit.method, budget, TUNING_SEED, value) for value in sorted(values)]


def chosen(fit: Fit, bench: BenchParams, available: int, scores: Mapping[Fit, float]) -> float | None:
    """The dial's value for a judged fit: the best one tried, of equals the smallest; None before all are tried.

    Args:
        fit: A judged one.
        bench: The section.
        available: Labelled chips to draw from.
        scores: The headline score of each fit that is done, NaN where there is none.
    """
    tried = trials(fit, bench, available)
    if not tried:
        return float(getattr(bench, METHODS[fit.method].dial)[0])
    if any(trial not in scores for trial in tried):
        return None
    return max(tried, key=lambda trial: (_or_worst(scores[trial]), -float(trial.value or 0))).value


def at_the_edge(bench: BenchParams, method: str, value: float) -> bool:
    """Whether a chosen value is the least or the greatest of three or more that were tried: a better may lie beyond."""
    values = sorted(getattr(bench, METHODS[method].dial))
    return len(values) > 2 and value in (values[0], values[-1])


def ready(fits: Sequence[Fit], bench: BenchParams, available: int, scores: Mapping[Fit, float]) -> Iterator[Fit]:
    """Those that are not done and could be, in their order.

    Args:
        fits: Of `plan`.
        bench: The section.
        available: Labelled chips to draw from.
        scores: Of the fits that are done.
    """
    for fit in fits:
        if fit not in scores and (fit.purpose == TUNING or chosen(fit, bench, available, scores) is not None):
            yield fit


def _or_worst(score: float) -> float:
    return score if score == score else -float("inf")
