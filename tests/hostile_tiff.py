"""GeoTIFFs whose headers and bytes were changed, and other files of that name."""

from __future__ import annotations

import functools
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.io import MemoryFile
from rasterio.transform import from_origin

from earthprior.chips.catalog import ChipRow
from earthprior.chips.read import ChipSpec, chip_header, inspect_chip, read_chip, read_label
from earthprior.errors import EarthPriorError
from hostile_text import PLACE

BANDS = ("red", "green", "blue", "nir")
PROFILES: tuple[dict[str, Any], ...] = (
    {}, {"compress": "deflate"}, {"compress": "lzw", "predictor": 2}, {"compress": "zstd"}, {"compress": "packbits"},
    {"compress": "lzma"}, {"compress": "lerc"}, {"compress": "jpeg", "dtype": "uint8"},
    {"compress": "webp", "dtype": "uint8"},
    {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"}, {"BIGTIFF": "YES"},
    {"ENDIANNESS": "BIG"},
    {"interleave": "band", "BIGTIFF": "YES", "ENDIANNESS": "BIG"},
    {"dtype": "float32", "predictor": 3, "compress": "deflate"},
    {"dtype": "float64"}, {"dtype": "int16"}, {"NBITS": 12}, {"dtype": "complex64"}, {"dtype": "uint32"},
    {"photometric": "ycbcr", "compress": "jpeg", "dtype": "uint8"},
    {"copy_src_overviews": True},
)  # fmt: skip
VRT = f"""<VRTDataset rasterXSize="16" rasterYSize="16"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>
<SourceFilename>/vsicurl/http://{PLACE}/x.tif</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"""
WMS = f"""<GDAL_WMS><Service name="TMS"><ServerUrl>http://{PLACE}/${{z}}/${{x}}/${{y}}</ServerUrl></Service><DataWindow>
<UpperLeftX>-1</UpperLeftX><UpperLeftY>1</UpperLeftY><LowerRightX>1</LowerRightX><LowerRightY>-1</LowerRightY>
<TileLevel>1</TileLevel></DataWindow><Projection>EPSG:3857</Projection><BandsCount>4</BandsCount></GDAL_WMS>"""
XML = (
    VRT, WMS, f"http://{PLACE}/x.tif", f"<html><img src='http://{PLACE}'></html>", "SIMPLE  =   T",
    f'<!DOCTYPE x [<!ENTITY y SYSTEM "http://{PLACE}/">]><VRTDataset>&y;</VRTDataset>',
)  # fmt: skip
TAGS = (254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 330, 338, 339,
  347, 530, 700, 33550, 33922, 34264, 34675, 34735, 34736, 34737, 42112, 42113, 50674, 50844)  # fmt: skip
SIZES = (0, 1, 2, 3, 4, 7, 8, 16, 17, 255, 1000, 32773, 34712, 34887, 34925, 50000, 50001, 65535, 2**16, 2**31 - 1,
  2**31, 2**32 - 1)  # fmt: skip


@functools.cache
def good_tiffs() -> tuple[bytes, ...]:
    """Chips of 16 x 16 px in many forms, some with addresses in their metadata."""
    found = []
    pixels = np.random.default_rng(0).integers(1, 200, (4, 16, 16))
    for index, profile in enumerate(PROFILES):
        options = {"dtype": "uint16", **profile}
        place = {"crs": "EPSG:32614", "transform": from_origin(500_000, 5e6, 5, 5)} if index % 4 else {}
        count = 3 if "photometric" in profile else 4
        with MemoryFile() as memory:
            with memory.open(driver="GTiff", count=count, width=16, height=16, nodata=7, **place, **options) as target:
                target.write(pixels[:count].astype(options["dtype"]))
                target.descriptions = BANDS[:count]
                address = f"/vsicurl/http://{PLACE}/x.tif"
                target.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=address)
                target.update_tags(ns="GEOLOCATION", X_DATASET=address, Y_DATASET=address)
                target.update_tags(1, ns="OVERVIEWS", MASK_OVERVIEW_0=address)
                target.update_tags(INTERNAL_MASK_FLAGS_1="2", AREA_OR_POINT="Point", address=address)
            found.append(memory.read())
    return tuple(found)


def some_tiff(draw: random.Random) -> bytes:
    """A chip with its header, its values or its bytes changed, cut short, or something else of that name."""
    kind = draw.random()
    if kind < 0.04:
        return draw.choice(XML).encode()
    content = bytearray(draw.choice(good_tiffs()))
    if kind < 0.1:
        return bytes(content[: draw.randrange(len(content))])
    if kind < 0.14:
        return bytes(content + draw.choice(good_tiffs()))
    if kind < 0.18:
        return bytes(content[:8]) + draw.randbytes(draw.randrange(600))
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3, 8))):
        if draw.random() < 0.25:
            content[draw.randrange(len(content))] = draw.randrange(256)
        else:
            _change_entry(draw, content)
    return bytes(content)


def _change_entry(draw: random.Random, content: bytearray) -> None:
    """Change the tag, type, count or value of one entry of the first directory."""
    order = "<" if content[:2] == b"II" else ">"
    big = 43 in content[2:4]
    word, head, size = ("Q", 8, 20) if big else ("I", 2, 12)
    try:
        (start,) = struct.unpack_from(order + word, content, 8 if big else 4)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), content, start)
        place = start + head + size * draw.randrange(min(count, 60))
        kind = draw.random()
        if kind < 0.15:
            struct.pack_into(order + "H", content, place, draw.choice((*TAGS, draw.randrange(2**16))))
        elif kind < 0.25:
            struct.pack_into(order + "H", content, place + 2, draw.randrange(20))
        elif kind < 0.45:
            struct.pack_into(order + word, content, place + 4, draw.choice((*SIZES, draw.randrange(2**16))))
        elif kind < 0.9:
            value = draw.choice((*SIZES, draw.randrange(2**32), draw.randrange(len(content))))
            struct.pack_into(order + "I", content, place + 4 + struct.calcsize(order + word), value)
        else:
            for old, new in (
                (b"7\0", draw.choice((b"inf", b"nan", b"-1", b"1e9", b"\xff\xfe"))),
                (b"</Item>", b"\xff</Item"),
            ):
                found = content.rfind(old)
                if found >= 0:
                    content[found : found + len(new)] = new
    except (struct.error, ValueError):
        content[draw.randrange(len(content))] = draw.randrange(256)


def read_tiff(folder: Path, content: bytes) -> None:
    """Read a file as a chip, as a label and for its header; it is taken if any of them takes it."""
    (folder / "data/hostile.tif").write_bytes(content)
    row = ChipRow(2, "train", ("hostile.tif",), {"label": "hostile.tif"})
    spec = ChipSpec(BANDS, 16, 0, None)
    refused = []
    for read in (
        lambda: inspect_chip(folder / "data", row, spec),
        lambda: read_chip(folder / "data", row, spec),
        lambda: read_label(folder / "data", row, "label", spec),
        lambda: chip_header(folder / "data", "hostile.tif"),
    ):
        try:
            read()
        except EarthPriorError as error:
            refused.append(error)
    assert all(len(str(error)) < 2000 for error in refused)
    if len(refused) == 4:
        raise refused[0]
