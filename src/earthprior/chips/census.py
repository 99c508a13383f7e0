"""What a catalog promises: everything that can be told of it before a chip is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from earthprior.chips.catalog import USAGES, CatalogFile, ChipRow, empty_splits, repeated
from earthprior.chips.ledger import Ledger
from earthprior.chips.problem_log import ProblemLog
from earthprior.chips.readers import ordered_map

STAT_AT_ONCE = 256
"""Rows whose files are looked for by one task."""


@dataclass(frozen=True)
class Census:
    """What the catalog promises, before any chip is read.

    Attributes:
        rows: Per split.
        missing: Rows whose files are not all there.
        first_missing: Lines of the first ones.
        size_bytes: Of the files.
    """

    rows: Counter[str]
    missing: int
    first_missing: tuple[int, ...]
    size_bytes: int


def check_rows(catalog: CatalogFile, ledger: Ledger, log: ProblemLog, readers: int) -> Census:
    """Check the rows, note them in the ledger, and look which files are there: at once, not after hours of reading."""
    rows: Counter[str] = Counter()

    def sound() -> Iterator[ChipRow]:
        for row, problems in catalog.rows():
            log.extend(problems)
            if row:
                rows[row.usage] += 1
                ledger.add_row(row.line, USAGES.index(row.usage), row.images)
                yield row

    missing, size_bytes = 0, 0
    lines: list[int] = []
    batches = _batches(sound(), STAT_AT_ONCE)
    looked = ordered_map(lambda batch: _sizes(catalog.dir, batch), batches, lambda batch: batch[0].images[0], readers)
    for gone, total in looked:
        missing += len(gone)
        lines += gone[: max(0, 3 - len(lines))]
        size_bytes += total
    log.extend(repeated(ledger))
    if rows or not log.tally.errors:
        log.extend(empty_splits(catalog.path.name, rows))
    return Census(rows, missing, tuple(lines), size_bytes)


def _batches(rows: Iterable[ChipRow], length: int) -> Iterator[list[ChipRow]]:
    batch: list[ChipRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) == length:
            yield batch
            batch = []
    if batch:
        yield batch


def _sizes(folder: Path, rows: Iterable[ChipRow]) -> tuple[list[int], int]:
    """Lines of the rows with files that are not there, and the bytes of the others."""
    gone, total = [], 0
    for row in rows:
        try:
            total += sum((folder / image).stat().st_size for image in row.images)
        except (FileNotFoundError, NotADirectoryError):
            gone.append(row.line)
        except OSError:
            # Whatever else is wrong with it will be told when it is read.
            continue
    return gone, total
