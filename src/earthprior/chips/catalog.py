"""The catalog: one CSV row per chip, checked as a whole before anything is read."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from earthprior.chips.ledger import Ledger
from earthprior.chips.problems import Problem, data_error
from earthprior.chips.records import records
from earthprior.errors import DataError
from earthprior.params import FileParams
from earthprior.params.plain import shown

USAGES = ("train", "validate", "test")
USAGE_COLUMN = "usage"
HASH = "sha256"
"""Of the image column's file; with several image columns `<column>_sha256`. Both are optional."""

MOST_COLUMNS, SEARCHED_COLUMNS = 1000, 100
"""A catalog has, and a misspelt one is looked for among."""

LONGEST_PATH = 4096
"""Characters; no file system has longer ones."""

# Unicode's categories of what a terminal may obey; and what turns the direction of text, so that it reads as another.
CONTROLS = ("Cc", "Cs", "Zl", "Zp")
TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@dataclass(frozen=True, slots=True)
class ChipRow:
    """One chip of the catalog.

    Attributes:
        line: Line in the CSV file, header = 1.
        usage: The split: train, validate or test.
        images: Paths relative to the data folder, one per image column; their bands are stacked.
        values: Every cell by its column's name.
        hashes: What the catalog says of the images' SHA-256, in hex, "" where it says nothing; or nothing at all.
    """

    line: int
    usage: str
    images: tuple[str, ...]
    values: Mapping[str, str]
    hashes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Catalog:
    """The chips of a data folder.

    Attributes:
        path: The CSV file.
        dir: The folder that image paths are relative to.
        columns: The header.
        rows: In the file's order.
    """

    path: Path
    dir: Path
    columns: tuple[str, ...]
    rows: tuple[ChipRow, ...]

    def split(self, usage: str) -> list[ChipRow]:
        """The rows of one usage, in the file's order."""
        return [row for row in self.rows if row.usage == usage]

    def without(self, lines: Collection[int]) -> Catalog:
        """The catalog less the rows at these lines, such as stats.json's skipped ones."""
        dropped = set(lines)
        return replace(self, rows=tuple(row for row in self.rows if row.line not in dropped))


def load_catalog(data: FileParams, root: Path) -> Catalog:
    """Read and check the catalog of `data.dir`.

    Args:
        data: Section `data` of params.yaml.
        root: The project's root, which `data.dir` is relative to.

    Raises:
        DataError: With all faults of the catalog at once, each with its line.
    """
    catalog, problems = scan_catalog(data, root)
    if any(problem.severity == "error" for problem in problems):
        raise data_error(f"{catalog.path.name} cannot be used:", problems)
    return catalog


def scan_catalog(data: FileParams, root: Path) -> tuple[Catalog, list[Problem]]:
    """The catalog's usable rows, and the problems of the others.

    Raises:
        DataError: The file as a whole cannot be read: missing, empty, not UTF-8, no header with the needed columns.
    """
    file = CatalogFile(data, root)
    rows: list[ChipRow] = []
    problems: list[Problem] = []
    with Ledger() as ledger:
        for row, faults in file.rows():
            problems += faults
            if row:
                rows.append(row)
                ledger.add_row(row.line, USAGES.index(row.usage), row.images)
        problems += repeated(ledger)
    if rows or not problems:
        problems += empty_splits(file.path.name, {row.usage for row in rows})
    return Catalog(file.path, file.dir, file.columns, tuple(rows)), problems


class CatalogFile:
    """The CSV file itself, read row by row: memory does not grow with it.

    Args:
        data: Section `data` of params.yaml.
        root: The project's root, which `data.dir` is relative to.

    Attributes:
        path: The CSV file.
        dir: The folder that image paths are relative to.
        columns: The header.

    Raises:
        DataError: Missing, empty, not UTF-8, or no header with the needed columns.
    """

    def __init__(self, data: FileParams, root: Path) -> None:
        self.dir = root / data.dir
        self.path = self.dir / data.catalog
        _, header = next(records(self.path))
        self.columns = tuple(header)
        self._image_columns = data.image_columns
        _check_header(self.path.name, self.columns, (USAGE_COLUMN, *data.image_columns))
        names = [f"{column}_{HASH}" for column in data.image_columns]
        if len(names) == 1 and HASH in self.columns:
            names = [HASH]
        self.hash_columns = tuple(names) if set(names) & set(self.columns) else ()

    def rows(self) -> Iterator[tuple[ChipRow | None, list[Problem]]]:
        """Each row, or None and what is wrong with it.

        Raises:
            DataError: What follows is no CSV.
        """
        rest = records(self.path)
        next(rest)
        for line, cells in rest:
            yield self._row(line, cells)

    def chips(self) -> Iterator[ChipRow]:
        """The rows that are right in themselves."""
        return (row for row, _ in self.rows() if row)

    def _row(self, line: int, cells: Sequence[str]) -> tuple[ChipRow | None, list[Problem]]:
        name, header = self.path.name, self.columns
        if len(cells) != len(header):
            what = f"the row has {len(cells)} cells, the header {len(header)}"
            return None, [
                Problem("error", name, line, what, "Add the missing commas, or quote cells that hold a comma")
            ]
        values = dict(zip(header, cells, strict=True))
        images = tuple(values[column] for column in self._image_columns)
        hashes = tuple(values.get(column, "") for column in self.hash_columns)
        problems = [
            *_usage_problems(name, line, values[USAGE_COLUMN]),
            *_path_problems(name, line, self._image_columns, images),
            *_hash_problems(name, line, self.hash_columns, hashes),
        ]
        if problems:
            return None, problems
        # The same few words for every row, instead of a copy each.
        usage = USAGES[USAGES.index(values[USAGE_COLUMN])]
        values[USAGE_COLUMN] = usage
        return ChipRow(line, usage, images, values, hashes), []


def path_fault(text: str) -> str | None:
    """Why a path from a catalog is refused, or None for a plain relative path.

    The check is lexical: resolving would refuse the links that DVC makes into its cache.
    """
    if not text:
        return "is empty"
    if len(text) > LONGEST_PATH:
        return f"has more than {LONGEST_PATH:,} characters"
    if not text.isprintable() and any(unicodedata.category(one) in CONTROLS or one in TURNS for one in text):
        return "holds a control character"
    if "\\" in text:
        return "holds a backslash"
    if text.startswith("/"):
        return "is absolute"
    if re.match(r"[A-Za-z][A-Za-z0-9+._-]*:", text):
        return "begins with a drive or a URL scheme"
    if text != text.strip():
        return "begins or ends with a space"
    if ".." in PurePosixPath(text).parts:
        return "leaves the data folder through '..'"
    return None


def _check_header(file: str, header: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse a header in which a needed column is missing or a column is ambiguous."""
    if len(header) > MOST_COLUMNS:
        raise DataError(f"{file} has {len(header):,} columns in its first line; is it a catalog, with a chip per line?")
    repeated = sorted(column for column, count in Counter(header).items() if count > 1)
    if repeated:
        raise DataError(f"{file}: columns {shown(repeated)} appear twice in the header. Give each column its own name")
    missing = [column for column in needed if column not in header]
    if not missing:
        return
    hints = []
    if any("\0" in column for column in header):
        hints.append("It holds NUL bytes: is it UTF-16 text? Save it as CSV UTF-8")
    for separator, word in ((";", "';'"), ("\t", "a tab"), ("|", "'|'")):
        if len(header) == 1 and separator in header[0]:
            hints.append(f"It seems to be separated by {word}; save it with commas")
    for column in missing:
        others = [name for name in header[:SEARCHED_COLUMNS] if name not in needed]
        near = difflib.get_close_matches(column, others, n=1, cutoff=0.6)
        if near:
            hints.append(f"Did you mean {near[0]!r} for {column!r}?")
    key = "" if missing == [USAGE_COLUMN] else " (params.yaml: data.image_columns)"
    hints = hints or ["Add the column" + ("" if len(missing) == 1 else "s") + key]
    raise DataError(f"{file} has no column {missing}; found {shown(list(header))}. {' '.join(hints)}")


def _usage_problems(name: str, line: int, usage: str) -> list[Problem]:
    if usage in USAGES:
        return []
    near = difflib.get_close_matches(usage.strip().lower()[:40], USAGES, n=1, cutoff=0.3)
    fix = f"Did you mean {near[0]!r}? " if near else ""
    return [Problem("error", name, line, f"usage {shown(usage)} is not allowed", f"{fix}Allowed: {', '.join(USAGES)}")]


def _path_problems(name: str, line: int, columns: Sequence[str], images: Sequence[str]) -> list[Problem]:
    faults = [(column, image, path_fault(image)) for column, image in zip(columns, images, strict=True)]
    fix = "Write paths relative to the data folder, with '/'"
    return [
        Problem(
            "error", name, line, f"column {column!r}: the path {shown(image)} {fault}", fix, kind=f"the path {fault}"
        )
        for column, image, fault in faults
        if fault
    ]


def _hash_problems(name: str, line: int, columns: Sequence[str], hashes: Sequence[str]) -> list[Problem]:
    return [
        Problem(
            "error", name, line, f"column {column!r}: {shown(found)} is no SHA-256 (64 hexadecimal digits)",
            "Leave the cell empty, or write it anew: earthprior catalog DIR --force", kind="malformed SHA-256",
        )
        for column, found in zip(columns, hashes, strict=True)
        if found and not re.fullmatch("[0-9a-fA-F]{64}", found)
    ]  # fmt: skip


def repeated(ledger: Ledger) -> Iterator[Problem]:
    """Rows that name the chip of an earlier row: a leak where the split differs, a waste where it does not."""
    for again in ledger.repeated_rows():
        file, usage, before = again.images[0], USAGES[again.usage], USAGES[again.first_usage]
        if before == usage:
            what = f"the chip is also in line {again.first_line}"
            fix, kind = "Drop one row, or it counts twice", "the chip is also in an earlier line"
            yield Problem("warning", file, again.line, what, fix, kind=kind)
        else:
            what = f"the chip is {usage} here and {before} in line {again.first_line}, which leaks"
            kind = "the chip is also in another split, which leaks"
            yield Problem("error", file, again.line, what, "Keep it in one split", kind=kind)


def empty_splits(name: str, present: Iterable[str]) -> list[Problem]:
    """The splits that the pipeline cannot do without."""
    return [
        Problem("error", name, 0, f"no row has usage {usage!r}", f"Mark some chips {usage}, or: earthprior catalog DIR")
        for usage in ("train", "validate")
        if usage not in present
    ]
