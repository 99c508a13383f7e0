"""What has to be remembered of all chips, to find copies and shared ground among them: on disk, not in memory.

A catalog may have ten million rows. The ledger is a private SQLite database in the folder for temporary files (TMPDIR),
which vanishes with the process however that ends; what it keeps in memory is a page cache of fixed size.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from earthprior.chips.georeference import TOLERANCE, Bounds, Ground
from earthprior.errors import StorageError

CACHE_KB = 4 * 1024
AT_ONCE = 1000
"""Rows handed to SQLite together."""

# A path never holds it, see catalog.path_fault.
_BETWEEN = "\n"

_TABLES = """
CREATE TABLE row (line INTEGER PRIMARY KEY, usage INTEGER, images TEXT);
CREATE TABLE content (line INTEGER PRIMARY KEY, digest BLOB);
CREATE TABLE likeness (line INTEGER PRIMARY KEY, z BLOB);
"""
_INSERT = {
    "row": "INSERT INTO row VALUES (?, ?, ?)",
    "content": "INSERT INTO content VALUES (?, ?)",
    "likeness": "INSERT INTO likeness VALUES (?, ?)",
}
_REPEATED_ROWS = """
SELECT again.images, again.line, again.usage, first.line, first.usage FROM
  (SELECT images, MIN(line) AS line FROM row GROUP BY images HAVING COUNT(*) > 1) AS many
  JOIN row AS first ON first.line = many.line
  JOIN row AS again ON again.images = many.images AND again.line > many.line
ORDER BY again.line
"""
_SAME_CONTENT = """
SELECT again_row.images, again.line, again_row.usage, first.line, first.usage, first.images FROM
  (SELECT digest, MIN(line) AS line FROM content GROUP BY digest HAVING COUNT(*) > 1) AS many
  JOIN row AS first ON first.line = many.line
  JOIN content AS again ON again.digest = many.digest AND again.line > many.line
  JOIN row AS again_row ON again_row.line = again.line
ORDER BY again.line
"""


@dataclass(frozen=True)
class Repetition:
    """A row that shows what an earlier one has shown.

    Attributes:
        images: Of the row.
        line: Of the row.
        usage: Of the row, as a number.
        first_line: Of the first row with the same.
        first_usage: Of that one.
        first_images: Of that one.
    """

    images: tuple[str, ...]
    line: int
    usage: int
    first_line: int
    first_usage: int
    first_images: tuple[str, ...]


class Ledger:
    """Rows, contents and places of chips.

    Raises:
        StorageError: (by every method) The folder for temporary files is full.
    """

    def __init__(self) -> None:
        with _storage():
            # An empty name is a temporary file that SQLite unlinks as soon as it has opened it.
            self._database = sqlite3.connect("", isolation_level=None)
            for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_KB}", "temp_store = FILE"):
                self._database.execute(f"PRAGMA {pragma}")
            self._database.executescript(_TABLES)
            self._ground = Ground(self._database, -TOLERANCE)
        self._waiting: dict[str, list[tuple[Any, ...]]] = {table: [] for table in _INSERT}

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.close()

    def add_row(self, line: int, usage: int, images: Sequence[str]) -> None:
        """A row of the catalog."""
        self._add("row", (line, usage, _BETWEEN.join(images)))

    def add_content(self, line: int, digest: bytes) -> None:
        """What the chip of a row shows."""
        self._add("content", (line, digest))

    def add_likeness(self, line: int, z: NDArray[np.float32]) -> None:
        """How alike the bands of a row's chip are, see `band_order.likeness`."""
        self._add("likeness", (line, z.tobytes()))

    def add_place(self, line: int, usage: int, crs: str, bounds: Bounds) -> None:
        """Where the chip of a row lies."""
        with _storage():
            self._ground.add(line, usage, crs, bounds)

    def repeated_rows(self) -> Iterator[Repetition]:
        """Rows that name the images of an earlier row, in the catalog's order."""
        self._flush("row")
        with _storage():
            self._database.execute("CREATE INDEX IF NOT EXISTS row_images ON row (images)")
            for images, line, usage, first_line, first_usage in self._database.execute(_REPEATED_ROWS):
                names = tuple(images.split(_BETWEEN))
                yield Repetition(names, line, usage, first_line, first_usage, names)

    def same_content(self) -> Iterator[Repetition]:
        """Chips with the content of an earlier chip, in the catalog's order."""
        self._flush("content")
        with _storage():
            self._database.execute("CREATE INDEX IF NOT EXISTS content_digest ON content (digest)")
            for images, line, usage, first_line, first_usage, first in self._database.execute(_SAME_CONTENT):
                names, first_names = (tuple(text.split(_BETWEEN)) for text in (images, first))
                yield Repetition(names, line, usage, first_line, first_usage, first_names)

    def likenesses(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Line and likeness of each chip that has one, in the catalog's order."""
        self._flush("likeness")
        with _storage():
            for line, z in self._database.execute("SELECT line, z FROM likeness ORDER BY line"):
                yield line, np.frombuffer(z, np.float32)

    def overlapping(self) -> int:
        """Pairs of chips of different splits that share ground; to be called once, before `partners`."""
        with _storage():
            return self._ground.overlapping()

    def partners(self) -> Iterator[tuple[int, int, list[int]]]:
        """Line of a chip that shares ground with chips of earlier splits, how many these are, and the first lines."""
        with _storage():
            yield from self._ground.partners()

    def row(self, line: int) -> tuple[int, tuple[str, ...]]:
        """Usage and images of the row at a line."""
        with _storage():
            found = self._database.execute("SELECT usage, images FROM row WHERE line = ?", (line,))
            usage, images = found.fetchone()
        return usage, tuple(images.split(_BETWEEN))

    def _add(self, table: str, values: tuple[Any, ...]) -> None:
        waiting = self._waiting[table]
        waiting.append(values)
        if len(waiting) >= AT_ONCE:
            self._flush(table)

    def _flush(self, table: str) -> None:
        waiting = self._waiting[table]
        if waiting:
            with _storage():
                self._database.executemany(_INSERT[table], waiting)
            waiting.clear()


@contextmanager
def _storage() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(
            f"the list of chips seen so far could not be kept on disk ({error}); free some space in the folder for "
            "temporary files, or name another one: SQLITE_TMPDIR=/path TMPDIR=/path"
        ) from error
