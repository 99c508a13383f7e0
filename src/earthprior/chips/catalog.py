"""The catalog: one CSV row per chip, checked as a whole before anything is read.

Python's csv module reads it, not pandas: it tells the line of every row and keeps ragged rows ragged, so that a fault
can be named instead of guessed at, and text stays text ("NA" is a fine place name, "007" a fine tile).
"""

from __future__ import annotations

import csv
import difflib
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from earthprior.chips.problems import Problem, data_error
from earthprior.errors import DataError
from earthprior.params import DataParams
from earthprior.params.plain import shown

USAGES = ("train", "validate", "test")
USAGE_COLUMN = "usage"

LONGEST_PATH = 4096
"""Characters; no file system has longer ones."""

MOST_COLUMNS = 100
"""Among which a misspelt one is looked for."""

# Unicode's categories of what a terminal may obey; and what turns the direction of text, so that it reads as another.
CONTROLS = ("Cc", "Cs", "Zl", "Zp")
TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@dataclass(frozen=True)
class ChipRow:
    """One chip of the catalog.

    Attributes:
        line: Line in the CSV file, header = 1.
        usage: The split: train, validate or test.
        images: Paths relative to the data folder, one per image column; their bands are stacked.
        values: Every cell by its column's name.
    """

    line: int
    usage: str
    images: tuple[str, ...]
    values: Mapping[str, str]


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


def load_catalog(data: DataParams, root: Path) -> Catalog:
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


def scan_catalog(data: DataParams, root: Path) -> tuple[Catalog, list[Problem]]:
    """The catalog's usable rows, and the problems of the others.

    Raises:
        DataError: The file as a whole cannot be read: missing, empty, not UTF-8, no header with the needed columns.
    """
    folder = root / data.dir
    path = folder / data.catalog
    records = list(_records(path))
    header = tuple(records[0][1])
    _check_header(path.name, header, (USAGE_COLUMN, *data.image_columns))
    rows: list[ChipRow] = []
    problems: list[Problem] = []
    for line, cells in records[1:]:
        row, faults = _row(path.name, header, line, cells, data.image_columns)
        problems += faults
        if row:
            rows.append(row)
    problems += _repeated(rows)
    problems += _empty_splits(path.name, rows, faulty=bool(problems))
    return Catalog(path, folder, header, tuple(rows)), problems


def path_fault(text: str) -> str | None:
    """Why a path from a catalog is refused, or None for a plain relative path.

    The check is lexical: resolving would refuse the links that DVC makes into its cache.
    """
    if not text:
        return "is empty"
    if len(text) > LONGEST_PATH:
        return f"has {len(text):,} characters"
    if any(unicodedata.category(character) in CONTROLS or character in TURNS for character in text):
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


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every row that is not blank, the header first."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{path.name} is no regular file. Write the catalog into one, and check data.catalog")
    try:
        # utf-8-sig: Excel writes a byte order mark, which would become part of the first column's name.
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(_missing(path)) from None
    except (IsADirectoryError, PermissionError) as error:
        why = f"{path.name} cannot be read: {error.strerror}"
        raise DataError(f"{why}. Check data.catalog and the file's mode") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text (byte {error.start}). Save it as CSV UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line, found = 1, False
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                found = True
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path.name} line {line}: {error}. Check the quotes of this row") from None
    if not found:
        raise DataError(f"{path.name} is empty. Write one with: earthprior catalog DIR")


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return (
            f"the data folder {path.parent.name}/ does not exist. Fetch it (dvc pull), or set data.dir to the folder "
            "that holds your chips"
        )
    return f"{path.name} not found in {path.parent.name}/. Set data.catalog, or write one with: earthprior catalog DIR"


def _check_header(file: str, header: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse a header in which a needed column is missing or a column is ambiguous."""
    repeated = sorted(column for column, count in Counter(header).items() if count > 1)
    if repeated:
        raise DataError(f"{file}: columns {shown(repeated)} appear twice in the header. Give each column its own name")
    missing = [column for column in needed if column not in header]
    if not missing:
        return
    hints = []
    for separator, word in ((";", "';'"), ("\t", "a tab")):
        if len(header) == 1 and separator in header[0]:
            hints.append(f"It seems to be separated by {word}; save it with commas")
    for column in missing:
        others = [name for name in header[:MOST_COLUMNS] if name not in needed]
        near = difflib.get_close_matches(column, others, n=1, cutoff=0.6)
        if near:
            hints.append(f"Did you mean {near[0]!r} for {column!r}?")
    key = "" if missing == [USAGE_COLUMN] else " (params.yaml: data.image_columns)"
    hints = hints or ["Add the column" + ("" if len(missing) == 1 else "s") + key]
    raise DataError(f"{file} has no column {missing}; found {shown(list(header))}. {' '.join(hints)}")


def _row(
    name: str, header: Sequence[str], line: int, cells: Sequence[str], image_columns: Sequence[str]
) -> tuple[ChipRow | None, list[Problem]]:
    """The row, or None and what is wrong with it."""
    if len(cells) != len(header):
        what = f"the row has {len(cells)} cells, the header {len(header)}"
        return None, [Problem("error", name, line, what, "Add the missing commas, or quote cells that hold a comma")]
    values = dict(zip(header, cells, strict=True))
    problems = []
    usage = values[USAGE_COLUMN]
    if usage not in USAGES:
        near = difflib.get_close_matches(usage.strip().lower(), USAGES, n=1, cutoff=0.3)
        fix = f"Did you mean {near[0]!r}? " if near else ""
        what = f"usage {shown(usage)} is not allowed"
        problems.append(Problem("error", name, line, what, f"{fix}Allowed: {', '.join(USAGES)}"))
    images = tuple(values[column] for column in image_columns)
    for column, image in zip(image_columns, images, strict=True):
        fault = path_fault(image)
        if fault:
            what = f"column {column!r}: the path {shown(image)} {fault}"
            problems.append(Problem("error", name, line, what, "Write paths relative to the data folder, with '/'"))
    return (None if problems else ChipRow(line, usage, images, values)), problems


def _repeated(rows: Sequence[ChipRow]) -> list[Problem]:
    """Rows that name the chip of an earlier row: a leak where the split differs, a waste where it does not."""
    first: dict[tuple[str, ...], ChipRow] = {}
    problems = []
    for row in rows:
        before = first.setdefault(row.images, row)
        if before is row:
            continue
        file = row.images[0]
        if before.usage == row.usage:
            what = f"the chip is also in line {before.line}"
            problems.append(Problem("warning", file, row.line, what, "Drop one row, or it counts twice"))
        else:
            what = f"the chip is {row.usage} here and {before.usage} in line {before.line}, which leaks"
            problems.append(Problem("error", file, row.line, what, "Keep it in one split"))
    return problems


def _empty_splits(name: str, rows: Sequence[ChipRow], faulty: bool) -> list[Problem]:
    """The splits that the pipeline cannot do without."""
    if faulty and not rows:
        return []
    present = {row.usage for row in rows}
    return [
        Problem("error", name, 0, f"no row has usage {usage!r}", f"Mark some chips {usage}, or: earthprior catalog DIR")
        for usage in ("train", "validate")
        if usage not in present
    ]
