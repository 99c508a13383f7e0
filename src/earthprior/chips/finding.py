"""What reading one chip tells about it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from earthprior.chips.band_order import likeness
from earthprior.chips.catalog import ChipRow
from earthprior.chips.georeference import Bounds
from earthprior.chips.problems import ChipError, Problem, some
from earthprior.chips.read import ChipSpec, Header, inspect_chip, inspect_label
from earthprior.chips.statistics import BandSummary, summarize

SPARSE = 0.1
"""A chip with a smaller valid share than this is reported."""


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
        not_finite: Pixels that are NaN or infinite, per band.
        constant: Every band has one value only.
        bands: What a training chip adds to the statistics, None per band without a valid pixel.
        likeness: How alike its bands are, see `band_order.likeness`.
        label: What is wrong with its label raster, if anything.
    """

    row: ChipRow
    size: tuple[int, int]
    dtype: str
    crs: str | None
    bounds: Bounds | None
    digest: bytes
    valid_fraction: float
    not_finite: tuple[int, ...]
    constant: bool
    bands: tuple[BandSummary, ...]
    likeness: NDArray[np.float32] | None = None
    label: Problem | None = None


def inspect_row(
    folder: Path, row: ChipRow, spec: ChipSpec, label_column: str | None = None, statistics: bool = True
) -> Finding:
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
    measured = statistics and row.usage == "train" and flat.shape[1]
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
        bands=tuple(summarize(band) for band in flat) if measured else (),
        likeness=likeness(flat),
        label=_label_problem(folder, row, label_column, spec, header) if label_column else None,
    )


def _label_problem(folder: Path, row: ChipRow, column: str, spec: ChipSpec, chip: Header) -> Problem | None:
    """A label raster that cannot be used costs the probe, not the training."""
    try:
        inspect_label(folder, row, column, spec, chip)
    except ChipError as error:
        fault = error.problem
        kind = f"label: {fault.kind or fault.what}"
        return replace(fault, severity="warning", what=f"label: {fault.what}", skippable=False, kind=kind)
    return None


def odd_chip(found: Finding, bands: tuple[str, ...]) -> Iterator[Problem]:
    """What is strange about a chip that can be read."""
    whats = []
    if any(found.not_finite):
        named = [f"{count} in {band}" for band, count in zip(bands, found.not_finite, strict=True) if count]
        what = f"pixels are NaN or infinite ({some(named)})"
        whats.append((what, "They are masked; check how the chip was made", "pixels are NaN or infinite"))
    if found.valid_fraction < SPARSE:
        what = f"only {found.valid_fraction:.1%} of it is valid" if found.valid_fraction else "has no valid pixel"
        kind = f"less than {SPARSE:.0%} is valid" if found.valid_fraction else ""
        whats.append((what, "Drop the row if that is not meant", kind))
    elif found.constant:
        whats.append(("every band is constant", "Drop the row if the file was not written to its end", ""))
    for what, fix, kind in whats:
        yield Problem("warning", found.row.images[0], found.row.line, what, fix, kind=kind)
    if found.label:
        yield found.label
