"""GeoTIFF files as GDAL may see them: opened from memory, their headers checked before any pixel is decoded.

A chip's bytes are read by Python and handed to GDAL as memory, with the GTiff driver alone. So GDAL never sees a path:
no URL, no /vsi prefix, no VRT or service description named .tif, and no sidecar (.aux.xml, .ovr, .msk) can make it read
anything else, whatever GDAL options are set (those are global to the process, and threads would race on them). This
costs no more time than opening the path.
"""

from __future__ import annotations

import logging
import math
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.enums import Interleaving
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile

from earthprior.chips.catalog import ChipRow, path_fault
from earthprior.chips.problems import ChipError, chip_error
from earthprior.params import DataParams

DTYPES = ("uint8", "uint16", "int16", "float32", "float64")
"""What a chip may hold; all of them fit float32's range."""

MAX_BYTES = 64 * 2**20
"""A chip's file may be this large, or 16 times its pixels where that is more; anything else is a scene, not a chip. So
may what GDAL decodes at a time."""

MAX_UNKNOWN_BYTES = 256 * 2**20
"""The same where nobody has said yet how large chips are."""

DAMAGED = (RasterioError, OSError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError)
"""What a damaged file makes rasterio raise: for text that is not UTF-8, sizes that are none, a CRS that is none, ..."""

LONGEST = 200
"""Of a file's own words in a message."""

# Chips without coordinates are legitimate, and the warning would name a memory file that no one knows.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
# Faults come back as exceptions with the file's name; rasterio's own log line lacks it.
logging.getLogger("rasterio").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class ChipSpec:
    """What every chip must be.

    Attributes:
        bands: Names in file order, over all image columns.
        chip_size: Width and height without buffer, px.
        buffer: Read around the chip on every side where the file has it, px.
        nodata: Values that mark missing data, or None for the files' own.
    """

    bands: tuple[str, ...]
    chip_size: int
    buffer: int
    nodata: tuple[float, ...] | None

    @classmethod
    def from_params(cls, data: DataParams) -> ChipSpec:
        """The spec that section `data` of params.yaml describes."""
        return cls(data.bands, data.chip_size, data.buffer, data.nodata)

    @property
    def read_px(self) -> int:
        """Width and height of what is read, px."""
        return self.chip_size + 2 * self.buffer


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        width: px.
        height: px.
        dtype: NumPy's name.
        nodata: One value or None per band.
        descriptions: One name or None per band.
        crs: "EPSG:32614", WKT, or None where the file has no place on the ground.
        bounds: (left, bottom, right, top) in units of the CRS, or None.
    """

    width: int
    height: int
    dtype: str
    nodata: tuple[float | None, ...]
    descriptions: tuple[str | None, ...]
    crs: str | None
    bounds: tuple[float, float, float, float] | None


def chip_header(path: Path, name: str, line: int = 0) -> Header:
    """The header of one GeoTIFF, without its pixels.

    Args:
        path: The file.
        name: How an error calls it.
        line: Its line in the catalog, or 0.

    Raises:
        ChipError: It is not a readable GeoTIFF.
    """
    content = _bytes_of(path, name, line, MAX_UNKNOWN_BYTES, "a chip can need")
    with readable(name, line), MemoryFile(content) as memory, memory.open(driver="GTiff") as source:
        return header_of(source)


def open_files(folder: Path, row: ChipRow, spec: ChipSpec, stack: ExitStack) -> list[Any]:
    """The opened files of a row, their headers checked against the spec before any pixel is decoded."""
    sources = []
    for image in row.images:
        content = _content(folder, image, row.line, spec)
        with readable(image, row.line):
            source = stack.enter_context(stack.enter_context(MemoryFile(content)).open(driver="GTiff"))
            _check_grid(image, row.line, source, spec)
        sources.append(source)
    _check_bands(row, sources, spec)
    return sources


def _content(folder: Path, image: str, line: int, spec: ChipSpec) -> bytes:
    """The bytes of one file, refused before reading where they cannot be a chip's."""
    fault = path_fault(image)
    if fault:
        raise chip_error(image, line, f"the path {fault}", "Write paths relative to the data folder")
    size = f"{spec.chip_size} x {spec.chip_size} px can need"
    return _bytes_of(folder / image, image, line, _most_bytes(spec), size)


def _most_bytes(spec: ChipSpec) -> int:
    return max(MAX_BYTES, 16 * 8 * len(spec.bands) * spec.read_px**2)


def _bytes_of(path: Path, image: str, line: int, limit: int, size: str) -> bytes:
    """The bytes of a regular file that is no larger than it may be."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise chip_error(image, line, "is not a regular file", "Point the row to a GeoTIFF")
        if status.st_size > limit:
            what = f"has {status.st_size / 2**20:.0f} MiB, far more than {size}"
            raise chip_error(image, line, what, "Cut the scene into chips first")
        content = path.read_bytes()
    except FileNotFoundError:
        raise chip_error(
            image, line, "not found", "Restore the file (git checkout data.dvc && dvc pull data), or drop the row"
        ) from None
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise chip_error(image, line, what, "Check the disk and the file's mode") from error
    if not content:
        raise chip_error(image, line, "is empty (0 bytes)", "Copy it again, or drop the row")
    return content


def _check_grid(image: str, line: int, source: Any, spec: ChipSpec) -> None:
    """Dtype, width, height and block size of one file."""
    low, high = spec.chip_size, spec.read_px
    width, height = source.width, source.height
    if not (low <= width <= high and low <= height <= high and (width - low) % 2 == 0 and (height - low) % 2 == 0):
        allowed = f"{low}" if low == high else f"{low} to {high} in steps of 2, buffer included"
        fix = f"Set data.chip_size to {width}" if width == height and low == high else "Cut it to that size"
        raise chip_error(image, line, f"is {width} x {height} px, data.chip_size asks for {allowed}", fix)
    dtypes = set(source.dtypes)
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        what = f"has dtype {'/'.join(sorted(dtypes))}, known are {', '.join(DTYPES)}"
        raise chip_error(image, line, what, "Convert it: gdal_translate -ot Float32")
    # A block is decoded as a whole, of all bands where they are interleaved, so that a huge one in a tiny file would
    # fill the memory.
    together = source.count if source.interleaving == Interleaving.pixel else 1
    deep = together * np.dtype(source.dtypes[0]).itemsize
    if any(rows * columns * deep > _most_bytes(spec) for rows, columns in source.block_shapes):
        what = f"has blocks of {source.block_shapes[0]} px"
        raise chip_error(image, line, what, "Write it again with smaller blocks")


def _check_bands(row: ChipRow, sources: Sequence[Any], spec: ChipSpec) -> None:
    """The row's files together have the named bands, in one dtype and size."""
    counts = [source.count for source in sources]
    if sum(counts) != len(spec.bands):
        found = " + ".join(str(count) for count in counts)
        what = f"has {found} band{'s' * (counts != [1])}, data.bands lists {len(spec.bands)} ({', '.join(spec.bands)})"
        raise chip_error(row.images[0], row.line, what, "List the file's bands in data.bands, in the file's order")
    for image, source in zip(row.images, sources, strict=True):
        kind = (source.dtypes[0], source.width, source.height)
        first = (sources[0].dtypes[0], sources[0].width, sources[0].height)
        if kind != first:
            what = "is {} of {} x {} px, but {} of the row is {} of {} x {} px".format(*kind, row.images[0], *first)
            raise chip_error(image, row.line, what, "Bring the row's files to one dtype and size")


def header_of(source: Any) -> Header:
    """A plain record of an opened file's header."""
    left, bottom, right, top = source.bounds
    somewhere = all(map(math.isfinite, source.bounds)) and left != right and bottom != top
    placed = source.crs is not None and not source.transform.is_identity and somewhere
    return Header(
        width=source.width,
        height=source.height,
        dtype=source.dtypes[0],
        nodata=tuple(source.nodatavals),
        descriptions=tuple(source.descriptions),
        crs=source.crs.to_string() if placed else None,
        # A raster that is stored south-up has its bounds the wrong way round.
        bounds=(min(left, right), min(bottom, top), max(left, right), max(bottom, top)) if placed else None,
    )


def check_same_place(row: ChipRow, headers: Sequence[Header]) -> None:
    """Stacked bands must show the same ground."""
    for image, header in zip(row.images, headers, strict=True):
        first = headers[0]
        if header.bounds is None or first.bounds is None:
            continue
        tolerance = (first.bounds[2] - first.bounds[0]) / first.width / 2
        apart = max(abs(a - b) for a, b in zip(header.bounds, first.bounds, strict=True))
        if header.crs != first.crs or apart > tolerance:
            what = f"lies elsewhere than {row.images[0]} of the same row ({_words(str(header.crs))} {header.bounds})"
            raise chip_error(image, row.line, what, "Stack only files of one place")


def check_descriptions(row: ChipRow, descriptions: Sequence[str | None], bands: Sequence[str]) -> None:
    """Names in the file that are known, but stand at another position, mean swapped bands."""
    if not all(descriptions):
        return
    known = [band.strip().lower() for band in bands]
    found = [str(name).strip().lower() for name in descriptions]
    if any(name in known and name != known[position] for position, name in enumerate(found)):
        what = f"its bands are described as {_words(', '.join(found))}, data.bands says {', '.join(bands)}"
        raise chip_error(row.images[0], row.line, what, "List data.bands in the files' order")


@contextmanager
def readable(image: str, line: int) -> Iterator[None]:
    """Makes what a damaged file raises, in all its kinds, the chip's own error.

    Raises:
        ChipError: What is done with the file cannot be done.
    """
    try:
        yield
    except ChipError:
        raise
    except DAMAGED as error:
        raise _unreadable(image, line, error) from error


def _unreadable(image: str, line: int, error: Exception) -> ChipError:
    """GDAL's complaint under the chip's own name; its text speaks of a memory file, its reason is the cause."""
    reason = str(error.__cause__ or error).splitlines()[0] if str(error) else type(error).__name__
    if "not recognized" in reason:
        return chip_error(image, line, "is not a GeoTIFF", "Convert it with gdal_translate, or drop the row")
    reason = re.sub(r"\S*[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\S*", "", reason).strip(" ,:")
    what = f"is truncated or damaged ({_words(reason)})"
    return chip_error(image, line, what, "Copy it again, or drop the row")


def _words(text: str) -> str:
    """A file's own words in a message: a few, and none that a terminal would obey."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
