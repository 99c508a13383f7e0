"""One hardened function from a catalog row to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from earthprior.chips.catalog import ChipRow
from earthprior.chips.content import is_tiff
from earthprior.chips.geotiff import (
    ChipSpec,
    Header,
    check_descriptions,
    check_same_place,
    chip_header,
    header_of,
    open_files,
    readable,
)

__all__ = [
    "ChipSpec", "Header", "Inspection", "chip_header", "inspect_chip", "inspect_label", "read_chip", "read_label",
]  # fmt: skip


def read_chip(
    folder: Path, row: ChipRow, spec: ChipSpec, out: NDArray[Any] | None = None
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Pixels and validity of one chip.

    Args:
        folder: The data folder.
        row: The chip.
        spec: What it must be.
        out: An array (C, H, W) of the file's dtype to fill instead of a new one.

    Returns:
        Pixels (C, H, W) in the file's dtype, H = W = chip_size + 2 buffer, physical units, 0 where invalid; and valid
        (H, W), false where all bands hold nodata, any band is NaN or infinite, or the file has no pixel (the buffer's
        rim). Alpha is never looked at: NIR is often tagged as alpha.

    Raises:
        ChipError: The chip is missing, damaged, or not as the spec says.
    """
    with ExitStack() as stack:
        sources = open_files(folder, row, spec, stack)
        pixels, valid, _ = _pixels(sources, row, spec, out)
        return pixels, valid


@dataclass(frozen=True)
class Inspection:
    """A chip with all that can be told about it.

    Attributes:
        pixels: (C, H, W), as `read_chip`.
        valid: (H, W), as `read_chip`.
        not_finite: Per band, pixels that are invalid because it is NaN, infinite or beyond float32.
        header: Place of the first file, bands of all.
    """

    pixels: NDArray[Any]
    valid: NDArray[np.bool_]
    not_finite: tuple[int, ...]
    header: Header


def inspect_chip(folder: Path, row: ChipRow, spec: ChipSpec) -> Inspection:
    """Like `read_chip`, with the header and the checks that need it.

    Raises:
        ChipError: As `read_chip`; also where the descriptions of the bands contradict the spec, the files of the row
            lie at different places, or a file does not hash to what the catalog says.
    """
    with ExitStack() as stack:
        sources = open_files(folder, row, spec, stack, verify=True)
        headers = []
        for image, source in zip(row.images, sources, strict=True):
            with readable(image, row.line):
                headers.append(header_of(source))
        check_same_place(row, headers)
        descriptions = tuple(name for header in headers for name in header.descriptions)
        check_descriptions(row, descriptions, spec.bands)
        nodata = tuple(value for header in headers for value in header.nodata)
        first = headers[0]
        header = Header(first.width, first.height, first.dtype, nodata, descriptions, first.crs, first.bounds)
        return Inspection(*_pixels(sources, row, spec, None), header)


def read_label(folder: Path, row: ChipRow, column: str, spec: ChipSpec) -> NDArray[Any] | None:
    """The label raster of one chip.

    Returns:
        Labels (H, W) in the file's dtype, placed like the chip's pixels; on a buffer rim that the file lacks, and where
        it holds no number, NaN if the dtype has it and 0 otherwise. None for an empty cell.

    Raises:
        ChipError: As `read_chip`, also for a file with more than one band.
    """
    if not row.values[column]:
        return None
    pixels, valid = read_chip(folder, *_label_of(row, column, spec))
    found: NDArray[Any] = pixels[0]
    if found.dtype.kind == "f":
        # No number, no label: it must not become the class 0.
        found[~valid] = np.nan
    return found


def inspect_label(folder: Path, row: ChipRow, column: str, spec: ChipSpec, chip: Header) -> None:
    """Read a chip's label raster to see whether it can be used; a cell that names no raster is none.

    Raises:
        ChipError: As `read_label`, also for a raster that lies elsewhere than its chip.
    """
    if is_tiff(row.values[column]):
        label, label_spec = _label_of(row, column, spec)
        header = inspect_chip(folder, label, label_spec).header
        check_same_place(replace(label, images=(row.images[0], *label.images)), [chip, header])


def _label_of(row: ChipRow, column: str, spec: ChipSpec) -> tuple[ChipRow, ChipSpec]:
    """The label raster as a chip of one band."""
    label = ChipRow(row.line, row.usage, (row.values[column],), row.values)
    return label, ChipSpec((column,), spec.chip_size, spec.buffer, nodata=())


def _pixels(
    sources: Sequence[Any], row: ChipRow, spec: ChipSpec, out: NDArray[Any] | None
) -> tuple[NDArray[Any], NDArray[np.bool_], tuple[int, ...]]:
    """Decode the files and mark what is valid; the third counts the pixels of each band that are not finite."""
    side = spec.read_px
    dtype = np.dtype(sources[0].dtypes[0])
    pixels = np.empty((len(spec.bands), side, side), dtype) if out is None else out
    top, left = (side - sources[0].height) // 2, (side - sources[0].width) // 2
    band = 0
    for image, source in zip(row.images, sources, strict=True):
        target = pixels[band : band + source.count]
        with readable(image, row.line):
            if top or left:
                target[:] = 0
                target[:, top : side - top, left : side - left] = source.read()
            else:
                source.read(out=target)
        band += source.count
    valid, not_finite = valid_pixels(pixels, nodata_values(sources, spec.nodata))
    if top or left:
        inside = np.zeros_like(valid)
        inside[top : side - top, left : side - left] = True
        valid &= inside
    if not valid.all():
        # What lies under nodata must not reach any sum, not even as NaN times 0.
        pixels[:, ~valid] = 0
    return pixels, valid, not_finite


def nodata_values(sources: Sequence[Any], told: Sequence[float] | None) -> list[Sequence[float]]:
    """Per band of the opened files, the values that mark missing data: those told, or the files' own."""
    own = [value for source in sources for value in source.nodatavals]
    return [told] * len(own) if told is not None else [() if value is None else (value,) for value in own]


def valid_pixels(pixels: NDArray[Any], nodata: Sequence[Sequence[float]]) -> tuple[NDArray[np.bool_], tuple[int, ...]]:
    """Where there is data, (H, W), and per band how many pixels there are none because it is not finite.

    Args:
        pixels: (C, H, W).
        nodata: Per band, the values that mark missing data; a pixel is missing where all bands say so.
    """
    valid = ~_all_nodata(pixels, nodata)
    not_finite = (0,) * len(pixels)
    if pixels.dtype.kind == "f":
        # float64 crosses to the device as float32, where larger numbers would become infinite.
        finite = np.abs(pixels) <= np.finfo(np.float32).max
        if not finite.all():
            not_finite = tuple(int(np.count_nonzero(valid & ~band)) for band in finite)
            valid &= finite.all(axis=0)
    return valid, not_finite


def _all_nodata(pixels: NDArray[Any], nodata: Sequence[Sequence[float]]) -> NDArray[np.bool_]:
    """(H, W), true where every band holds one of its nodata values."""
    missing = np.ones(pixels.shape[1:], dtype=bool)
    for band, values in zip(pixels, nodata, strict=True):
        missing &= _holds(band, values)
        if not missing.any():
            break
    return missing


def _holds(band: NDArray[Any], values: Sequence[float]) -> NDArray[np.bool_]:
    """Where one band holds one of the values; compared in the band's own dtype, as GDAL stores nodata as a double."""
    found = np.zeros(band.shape, dtype=bool)
    for value in values:
        if value != value:
            found |= np.isnan(band) if band.dtype.kind == "f" else False
        elif band.dtype.kind == "f":
            found |= band == np.float64(value).astype(band.dtype)
        elif np.iinfo(band.dtype).min <= value <= np.iinfo(band.dtype).max and value == int(value):
            found |= band == band.dtype.type(value)
    return found
