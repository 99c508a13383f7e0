"""One pass over all chips: the statistics of the training chips, and everything that is wrong with any chip."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from earthprior.chips.catalog import USAGES, Catalog, ChipRow
from earthprior.chips.georeference import Bounds, overlaps_between
from earthprior.chips.problems import ChipError, Problem, chip_error, some
from earthprior.chips.read import ChipSpec, inspect_chip
from earthprior.chips.readers import ordered_map
from earthprior.chips.statistics import BandStatistics, BandSummary, summarize

SPARSE = 0.1
"""A chip with a smaller valid share than this is reported."""

LONGEST_NAME = 100
"""Of a CRS, which a file may call as it likes."""


@dataclass(frozen=True)
class Finding:
    """What one chip's pixels and header told.

    Attributes:
        row: The chip.
        size: (width, height) of its file, px.
        dtype: NumPy's name.
        crs: Of its file, or None.
        bounds: In units of the CRS, or None.
        digest: Of its pixels and mask.
        valid_fraction: Share of valid pixels.
        not_finite: Pixels that are NaN or infinite.
        constant: Every band has one value only.
        bands: What a training chip adds to the statistics, None per band without a valid pixel.
    """

    row: ChipRow
    size: tuple[int, int]
    dtype: str
    crs: str | None
    bounds: Bounds | None
    digest: bytes
    valid_fraction: float
    not_finite: int
    constant: bool
    bands: tuple[BandSummary, ...]


@dataclass(frozen=True)
class Survey:
    """The outcome of the pass.

    Attributes:
        findings: The readable chips in the catalog's order, without their band summaries.
        bands: Statistics over the valid pixels of the training chips, per band; empty if no chip was readable.
        problems: All faults of the chips.
        overlapping_pairs: Pairs of chips of different splits that share ground.
    """

    findings: list[Finding]
    bands: list[BandStatistics]
    problems: list[Problem]
    overlapping_pairs: int


def survey(catalog: Catalog, spec: ChipSpec, readers: int, progress: Any = iter) -> Survey:
    """Read every chip once.

    The outcome, to the last bit, does not depend on `readers`.

    Args:
        catalog: The chips.
        spec: What they must be.
        readers: Threads.
        progress: Wraps the iterator over chips, to show a bar.

    Raises:
        DataError: A read hangs. Faulty chips are problems, not exceptions.
    """
    findings: list[Finding] = []
    problems: list[Problem] = []
    bands: list[BandStatistics] = []
    for found in progress(_inspect_all(catalog, spec, readers)):
        if isinstance(found, Problem):
            problems.append(found)
            continue
        if not bands:
            bands = [BandStatistics(found.dtype) for _ in spec.bands]
        elif found.dtype != findings[0].dtype:
            problems.append(_other_dtype(found, findings[0]))
            continue
        for band, summary in zip(bands, found.bands, strict=False):
            band.add(summary)
        findings.append(replace(found, bands=()))
    overlaps = overlaps_between(
        [found.crs for found in findings],
        [found.bounds for found in findings],
        [USAGES.index(found.row.usage) for found in findings],
    )
    problems += _odd_chips(findings)
    problems += _same_content(findings)
    problems += _overlapping(findings, overlaps.partners)
    return Survey(findings, bands, problems, overlaps.pairs)


def digest_of(findings: Sequence[Finding]) -> str:
    """SHA-256 over the chips' paths, splits and pixels, in the catalog's order."""
    whole = hashlib.sha256()
    for found in findings:
        whole.update(repr((found.row.usage, found.row.images)).encode())
        whole.update(found.digest)
    return whole.hexdigest()


def census(values: Iterable[str]) -> dict[str, int]:
    """How often each value occurs."""
    return dict(sorted(Counter(values).items()))


def crs_name(crs: str | None) -> str:
    """A CRS in a few words: its code, or the name in its WKT."""
    if crs is None:
        return "none"
    return (crs.split('"')[1] if '"' in crs else crs)[:LONGEST_NAME]


def _inspect_all(catalog: Catalog, spec: ChipSpec, readers: int) -> Iterator[Finding | Problem]:
    """Findings in the catalog's order."""

    def inspect(row: ChipRow) -> Finding | Problem:
        try:
            return inspect_row(catalog.dir, row, spec)
        except ChipError as error:
            return error.problem

    if catalog.rows:
        # GDAL can deadlock when threads are the first to use its drivers; this read is made again below.
        inspect(catalog.rows[0])
    yield from ordered_map(inspect, catalog.rows, lambda row: row.images[0], readers)


def inspect_row(folder: Path, row: ChipRow, spec: ChipSpec) -> Finding:
    """Read and digest one chip.

    Raises:
        ChipError: It cannot be used.
    """
    chip = inspect_chip(folder, row, spec)
    pixels, valid, header = chip.pixels, chip.valid, chip.header
    whole = bool(valid.all())
    flat = pixels.reshape(len(pixels), -1)
    flat = flat if whole else flat[:, valid.ravel()]
    digest = hashlib.sha256(np.ascontiguousarray(pixels).data)
    if not whole:
        digest.update(np.packbits(valid).tobytes())
    return Finding(
        row=row,
        size=(header.width, header.height),
        dtype=header.dtype,
        crs=header.crs,
        bounds=header.bounds,
        digest=digest.digest(),
        valid_fraction=flat.shape[1] / valid.size,
        not_finite=chip.not_finite,
        constant=flat.shape[1] > 0 and bool((flat == flat[:, :1]).all()),
        bands=tuple(summarize(band) for band in flat) if row.usage == "train" and flat.shape[1] else (),
    )


def _other_dtype(found: Finding, first: Finding) -> Problem:
    what = f"has dtype {found.dtype}, but {first.row.images[0]} and others have {first.dtype}"
    return chip_error(found.row.images[0], found.row.line, what, "Bring all chips to one dtype").problem


def _odd_chips(findings: Sequence[Finding]) -> list[Problem]:
    """Chips that can be read but hold little."""
    problems = []
    for found in findings:
        whats = []
        if found.not_finite:
            what = f"{found.not_finite} pixels are NaN or infinite"
            whats.append((what, "They are masked; check how the chip was made"))
        if found.valid_fraction < SPARSE:
            what = f"only {found.valid_fraction:.1%} of it is valid" if found.valid_fraction else "has no valid pixel"
            whats.append((what, "Drop the row if that is not meant"))
        elif found.constant:
            whats.append(("every band is constant", "Drop the row if the file was not written to its end"))
        problems += [Problem("warning", found.row.images[0], found.row.line, what, fix) for what, fix in whats]
    return problems


def _same_content(findings: Sequence[Finding]) -> list[Problem]:
    """Copies of a chip under another name: a leak between splits, a waste within one."""
    first: dict[bytes, Finding] = {}
    problems = []
    for found in findings:
        if found.constant or not found.valid_fraction:
            # All empty chips are alike.
            continue
        before = first.setdefault(found.digest, found)
        # The catalog's own check has told of rows with the same path.
        if before is found or before.row.images == found.row.images:
            continue
        other = f"{before.row.images[0]} (catalog line {before.row.line})"
        if before.row.usage == found.row.usage:
            problem = Problem(
                "warning", found.row.images[0], found.row.line, f"has the same pixels as {other}", "Drop one of them"
            )
        else:
            usages = f"is {found.row.usage} where that is {before.row.usage}"
            what = f"has the same pixels as {other}, but {usages}, which leaks"
            problem = Problem("error", found.row.images[0], found.row.line, what, "Drop one, or put both in one split")
        problems.append(problem)
    return problems


def _overlapping(findings: Sequence[Finding], partners: dict[int, tuple[int, list[int]]]) -> list[Problem]:
    """Chips that share ground with chips of another split."""
    problems = []
    for chip, (count, known) in sorted(partners.items()):
        row = findings[chip].row
        names = some([f"{findings[other].row.images[0]} ({findings[other].row.usage})" for other in known], shown=3)
        rest = f" and {count - len(known)} more" if count > len(known) else ""
        what = f"is {row.usage}, but overlaps on the ground with {names}{rest}"
        fix = "Split by location (earthprior catalog DIR), or the result flatters"
        problems.append(Problem("warning", row.images[0], row.line, what, fix))
    return problems
