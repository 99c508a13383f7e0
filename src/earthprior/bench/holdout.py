"""The train chips that dials are chosen on: apart from the others by place, and never trained on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

from earthprior.chips.catalog import ChipRow
from earthprior.chips.georeference import connected_groups
from earthprior.chips.read import chip_header
from earthprior.errors import DataError
from earthprior.randomness import seed_of

GROUP_COLUMN = "group"
"""Of the catalog: chips of one place have one value."""


def hold_out(
    rows: Sequence[ChipRow], groups: Sequence[Hashable], count: int, needed: int
) -> tuple[list[ChipRow], list[ChipRow]]:
    """Whole groups until there are `count` chips, in an order that depends on the groups alone; held and rest.

    Args:
        rows: The labelled train chips.
        groups: Of each.
        count: At least so many are held out.
        needed: So many shall be left.

    Raises:
        DataError: There are too few chips, or too few groups of them.
    """
    members: dict[Hashable, list[ChipRow]] = {}
    for row, group in zip(rows, groups, strict=True):
        members.setdefault(group, []).append(row)
    held: set[int] = set()
    for group in sorted(members, key=lambda group: seed_of("holdout", str(group))):
        if len(held) >= count:
            break
        if len(rows) - len(held) - len(members[group]) >= needed:
            held |= {row.line for row in members[group]}
    if len(held) < count:
        raise DataError(
            f"{len(rows)} labelled train chips in {len(members)} places cannot be divided into {count} that settings "
            f"are chosen on (bench.holdout) and {needed} to learn from; lower bench.holdout, or label more chips"
        )
    return [row for row in rows if row.line in held], [row for row in rows if row.line not in held]


def places(folder: Path, rows: Sequence[ChipRow]) -> list[Hashable]:
    """What place each chip is of: the catalog's column `group` where it is filled, otherwise by the files' bounds.

    Args:
        folder: The data folder.
        rows: The chips.

    Raises:
        ChipError: A file's header cannot be read.
    """
    named = [row.values.get(GROUP_COLUMN) for row in rows]
    if all(named):
        return list(named)
    headers = [chip_header(folder, row.images[0], row.line)[0] for row in rows]
    return list(connected_groups([header.crs for header in headers], [header.bounds for header in headers]))
