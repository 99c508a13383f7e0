"""bench.csv: a row per fit, appended when it is done; what is in it is never fitted again.

The file is replaced as a whole under a lock: it is small, several processes may write, and a kill leaves it as it was.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from earthprior.bench.plan import METHODS, TUNING, Fit, budget_text
from earthprior.errors import EarthPriorError
from earthprior.files import write_atomic
from earthprior.scoring import Score

COLUMNS = ("purpose", "method", "budget", "labels", "seed", "lr", "l2", "steps", "judged_chips")
LAST_COLUMNS = ("seconds", "cpu_seconds", "code", "bench")


@dataclass(frozen=True)
class Row:
    """A fit that is done.

    Args:
        fit: Which.
        value: Of the method's dial.
        labels: How many chips were labelled.
        steps: Optimizer steps; None without a network to train.
        judged_chips: How many chips it was judged on.
        scores: By name.
        seconds: That it took, with its judging.
        cpu_seconds: That the processor was busy with it, over all threads.
        code: Digest of the code that fitted it.
    """

    fit: Fit
    value: float
    labels: int
    steps: int | None
    judged_chips: int
    scores: Mapping[str, Score]
    seconds: float
    cpu_seconds: float
    code: str


class Table:
    """The rows of one bench.

    Args:
        path: The CSV file; it need not be there.
        bench: What the bench is made of, its fingerprint; rows of another one are refused.
        metrics: Names of the scores, the headline first.
    """

    def __init__(self, path: Path, bench: str, metrics: Sequence[str]) -> None:
        self.path, self._bench, self._metrics = path, bench, tuple(metrics)
        scores = [f"{name}{end}" for name in metrics for end in ("", "_low", "_high")]
        self.columns = (*COLUMNS, *scores, *LAST_COLUMNS)
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))

    def rows(self) -> list[Row]:
        """All rows, in the order in which they were done.

        Raises:
            EarthPriorError: The file is not of this bench, or damaged.
        """
        if not self.path.is_file():
            return []
        try:
            lines = list(csv.reader(io.StringIO(self.path.read_text(encoding="utf-8")), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise self._refused(f"is no CSV ({error})") from None
        if not lines or tuple(lines[0]) != self.columns:
            raise self._refused("has other columns than this bench writes")
        return [self._row(number, cells) for number, cells in enumerate(lines[1:], 2)]

    def scores(self) -> dict[Fit, float]:
        """The headline score of each fit that is done; NaN where there is none."""
        return {row.fit: row.scores[self._metrics[0]].value for row in self.rows()}

    def append(self, row: Row) -> bool:
        """Write a row, unless its fit is there already; whether it was written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            known = self.rows()
            if row.fit in {other.fit for other in known}:
                return False
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerows([self.columns, *(self._cells(one) for one in [*known, row])])
            write_atomic(self.path, text.getvalue())
            return True

    def _cells(self, row: Row) -> list[str]:
        fit, dial = row.fit, METHODS[row.fit.method].dial
        ends = [getattr(row.scores[name], end) for name in self._metrics for end in ("value", "low", "high")]
        return [
            fit.purpose, fit.method, budget_text(fit.budget), str(row.labels), str(fit.seed),
            *(repr(row.value) if dial == name else "" for name in ("lr", "l2")),
            "" if row.steps is None else str(row.steps), str(row.judged_chips),
            *("" if end != end else repr(float(end)) for end in ends),
            f"{row.seconds:.1f}", f"{row.cpu_seconds:.1f}", row.code, self._bench,
        ]  # fmt: skip

    def _row(self, number: int, cells: Sequence[str]) -> Row:
        if len(cells) != len(self.columns):
            raise self._refused(f"has {len(cells)} cells instead of {len(self.columns)} in line {number}")
        cell = dict(zip(self.columns, cells, strict=True))
        if cell["bench"] != self._bench:
            raise self._refused(f"holds rows of another bench ({cell['bench'][:12]!r}, line {number})")
        try:
            value = float(cell[METHODS[cell["method"]].dial])
            return Row(
                Fit(
                    cell["purpose"], cell["method"], None if cell["budget"] == "all" else int(cell["budget"]),
                    int(cell["seed"]), value if cell["purpose"] == TUNING else None,
                ),
                value, int(cell["labels"]), int(cell["steps"]) if cell["steps"] else None, int(cell["judged_chips"]),
                {name: Score(*(_number(cell, name + end) for end in ("", "_low", "_high"))) for name in self._metrics},
                float(cell["seconds"]), float(cell["cpu_seconds"]), cell["code"],
            )  # fmt: skip
        except (KeyError, ValueError) as error:
            raise self._refused(f"cannot be read in line {number} ({error})") from None

    def _refused(self, what: str) -> EarthPriorError:
        return EarthPriorError(f"{self.path.name} {what}; move it away, and the bench begins anew: {self.path}")


def _number(cell: Mapping[str, Any], name: str) -> float:
    return float(cell[name]) if cell[name] else float("nan")
