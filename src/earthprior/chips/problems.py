"""What is wrong with the data, as records: one table on the screen, one CSV, one exception."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from earthprior.errors import DataError

Severity = Literal["error", "warning"]

SHOWN = 20
"""Kinds of problems listed on the screen; the CSV holds every problem."""

SHOWN_OF_A_KIND = 3

MOST_KINDS = 500
"""Kinds told apart, so that memory is bounded; what comes later is counted only."""


@dataclass(frozen=True)
class Problem:
    """One fault of the data.

    Attributes:
        severity: An error stops the pipeline, a warning does not.
        file: The chip or catalog, as written in the catalog.
        line: Line of the catalog file (header = 1), 0 where no single line is to blame.
        what: What was found, and what was expected.
        fix: What the user can do.
        skippable: True where `data.on_bad_chip: skip` may leave the chip out instead.
        kind: What it has in common with others whose `what` is another; "" where that is `what` itself.
    """

    severity: Severity
    file: str
    line: int
    what: str
    fix: str
    skippable: bool = False
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.what}. {self.fix}"

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.file} (catalog line {self.line})" if self.line else self.file

    def skipped(self) -> Problem:
        """As it is told where the chip is left out."""
        return replace(self, severity="warning", what=f"skipped: {self.what}")


class ChipError(DataError):
    """One chip cannot be used.

    Args:
        problem: Names the file, the catalog line, the reason and the remedy.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def chip_error(file: str, line: int, what: str, fix: str, kind: str = "") -> ChipError:
    """The error for a chip that is missing, damaged, or not as params.yaml says."""
    return ChipError(Problem("error", file, line, what, fix, skippable=True, kind=kind))


@dataclass
class _Kind:
    """Problems of one kind: how many, and the first few."""

    alike: bool = True
    count: int = 0
    first: list[Problem] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        self.count += 1
        self.alike &= not self.first or problem.what == self.first[0].what
        if len(self.first) < SHOWN_OF_A_KIND:
            self.first.append(problem)

    def lines(self, chips: int | None) -> list[str]:
        first = self.first[0]
        rest = self.count - len(self.first)
        if self.count == 1 or (not self.alike and not rest):
            return [f"  {problem}" for problem in self.first]
        many = f"{self.count:,} of {chips:,} chips" if chips and first.skippable else f"{self.count:,} times"
        if self.alike:
            names = ", ".join(problem.place for problem in self.first) + (f" and {rest:,} more" if rest else "")
            return [f"  {many}: {first.what}. {first.fix}", f"    {names}"]
        return [
            f"  {many}: {first.kind}",
            *(f"    {problem}" for problem in self.first),
            f"    ... and {rest:,} more",
        ]


class Tally:
    """Problems counted and grouped for the screen: thousands of chips with one fault are one line.

    Memory does not grow with their number.
    """

    def __init__(self, problems: Iterable[Problem] = ()) -> None:
        self._kinds: dict[tuple[Severity, bool, str], _Kind] = {}
        self._counts = {"error": 0, "warning": 0}
        self._skippable = 0
        for problem in problems:
            self.add(problem)

    @property
    def errors(self) -> int:
        """How many so far."""
        return self._counts["error"]

    @property
    def warnings(self) -> int:
        """How many so far."""
        return self._counts["warning"]

    def add(self, problem: Problem) -> None:
        """Count one."""
        self._counts[problem.severity] += 1
        self._skippable += problem.skippable
        key = (problem.severity, problem.skippable, problem.kind or problem.what)
        if key in self._kinds or len(self._kinds) < MOST_KINDS:
            self._kinds.setdefault(key, _Kind()).add(problem)

    def count(self, kind: str) -> int:
        """How many of a kind."""
        return sum(found.count for (_, _, name), found in self._kinds.items() if name == kind)

    def skipping(self) -> Tally:
        """The tally where chips that cannot be used are left out."""
        told = Tally()
        for (severity, skippable, kind), found in self._kinds.items():
            first = [problem.skipped() if skippable else problem for problem in found.first]
            key: tuple[Severity, bool, str] = ("warning" if skippable else severity, skippable, kind)
            told._kinds[key] = _Kind(found.alike, found.count, first)
        bad = self._skippable
        told._counts = {"error": self.errors - bad, "warning": self.warnings + bad}
        return told

    def lines(self, severity: Severity, chips: int | None = None) -> list[str]:
        """The first `SHOWN` kinds, in the order they were met; `chips` is how many there are in all."""
        kinds = [found for (found_severity, _, _), found in self._kinds.items() if found_severity == severity]
        lines = [line for found in kinds[:SHOWN] for line in found.lines(chips)]
        rest = self._counts[severity] - sum(found.count for found in kinds[:SHOWN])
        return [*lines, f"  ... and {rest:,} more"] if rest else lines


def data_error(headline: str, problems: Sequence[Problem]) -> DataError:
    """One exception that tells all errors."""
    return DataError("\n".join([headline, *Tally(problems).lines("error")]))


def some(names: Iterable[object], shown: int = 3) -> str:
    """The first few of a list in words: "a, b, c and 4 more"."""
    listed = [str(name) for name in names]
    rest = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + rest
