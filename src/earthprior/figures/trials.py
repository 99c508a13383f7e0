"""Trials and searched dials as plain records, and what pictures and tables of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

STATES = ("finished", "pruned", "failed", "continued", "running", "waiting")
"""Of a trial; `continued` was interrupted, and a later trial goes on from it."""


@dataclass(frozen=True)
class Trial:
    """One trial of a study.

    Args:
        number: Its number.
        state: One of STATES.
        values: What it reached, one number per objective; none unless it has finished.
        params: Searched settings by dotted key, choices as their labels; a conditional one only where it acted.
        curve: The first objective after each epoch, finite numbers only.
    """

    number: int
    state: str
    values: Sequence[float] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    curve: Mapping[int, float] = field(default_factory=dict)

    def reached(self, objective: int = 0) -> float | None:
        """Its value, and for a pruned trial the last one reported; None where there is none."""
        if self.values:
            return self.values[objective]
        return self.curve[max(self.curve)] if self.state == "pruned" and self.curve and objective == 0 else None


@dataclass(frozen=True)
class Dial:
    """A searched key of params.yaml.

    Args:
        name: Dotted key.
        low: Least number searched.
        high: Greatest number searched.
        log: Whether it was searched on a log scale.
        whole: Whether it takes whole numbers only.
        choices: Labels of the choices, for a dial that is no number.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    whole: bool = False
    choices: Sequence[str] = ()

    def place(self, value: float) -> float:
        """Where a number stands on the dial's scale: its decimal logarithm on a log scale."""
        return float(np.log10(value)) if self.log else float(value)


def shown_from(values: Sequence[float]) -> float:
    """The least value that a picture shows: a trial that went to pieces must not flatten all others."""
    top, middle = max(values), float(np.median(values))
    # The distance from the middle to the top is what the good trials differ by; six times that below is far enough.
    lowest = middle - 6 * max(top - middle, 0.05 * abs(top), 1e-9)
    return min(value for value in values if value >= lowest)


def reached_values(trials: Sequence[Trial], objective: int) -> list[float]:
    """What the trials reached, of those that have a value."""
    return [value for trial in trials if (value := trial.reached(objective)) is not None]


def unit_apart(metric: str) -> tuple[str, str]:
    """An objective's name and its unit: "gain, dB" is gain in dB."""
    name, _, unit = metric.partition(", ")
    return name, unit


def shortened(text: str, characters: int) -> str:
    """Text cut to so many characters, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= characters else f"{text[: characters - 3]}..."
