"""What is wrong with the data, as records: one table on the screen, one CSV, one exception."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from earthprior.errors import DataError

SHOWN = 20
"""Problems listed on the screen; the CSV holds them all."""


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
    """

    severity: Literal["error", "warning"]
    file: str
    line: int
    what: str
    fix: str
    skippable: bool = False

    def __str__(self) -> str:
        place = f"{self.file} (catalog line {self.line})" if self.line else self.file
        return f"{place}: {self.what}. {self.fix}"


class ChipError(DataError):
    """One chip cannot be used.

    Args:
        problem: Names the file, the catalog line, the reason and the remedy.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def chip_error(file: str, line: int, what: str, fix: str) -> ChipError:
    """The error for a chip that is missing, damaged, or not as params.yaml says."""
    return ChipError(Problem("error", file, line, what, fix, skippable=True))


def data_error(headline: str, problems: Sequence[Problem]) -> DataError:
    """One exception that tells all errors (the first `SHOWN` in words)."""
    errors = [problem for problem in problems if problem.severity == "error"]
    lines = [f"  {problem}" for problem in errors[:SHOWN]]
    if len(errors) > SHOWN:
        lines.append(f"  ... and {len(errors) - SHOWN} more")
    return DataError("\n".join([headline, *lines]))


def some(names: Iterable[object], shown: int = 3) -> str:
    """The first few of a list in words: "a, b, c and 4 more"."""
    listed = [str(name) for name in names]
    rest = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + rest
