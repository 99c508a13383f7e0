"""Write chips as GeoTIFF: small, without pyramids, byte for byte the same for the same content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from rasterio.transform import from_origin

from earthprior.files import write_atomic


def write_chip(
    path: Path,
    pixels: NDArray[np.generic],
    crs: str,
    left_top_m: tuple[float, float],
    pixel_m: float,
    descriptions: tuple[str, ...],
    nodata: float | None,
) -> None:
    """Write an array (C, H, W) as a GeoTIFF, complete or not at all.

    Args:
        path: File to write; its folder is made where missing.
        pixels: The bands; integer types are compressed with horizontal differencing unless they are a single uint8 band
            (classes have no gradient to exploit).
        crs: Such as "EPSG:32721".
        left_top_m: Map coordinates of the upper left corner, in a CRS of metres.
        pixel_m: Ground sampling distance.
        descriptions: One name per band.
        nodata: The value that marks missing pixels, or None.
    """
    bands, height, width = pixels.shape
    classes = bands == 1 and pixels.dtype == np.uint8
    profile = {
        "driver": "GTiff",
        "count": bands,
        "height": height,
        "width": width,
        "dtype": pixels.dtype.name,
        "crs": CRS.from_user_input(crs),
        "transform": from_origin(*left_top_m, pixel_m, pixel_m),
        "nodata": nodata,
        "compress": "deflate",
        # Level 9 takes three times as long for one per cent.
        "zlevel": 6,
        "predictor": 2 if np.issubdtype(pixels.dtype, np.integer) and not classes else 1,
        "interleave": "pixel",
        # One strip: a chip is always read whole, and small strips compress worse.
        "blockysize": height,
        # Else GDAL tags four 16-bit bands as colour plus alpha, and naive readers take NIR for opacity.
        "photometric": "MINISBLACK",
        "alpha": "UNSPECIFIED",
    }
    with MemoryFile() as memory:
        with memory.open(**profile) as dataset:
            dataset.write(pixels)
            dataset.descriptions = descriptions
        content = bytes(memory.getbuffer())
    write_atomic(path, content)
