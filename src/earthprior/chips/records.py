"""The records of a CSV file, one at a time: whatever the file holds, memory stays small and a fault is named.

Python's csv module reads it, not pandas: it tells the line of every row and keeps ragged rows ragged, so that a fault
can be named instead of guessed at, and text stays text ("NA" is a fine place name, "007" a fine tile).
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from earthprior.errors import DataError

LONGEST_ROW = 2**20
"""Characters; a longer one is no catalog's row, but a forgotten quote or another kind of file."""

_CHUNK = 2**16


def records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every row that is not blank, the header first; lines count from 1.

    Raises:
        DataError: The file is missing, empty, not UTF-8, or no CSV.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{path.name} is no regular file. Write the catalog into one, and check data.catalog")
    try:
        # utf-8-sig: Excel writes a byte order mark, which would become part of the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as handle:
            yield from _rows(path.name, handle)
    except FileNotFoundError:
        raise DataError(_missing(path)) from None
    except UnicodeDecodeError:
        raise DataError(_not_utf8(path)) from None
    except OSError as error:
        why = f"{path.name} cannot be read: {error.strerror}"
        raise DataError(f"{why}. Check data.catalog and the file's mode") from None


def _rows(name: str, handle: TextIO) -> Iterator[tuple[int, list[str]]]:
    lines = _Lines(name, handle)
    reader = csv.reader(lines, strict=True)
    found = False
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                found = True
                yield lines.row_line, cells
            lines.row_ends()
    except csv.Error as error:
        raise DataError(f"{name} line {lines.row_line}: {error}. Check the quotes of this row") from None
    if not found:
        raise DataError(f"{name} is empty. Write one with: earthprior catalog DIR")


class _Lines:
    """A file's lines for csv.reader, which would itself take one of any length."""

    def __init__(self, name: str, handle: TextIO) -> None:
        self._name, self._handle = name, handle
        self.row_line, self._line, self._characters = 1, 0, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        text = self._handle.readline(LONGEST_ROW + 1)
        if not text:
            raise StopIteration
        self._line += 1
        self._characters += len(text)
        if self._characters > LONGEST_ROW:
            raise DataError(
                f"{self._name} line {self.row_line}: the row is longer than {LONGEST_ROW:,} characters. Check the "
                "quotes of this row, and that the file is a CSV with one chip per line"
            )
        return text

    def row_ends(self) -> None:
        """The next line begins a row."""
        self.row_line, self._characters = self._line + 1, 0


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return (
            f"the data folder {path.parent.name}/ does not exist. Fetch it (dvc pull), or set data.dir to the folder "
            "that holds your chips"
        )
    return f"{path.name} not found in {path.parent.name}/. Set data.catalog, or write one with: earthprior catalog DIR"


def _not_utf8(path: Path) -> str:
    """Where the text ends to be UTF-8; read once more, for the decoder tells only the place in its buffer."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    place, line = 0, 1
    with path.open("rb") as handle:
        begin = handle.read(2)
        if begin in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return f"{path.name} is UTF-16 text. Save it as CSV UTF-8"
        handle.seek(0)
        while chunk := handle.read(_CHUNK):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                place += error.start - pending
                line += chunk[: max(0, error.start - pending)].count(b"\n")
                break
            place += len(chunk)
            line += chunk.count(b"\n")
    return f"{path.name} line {line} is not UTF-8 text (byte {place}). Save it as CSV UTF-8"
