"""The problems of a data set on disk, as they are found: memory does not grow with their number."""

from __future__ import annotations

import csv
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TextIO

from earthprior.chips.problems import Problem, Tally
from earthprior.errors import EarthPriorError
from earthprior.files import replacing

COLUMNS = ("severity", "file", "line", "what", "fix")
PARTIAL = ".partial"


class ProblemLog:
    """A CSV of problems; used as a context.

    While chips are read, each problem goes to `path` + ".partial" at once, where it stays if the program is killed or
    interrupted. `close` makes the CSV itself of it, errors first.

    Args:
        path: The CSV.

    Raises:
        EarthPriorError: Another process is writing it.

    Attributes:
        tally: The problems so far, for the screen.
        bad_chips: Chips that cannot be used so far.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.partial_path = path, path.with_name(path.name + PARTIAL)
        self.tally = Tally()
        self.bad_chips = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = _sole(self.partial_path)
        self._writer = csv.writer(self._handle, lineterminator="\n")
        self._writer.writerow((*COLUMNS, "skippable"))

    def __enter__(self) -> ProblemLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Once closed, the name is free for another process.
        if not self._handle.closed and not self.tally.errors + self.tally.warnings:
            self.partial_path.unlink(missing_ok=True)
        self._handle.close()

    def add(self, problem: Problem) -> None:
        """Write one down."""
        self.tally.add(problem)
        self.bad_chips += problem.skippable
        row = (problem.severity, problem.file, problem.line or "", problem.what, problem.fix)
        self._writer.writerow((*row, "yes" * problem.skippable))

    def extend(self, problems: Iterable[Problem]) -> None:
        """Write several down."""
        for problem in problems:
            self.add(problem)

    def close(self, skip: bool = False) -> list[int]:
        """Write the CSV, whole or not at all.

        Args:
            skip: Chips that cannot be used are left out, which is a warning, not an error.

        Returns:
            The catalog lines of the chips that are left out, ascending.
        """
        self._handle.flush()
        skipped: set[int] = set()
        with replacing(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerow(COLUMNS)
            for wanted in ("error", "warning"):
                for severity, file, line, what, fix, skippable in self._found():
                    left_out = skip and bool(skippable)
                    if ("warning" if left_out else severity) == wanted:
                        told = f"skipped: {what}" if left_out else what
                        writer.writerow((wanted, _as_text(file), line, told, fix))
                    if left_out:
                        skipped.add(int(line))
        self.partial_path.unlink()
        self._handle.close()
        if skip:
            self.tally = self.tally.skipping()
        return sorted(skipped)

    def _found(self) -> Iterator[list[str]]:
        with self.partial_path.open(encoding="utf-8", newline="") as handle:
            rows = csv.reader(handle)
            next(rows)
            yield from rows


def _sole(path: Path) -> TextIO:
    """An empty file that this process alone writes, until it closes it or ends.

    Raises:
        EarthPriorError: Another process does.
    """
    while True:
        handle = path.open("a", encoding="utf-8", newline="", buffering=1)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise EarthPriorError(
                f"{path.name} in {path.parent} is being written by another process, an `earthprior check` or the stage "
                "stats: wait for that, or name another file with `earthprior check --out`"
            ) from None
        # Not one that its writer has deleted between these two lines.
        if os.fstat(handle.fileno()).st_nlink:
            handle.truncate(0)
            return handle
        handle.close()


def _as_text(cell: str) -> str:
    """A file's name as spreadsheets show it, and not as the formula that it may look like."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell
