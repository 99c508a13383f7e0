"""GeoTIFF files as GDAL may see them: opened from memory, their headers checked before any pixel is decoded.

A chip's bytes are read by Python and handed to GDAL as memory, with the GTiff driver alone. So GDAL never sees a path:
no URL, no /vsi prefix, no VRT or service description named .tif, and no sidecar (.aux.xml, .ovr, .msk) can make it read
anything else, whatever GDAL options are set (those are global to the process, and threads would race on them). This
costs no more time than opening the path.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
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

from earthprior.chips.catalog import ChipRow
from earthprior.chips.content import read_content
from earthprior.chips.problems import ChipError, chip_error
from earthprior.params import FileParams

DTYPES = ("uint8", "uint16", "int16", "float32", "float64")
"""What a chip may hold; all of them fit float32's range."""

DAMAGED = (RasterioError, OSError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError)
"""What a damaged file makes rasterio raise: for text that is not UTF-8, sizes that are none, a CRS that is none, ..."""

LONGEST = 200
"""Of a file's own words in a message."""

MAX_BYTES = 64 * 2**20
"""A chip's file may be this large, or 16 times its pixels where that is more; anything else is a scene, not a chip."""

LARGEST_CHIP_PX = 4096
"""What is wider is a scene."""

MAX_UNKNOWN_BYTES = 4 * MAX_BYTES
"""The same where nobody has said yet how large chips are."""

MAX_BLOCK_BYTES = 32 * 2**20
"""A block may decode to this much, or 16 times the chip; each reader thread may hold one."""

# Chips without coordinates are legitimate, and the warning would name a memory file that no one knows.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
# Faults come back as exceptions with the file's name; rasterio's own log lines, libtiff's warnings among them, lack it.
logging.getLogger("rasterio").addHandler(logging.NullHandler())
logging.getLogger("rasterio").propagate = False


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
    def from_params(cls, data: FileParams) -> ChipSpec:
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


def chip_header(folder: Path, image: str, line: int = 0) -> tuple[Header, str]:
    """The header of one GeoTIFF, without its pixels, and the SHA-256 of the file in hex.

    Args:
        folder: The data folder.
        image: The file, relative to it.
        line: Its line in the catalog, or 0.

    Raises:
        ChipError: It is not a readable GeoTIFF.
    """
    content = read_content(folder, image, line, MAX_UNKNOWN_BYTES)
    with readable(image, line), MemoryFile(content) as memory, memory.open(driver="GTiff") as source:
        return header_of(source), hashlib.sha256(content).hexdigest()


def open_files(folder: Path, row: ChipRow, spec: ChipSpec, stack: ExitStack, verify: bool = False) -> list[Any]:
    """The opened files of a row, their headers checked against the spec before any pixel is decoded.

    With `verify`, the files must hash to what the catalog says, where it says something.
    """
    sources = []
    limit = max(MAX_BYTES, 16 * 8 * len(spec.bands) * spec.read_px**2)
    hashes = row.hashes if verify and row.hashes else ("",) * len(row.images)
    for image, sha256 in zip(row.images, hashes, strict=True):
        content = read_content(folder, image, row.line, limit, sha256)
        with readable(image, row.line):
            source = stack.enter_context(stack.enter_context(MemoryFile(content)).open(driver="GTiff"))
            _check_grid(image, row.line, source, spec)
        sources.append(source)
    _check_bands(row, sources, spec)
    return sources


def _check_grid(image: str, line: int, source: Any, spec: ChipSpec) -> None:
    """Dtype, width, height and block size of one file."""
    low, high = spec.chip_size, spec.read_px
    width, height = source.width, source.height
    if not (low <= width <= high and low <= height <= high and (width - low) % 2 == 0 and (height - low) % 2 == 0):
        allowed = f"{low}" if low == high else f"{low} to {high} in steps of 2, buffer included"
        plausible = width == height <= LARGEST_CHIP_PX and low == high
        # Of one chip nobody knows whether the others are so, too.
        fix = "Cut it to that size" + f"; only if all chips are so, set data.chip_size to {width}" * plausible
        raise chip_error(image, line, f"is {width} x {height} px, data.chip_size asks for {allowed}", fix)
    dtypes = set(source.dtypes)
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        what = f"has dtype {'/'.join(sorted(dtypes))}, known are {', '.join(DTYPES)}"
        raise chip_error(image, line, what, "Convert it: gdal_translate -ot Float32")
    # A block is decoded as a whole, so that a huge one in a tiny file would fill the memory; all its bands at once
    # where they lie pixel by pixel.
    together = source.count if source.interleaving is Interleaving.pixel else 1
    pixel_bytes = np.dtype(source.dtypes[0]).itemsize * together
    if any(max(MAX_BLOCK_BYTES, 16 * pixel_bytes * high**2) < h * w * pixel_bytes for h, w in source.block_shapes):
        what = f"has blocks of {source.block_shapes[0]} px"
        raise chip_error(image, line, what, "Write it again with smaller blocks")


def _check_bands(row: ChipRow, sources: Sequence[Any], spec: ChipSpec) -> None:
    """The row's files together have the named bands, in one dtype and size."""
    counts = [source.count for source in sources]
    if sum(counts) != len(spec.bands):
        found = " + ".join(str(count) for count in counts)
        what = f"has {found} band{'s' * (counts != [1])}, data.bands lists {len(spec.bands)} ({', '.join(spec.bands)})"
        fix = "Write it with these bands; only if all chips are so, list theirs in data.bands, in the files' order"
        raise chip_error(row.images[0], row.line, what, fix)
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
            what = f"lies elsewhere than {row.images[0]} of the same row ({own_words(str(header.crs))} {header.bounds})"
            raise chip_error(image, row.line, what, "Stack only files of one place")


def check_descriptions(row: ChipRow, descriptions: Sequence[str | None], bands: Sequence[str]) -> None:
    """Names in the file that are known, but stand at another position, mean swapped bands."""
    if not all(descriptions):
        return
    known = [band.strip().lower() for band in bands]
    found = [str(name).strip().lower() for name in descriptions]
    if any(name in known and name != known[position] for position, name in enumerate(found)):
        what = f"its bands are described as {own_words(', '.join(found))}, data.bands says {', '.join(bands)}"
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
    reason = re.sub(r"\S*[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\S*", "", reason).strip(" ,:")
    kind = "is truncated or damaged"
    if "not recognized" in reason:
        # It begins like a TIFF, else it would not have come here.
        reason = "its header makes no sense"
    return chip_error(image, line, f"{kind} ({own_words(reason)})", "Copy it again, or drop the row", kind=kind)


def own_words(text: str) -> str:
    """A file's own words in a message: a few, and none that a terminal would obey."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
