"""Scenes: GeoTIFFs of any size, read window by window, and maps written on their grid.

GDAL reads a scene through a file object of Python's, so that here, too, it never sees a path and no sidecar.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import Interleaving
from rasterio.windows import Window

from earthprior.chips.content import open_content
from earthprior.chips.geotiff import DTYPES, own_words, readable
from earthprior.chips.problems import ChipError, chip_error
from earthprior.chips.read import nodata_values, valid_pixels
from earthprior.files import replacing

CACHE_BYTES = 128 * 2**20
"""What GDAL keeps of decoded blocks; by default it would be a twentieth of the machine's memory."""

LARGEST_BLOCK_BYTES = 256 * 2**20
"""A block is decoded as a whole; a file that is one block is no scene that can be read in parts."""

BLOCK_PX = 256
"""Width and height of the blocks of what is written."""


@dataclass(frozen=True)
class Grid:
    """Where a raster's pixels lie.

    Attributes:
        height: px.
        width: px.
        crs: rasterio's, or None.
        transform: From pixels to the CRS, maybe rotated; the identity where the file says nothing.
    """

    height: int
    width: int
    crs: Any
    transform: Any


class Scene:
    """One or several opened files of one place, whose bands are stacked.

    Args:
        image: What messages call it.
        line: Of the catalog, or 0.
        sources: Opened by rasterio.
        nodata: Values that mark missing data, or None for the files' own.

    Attributes:
        image: See above.
        grid: Where it lies.
        descriptions: One name or None per band.
        bands: Which of them are read, in order; all at first.
        tags: Of the first file.
    """

    def __init__(self, image: str, line: int, sources: Sequence[Any], nodata: Sequence[float] | None) -> None:
        self.image, self._line = image, line
        self._sources = sources
        first = sources[0]
        self.grid = Grid(first.height, first.width, first.crs, first.transform)
        self.descriptions: tuple[str | None, ...] = tuple(name for source in sources for name in source.descriptions)
        self.tags: dict[str, str] = first.tags()
        self._nodata = nodata_values(sources, nodata)
        self._places = [(source, index) for source in sources for index in source.indexes]
        self.bands: tuple[int, ...] = tuple(range(len(self._places)))

    def choose(self, bands: Sequence[str]) -> str | None:
        """Read these bands from now on: by the names in the file, or where it has none, by position.

        Args:
            bands: Names, as the model has them; compared without case.

        Returns:
            What a person should know of the choice, or None.

        Raises:
            ChipError: The file lacks some of them, or names them in another order than it is read in.
        """
        wanted = [band.strip().lower() for band in bands]
        found = [(name or "").strip().lower() for name in self.descriptions]
        if all(found.count(band) == 1 for band in wanted):
            self.bands = tuple(found.index(band) for band in wanted)
            return None
        described = own_words(", ".join(name or "?" for name in found))
        if len(found) != len(wanted):
            named = f", described as {described}" if any(found) else " without names"
            what = f"has {len(found)} band{'s' * (len(found) != 1)}{named}; the model takes {len(wanted)}"
            fix = "Bring a file with these bands in this order, or one whose band descriptions name them"
            raise chip_error(self.image, self._line, f"{what} ({', '.join(bands)})", fix, kind="has other bands")
        if any(name in wanted and name != wanted[place] for place, name in enumerate(found)):
            what = f"describes its bands as {described}; the model takes {', '.join(bands)}"
            raise chip_error(self.image, self._line, what, "Name them as the model does", kind="has other bands")
        self.bands = tuple(range(len(wanted)))
        return f"bands are taken by position as {', '.join(bands)}" + (f" (described as {described})" * any(found))

    def read(self, top: int, left: int, height: int, width: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """A window inside the scene.

        Returns:
            Pixels (C, height, width) in the file's dtype (float64 as float32), physical values, 0 where invalid; and
            valid (height, width).

        Raises:
            ChipError: The file is damaged.
        """
        window = Window(left, top, width, height)
        first = self._sources[0]
        pixels = np.empty((len(self.bands), height, width), first.dtypes[0])
        with readable(self.image, self._line):
            for source in self._sources:
                # One read a file: where bands lie pixel by pixel, each would decode the block again.
                targets = [at for at, band in enumerate(self.bands) if self._places[band][0] is source]
                if targets:
                    indexes = [self._places[self.bands[at]][1] for at in targets]
                    pixels[targets] = source.read(indexes, window=window)
        valid, _ = valid_pixels(pixels, [self._nodata[band] for band in self.bands])
        if not valid.all():
            pixels[:, ~valid] = 0
        return pixels.astype(np.float32) if pixels.dtype == np.float64 else pixels, valid


@contextmanager
def open_scene(
    folder: Path, images: Sequence[str], nodata: Sequence[float] | None = None, line: int = 0
) -> Iterator[Scene]:
    """A scene, or several files of one grid whose bands are stacked.

    Args:
        folder: What the files are relative to.
        images: The files.
        nodata: Values that mark missing data, or None for the files' own.
        line: Of the catalog, or 0.

    Raises:
        ChipError: A file is missing, damaged, no GeoTIFF, or cannot be read in parts; or they have several grids.
    """
    with ExitStack() as stack:
        sources = []
        for image in images:
            handle = stack.enter_context(open_content(folder, image, line))
            with readable(image, line):
                source = stack.enter_context(_opened(handle))
            _check(source, image, line)
            sources.append(source)
        for image, source in zip(images, sources, strict=True):
            _check_same_grid(sources[0], source, images[0], image, line)
        yield Scene(images[0], line, sources, nodata)


def _opened(handle: Any) -> Any:
    """A dataset that reads from the handle, whatever GDAL asks for under whatever name."""
    name = "scene.tif"

    def opener(path: str, mode: str = "rb", **_: Any) -> Any:
        if path != name:
            raise FileNotFoundError(path)
        return _Borrowed(handle)

    return rasterio.open(name, driver="GTiff", opener=opener)


class _Borrowed:
    """A file object whose end is not GDAL's to decide."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> _Borrowed:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def close(self) -> None:
        """Nothing: who opened the file closes it."""


def _check(source: Any, image: str, line: int) -> None:
    dtypes = set(source.dtypes)
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        what = f"has dtype {'/'.join(sorted(dtypes))}, known are {', '.join(DTYPES)}"
        raise chip_error(image, line, what, "Convert it: gdal_translate -ot Float32")
    together = source.count if source.interleaving is Interleaving.pixel else 1
    block_bytes = max(height * width for height, width in source.block_shapes) * together
    if block_bytes * np.dtype(source.dtypes[0]).itemsize > LARGEST_BLOCK_BYTES:
        height, width = source.block_shapes[0]
        what = f"has blocks of {height} x {width} px, each to be decoded as a whole"
        raise chip_error(
            image, line, what, "Write it again in tiles: gdal_translate -co TILED=YES -co COMPRESS=DEFLATE"
        )


def _check_same_grid(first: Any, source: Any, name: str, image: str, line: int) -> None:
    same = (source.height, source.width, source.crs) == (first.height, first.width, first.crs)
    if not same or source.dtypes[0] != first.dtypes[0] or not source.transform.almost_equals(first.transform, 1e-6):
        what = f"lies on another grid than {name}, or has another dtype"
        raise chip_error(image, line, what, "Stack only files of one grid and dtype")


class Map:
    """A raster that is being written, in rows from top to bottom, part by part of its width.

    Args:
        target: Opened by rasterio.
        height: px.
    """

    def __init__(self, target: Any, height: int) -> None:
        self._target, self._height = target, height
        self._waiting: list[NDArray[Any]] = []
        self._top = 0

    def write(self, left: int, rows: NDArray[Any]) -> None:
        """Rows (K, n, W) that follow those before, whose first column is `left`; the last ones end a part.

        Whole blocks are written at a time: a block that is begun twice is compressed twice, and lies in the file twice.
        """
        self._waiting.append(rows)
        ready = sum(part.shape[1] for part in self._waiting)
        last = self._top + ready == self._height
        count = ready if last else ready // BLOCK_PX * BLOCK_PX
        if count == 0:
            return
        joined = np.concatenate(self._waiting, axis=1)
        self._target.write(joined[:, :count], window=Window(left, self._top, joined.shape[2], count))
        self._waiting = [] if last else [joined[:, count:]]
        self._top = 0 if last else self._top + count


@contextmanager
def write_map(
    path: Path,
    grid: Grid,
    dtype: str,
    names: Sequence[str],
    nodata: float,
    tags: Mapping[str, str],
    colours: Mapping[int, tuple[int, int, int]] | None = None,
) -> Iterator[Map]:
    """A GeoTIFF in compressed tiles, complete or not at all; BigTIFF where it may grow beyond 4 GB.

    Args:
        path: File to write.
        grid: Where it lies.
        dtype: NumPy's name.
        names: One per band.
        nodata: Marks pixels without data.
        tags: Kept in the file.
        colours: Per value, for a single uint8 band.
    """
    profile = {
        "driver": "GTiff",
        "height": grid.height,
        "width": grid.width,
        "count": len(names),
        "dtype": dtype,
        "nodata": nodata,
        "crs": grid.crs,
        # Of a file without a place this would be a warning.
        "transform": None if grid.transform.is_identity else grid.transform,
        "tiled": True,
        "blockxsize": BLOCK_PX,
        "blockysize": BLOCK_PX,
        "compress": "deflate",
        "zlevel": 6,
        "predictor": 3 if dtype == "float32" else 1,
        # Band by band, as one is looked at at a time.
        "interleave": "band",
        "bigtiff": "IF_SAFER",
        "photometric": "MINISBLACK",
        "alpha": "UNSPECIFIED",
    }
    if colours:
        profile["photometric"] = "PALETTE"
    with (
        replacing(path) as temporary,
        rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES),
        rasterio.open(temporary, "w", **profile) as target,
    ):
        target.descriptions = tuple(names)
        target.update_tags(**tags)
        if colours:
            target.write_colormap(1, {value: (*colour, 255) for value, colour in colours.items()})
        yield Map(target, grid.height)


def tags_of(path: Path) -> dict[str, str]:
    """The tags of a map that was written before; none where it is no readable GeoTIFF."""
    try:
        with open_scene(path.parent, [path.name]) as scene:
            return scene.tags
    except ChipError:
        return {}
