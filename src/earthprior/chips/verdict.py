"""What follows from a survey: which chips are left out, whether training is possible, and what a person is told."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from earthprior.chips.census import Census
from earthprior.chips.content import NOT_FOUND, under_dvc
from earthprior.chips.problem_log import ProblemLog
from earthprior.chips.problems import Problem, some
from earthprior.chips.survey import Survey
from earthprior.errors import DataError
from earthprior.params import DataParams

LINE_EVERY_SECONDS = 15.0
FIRST_LINE_SECONDS = 2.0
"""When speed and time left can be told first."""


def conclude(data: DataParams, found: Survey, log: ProblemLog) -> list[int]:
    """Judge the data as a whole, and close the log.

    With `on_bad_chip: skip`, chips that cannot be used become warnings, up to the share that params allow.

    Returns:
        The lines of the chips that are left out, ascending.
    """
    name = found.catalog.path.name
    rows, bad = found.rows.total(), log.bad_chips
    skip = data.on_bad_chip == "skip" and bad > 0
    if skip and bad / rows > data.max_bad_fraction:
        skip = False
        what = (
            f"{bad} of {rows} chips cannot be used ({bad / rows:.1%}), more than data.max_bad_fraction "
            f"({data.max_bad_fraction:.1%}) lets skip"
        )
        log.add(Problem("error", name, 0, what, "Mend the chips, or raise it"))
    log.extend(_training_impossible(name, found))
    return log.close(skip)


def _training_impossible(name: str, found: Survey) -> Iterator[Problem]:
    """What makes training impossible though every chip is sound."""
    for usage in ("train", "validate"):
        if found.rows[usage] and not found.chips[usage]:
            yield Problem("error", name, 0, f"no {usage} chip can be used", "Mend the chips")
    if not found.chips["train"]:
        return
    for usage in ("train", "validate"):
        if found.chips[usage] and not found.with_pixels[usage]:
            yield Problem("error", name, 0, f"no {usage} chip has a valid pixel", "Check data.nodata")


def tell(found: Survey, log: ProblemLog, where: str) -> None:
    """Show the warnings, and raise if there are errors.

    Args:
        found: The survey.
        log: Closed.
        where: What to call the log's file.

    Raises:
        DataError: With the errors.
    """
    tally, chips = log.tally, found.rows.total()
    if tally.warnings:
        print(f"{counted(tally.warnings, 'warning')} (all are in {where}):", file=sys.stderr)
        print("\n".join(tally.lines("warning", chips)), file=sys.stderr)
    if tally.errors:
        headline = f"{counted(tally.errors, 'error')} in the data (all are in {where})."
        hint = _missing_hint(tally.count(NOT_FOUND), chips, found.catalog.dir)
        raise DataError("\n".join([headline + hint, *tally.lines("error", chips)]))


def _missing_hint(missing: int, chips: int, folder: Path) -> str:
    if missing < 2:
        return ""
    there = "is the data there (dvc pull)" if under_dvc(folder) else "is the data there"
    asked = f"{there}, is its disk mounted, and are the paths relative to"
    if missing == chips:
        return f" Not one chip was found: {asked} {folder.name}/?"
    return f" {missing:,} of {chips:,} chips were not found: {asked} {folder.name}/?"


def counted(count: int, word: str) -> str:
    """1 chip, 2,000 chips."""
    return f"{count:,} {word}{'s' * (count != 1)}"


def reading_progress(name: str, readers: int, log: ProblemLog) -> Callable[[Iterable[Any], Census], Iterator[Any]]:
    """Wraps the chips of a survey: first what is to come, then a bar on a terminal or a line now and then elsewhere."""

    def progress(chips: Iterable[Any], census: Census) -> Iterator[Any]:
        total = census.rows.total()
        size = f"{census.size_bytes / 1e9:,.1f} GB" if census.size_bytes > 1e8 else f"{census.size_bytes / 1e6:,.1f} MB"
        _say(f"{name}: {counted(total, 'chip')}, {size}, read by {counted(readers, 'thread')}")
        if census.missing:
            lines = some(census.first_missing, shown=3) + (", ..." if census.missing > 3 else "")
            lines = f"line{'s' * (census.missing > 1)} {lines}"
            _say(f"{name}: {census.missing:,} of {total:,} chips not there (catalog {lines})")
        began = last = time.monotonic()
        wait = FIRST_LINE_SECONDS
        with tqdm(chips, name, total, unit=" chips", file=sys.stderr, disable=None, mininterval=0.5) as bar:
            for done, chip in enumerate(bar, 1):
                yield chip
                now = time.monotonic()
                if now - last < wait or done == total:
                    continue
                last, wait = now, LINE_EVERY_SECONDS
                found = f"{counted(log.tally.errors, 'error')}, {counted(log.tally.warnings, 'warning')}"
                bar.set_postfix_str(found, refresh=False)
                if bar.disable:
                    speed = done / (now - began)
                    left = (total - done) / speed
                    _say(f"{name}: {done:,} of {total:,} chips, {speed:,.0f}/s, {time_told(left)} left; {found} so far")

    return progress


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def time_told(seconds: float) -> str:
    """For the eye: 40 s, 3 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
