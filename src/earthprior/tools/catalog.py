"""Tool `catalog`: write a catalog with a split by location for a folder of chips."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from earthprior.chips.catalog import HASH, USAGES
from earthprior.chips.content import is_tiff
from earthprior.chips.georeference import Bounds, connected_groups, overlaps_between
from earthprior.chips.problems import ChipError, Problem, data_error
from earthprior.chips.read import Header, chip_header
from earthprior.chips.readers import ordered_map
from earthprior.chips.survey import crs_name
from earthprior.errors import DataError
from earthprior.files import write_atomic
from earthprior.randomness import numpy_generator

READERS = 8
BLOCKS_PER_SPLIT = 4
"""An area that is covered wall to wall is cut into blocks, this many for the smallest split."""


@dataclass(frozen=True)
class Split:
    """Which chip goes where.

    Attributes:
        usages: One per chip; None where the chip is left out.
        groups: One per chip; a group is in one split.
        notes: What the user should know.
    """

    usages: list[str | None]
    groups: list[int]
    notes: list[str]


def run(
    folder: Path,
    out: Path | None = None,
    validate_fraction: float = 0.2,
    seed: int = 0,
    test_fraction: float = 0.0,
    force: bool = False,
) -> Path:
    """Write a catalog (image, usage, group, crs, x, y, sha256) of all GeoTIFFs below a folder.

    Chips that overlap or touch on the ground form a group, and a group goes into one split as a whole, so that what is
    validated on was never trained on. x, y is the chip's centre in units of its CRS. The hashes let `stats` and `check`
    find a chip that changed since. Equal folders and seeds give equal catalogs.

    Args:
        folder: Where the chips are; image paths are written relative to the catalog.
        out: The catalog; by default catalog.csv in the folder.
        validate_fraction: Share of chips to validate on, about.
        seed: Chooses among the groups.
        test_fraction: Share of chips for a final test, about.
        force: Replace a catalog that exists.

    Returns:
        The catalog's path.

    Raises:
        DataError: No chips, unreadable chips, a catalog that exists, fractions that leave nothing to train on, or chips
            that cannot be split.
    """
    out = folder / "catalog.csv" if out is None else out
    _check(folder, out, validate_fraction, test_fraction, force)
    paths = _chips_below(folder, out)
    headers, hashes = _headers(folder, paths)
    crs = [header.crs for header in headers]
    bounds = [header.bounds for header in headers]
    split = split_by_location(crs, bounds, {"validate": validate_fraction, "test": test_fraction}, seed)
    base = out.absolute().parent
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "usage", "group", "crs", "x", "y", HASH))
    for path, usage, group, header, sha256 in zip(paths, split.usages, split.groups, headers, hashes, strict=True):
        if usage:
            image = path.absolute().relative_to(base).as_posix()
            writer.writerow((image, usage, f"g{group}", *_place(header), sha256))
    write_atomic(out, text.getvalue())
    for note in split.notes:
        print(f"note: {note}", file=sys.stderr)
    found = Counter(usage for usage in split.usages if usage)
    shares = ", ".join(f"{found[usage]} {usage} ({found[usage] / len(paths):.0%})" for usage in USAGES if found[usage])
    print(f"{out}: {sum(found.values())} chips in {len(set(split.groups))} groups: {shares}")
    return out


def split_by_location(
    crs: Sequence[str | None], bounds: Sequence[Bounds | None], fractions: dict[str, float], seed: int
) -> Split:
    """Assign whole groups to splits, near the fractions; the rest is train.

    Raises:
        DataError: The chips cannot be split.
    """
    notes = []
    homeless = sum(box is None for box in bounds)
    if homeless:
        notes.append(
            f"{homeless} of {len(bounds)} chips have no place on the ground (CRS and transform); each is a group of "
            "its own, so neighbours among them may fall into different splits"
        )
    groups = connected_groups(crs, bounds)
    wanted = {usage: fraction for usage, fraction in fractions.items() if fraction > 0}
    usages = _assign(groups, wanted, seed)
    if _off(usages, wanted):
        blocks = _blocks(groups, bounds, wanted)
        in_blocks = _assign(blocks, wanted, seed)
        if _off(in_blocks, wanted) < _off(usages, wanted):
            left_out = _leave_out(crs, bounds, in_blocks)
            usages, groups = left_out, blocks
            gone = sum(usage is None for usage in left_out)
            notes.append(
                "the chips form areas too large to go into one split as a whole, so these are split in blocks; chips "
                f"of different splits touch at their borders, and {gone} train chips that overlap others are left out"
            )
    missing = [usage for usage in ("train", *wanted) if usage not in usages]
    if missing:
        raise DataError(
            f"{len(bounds)} chips in {len(set(groups))} groups cannot be split: nothing is left for "
            f"{', '.join(missing)}. Add chips of other places, or write the column `usage` yourself"
        )
    return Split(usages, groups, notes)


def _check(folder: Path, out: Path, validate_fraction: float, test_fraction: float, force: bool) -> None:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Name the folder that holds your chips")
    if out.exists() and not force:
        raise DataError(f"{out} exists. Use --force to replace it, or --out for another name")
    if not 0 < validate_fraction < 1 or not 0 <= test_fraction < 1 or validate_fraction + test_fraction >= 1:
        raise DataError(
            f"validate fraction {validate_fraction} and test fraction {test_fraction} must lie between 0 and 1 and "
            "leave some chips to train on"
        )
    if not folder.absolute().is_relative_to(out.absolute().parent):
        raise DataError(
            f"the catalog {out} must lie in {folder} or in a folder above it: image paths are relative to the catalog"
        )


def _chips_below(folder: Path, out: Path) -> list[Path]:
    """GeoTIFFs in a stable order; folders of labels are left to the user's own column."""
    found = sorted(path for path in folder.rglob("*") if is_tiff(path.name) and path.is_file())
    skipped = ("labels", "masks")
    chips = [path for path in found if not set(path.relative_to(folder).parts[:-1]) & set(skipped)]
    if len(chips) < len(found):
        apart = f"note: {len(found) - len(chips)} files in folders named {' or '.join(skipped)} are no chips"
        print(apart, file=sys.stderr)
    if not chips:
        kinds = Counter(path.suffix or "no suffix" for path in folder.rglob("*") if path.is_file() and path != out)
        there = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(3)) or "nothing"
        raise DataError(f"no chips (*.tif) below {folder}; found {there}. Name the folder that holds your GeoTIFFs")
    return chips


def _headers(folder: Path, paths: Sequence[Path]) -> tuple[list[Header], list[str]]:
    """Header and SHA-256 of every chip.

    Raises:
        DataError: With all files that cannot be read.
    """

    def inspect(path: Path) -> tuple[Header, str] | Problem:
        try:
            return chip_header(folder, path.relative_to(folder).as_posix())
        except ChipError as error:
            return error.problem

    found = ordered_map(inspect, paths, str, READERS)
    told = list(tqdm(found, "catalog", len(paths), unit=" chips", file=sys.stderr, disable=None))
    problems = [problem for problem in told if isinstance(problem, Problem)]
    if problems:
        raise data_error(f"{len(problems)} of {len(paths)} files below {folder} cannot be read:", problems)
    sound = [chip for chip in told if not isinstance(chip, Problem)]
    return [header for header, _ in sound], [sha256 for _, sha256 in sound]


def _assign(groups: Sequence[int], wanted: dict[str, float], seed: int) -> list[str | None]:
    """A usage per chip: groups in random order go to the first split that has room for them, at last to train."""
    sizes = Counter(groups)
    names = sorted(sizes)
    order = [names[position] for position in numpy_generator(seed, "catalog").permutation(len(names))]
    room = {usage: max(1, round(fraction * len(groups))) for usage, fraction in wanted.items()}
    chosen: dict[int, str] = {}
    for group in order:
        fits = [usage for usage, free in room.items() if sizes[group] <= free]
        chosen[group] = fits[0] if fits else "train"
        if fits:
            room[fits[0]] -= sizes[group]
    for usage in wanted:
        # Where every group is larger than the share, the smallest one that is left in train has to do.
        left = [group for group in order if chosen[group] == "train"]
        if usage not in chosen.values() and len(left) > 1:
            chosen[min(left, key=lambda group: sizes[group])] = usage
    return [chosen[group] for group in groups]


def _off(usages: Sequence[str | None], wanted: dict[str, float]) -> float:
    """By how much the worst split misses its share, relative to it; 0 where it is near enough."""
    misses = []
    for usage, fraction in wanted.items():
        goal = max(1, round(fraction * len(usages)))
        misses.append(abs(sum(found == usage for found in usages) - goal) / goal)
    if "train" not in usages:
        misses.append(1.0)
    worst = max(misses)
    return worst if worst > 0.25 else 0.0


def _blocks(groups: Sequence[int], bounds: Sequence[Bounds | None], wanted: dict[str, float]) -> list[int]:
    """Groups cut into square blocks, with about as many chips each as give the smallest split its blocks."""
    most = max(1, int(min(wanted.values()) * len(groups) / BLOCKS_PER_SPLIT))
    members: dict[int, list[int]] = {}
    for chip, group in enumerate(groups):
        members.setdefault(group, []).append(chip)
    numbers: dict[tuple[int, int, int], int] = {}
    blocks = [0] * len(groups)
    for group, chips in members.items():
        boxes = np.array([bounds[chip] or (0.0, 0.0, 0.0, 0.0) for chip in chips])
        cells = np.zeros((len(chips), 2), dtype=int)
        if len(chips) > most:
            low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
            # Never smaller than a chip: one place, seen often, stays whole.
            chip_side = float((boxes[:, 2:] - boxes[:, :2]).max())
            side = max(float(np.sqrt(np.prod(high - low) * most / len(chips))), chip_side)
            cells = ((boxes[:, :2] + boxes[:, 2:]) / 2 - low) // side
        for chip, (column, row) in zip(chips, cells.astype(int).tolist(), strict=True):
            blocks[chip] = numbers.setdefault((group, column, row), len(numbers))
    return blocks


def _leave_out(
    crs: Sequence[str | None], bounds: Sequence[Bounds | None], usages: Sequence[str | None]
) -> list[str | None]:
    """Take away chips that overlap another split: train before validate, validate before test."""
    left = list(usages)
    ranks = [len(USAGES) - 1 - USAGES.index(usage or "train") for usage in left]
    for chip in overlaps_between(crs, bounds, ranks).partners:
        left[chip] = None
    return left


def _place(header: Header) -> tuple[str, str, str]:
    """crs, x, y cells."""
    if header.bounds is None:
        return "", "", ""
    left, bottom, right, top = header.bounds
    return crs_name(header.crs), f"{(left + right) / 2:.10g}", f"{(bottom + top) / 2:.10g}"
