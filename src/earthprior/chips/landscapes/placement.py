"""Where the chips of a procedural set lie on the ground, and which of them are neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from earthprior.errors import DataError
from earthprior.randomness import numpy_generator

PIXEL_M = 4.77
BLOCK = 16  # chips in a block of four by four
FIRST_ZONE, LAST_ZONE = 21, 60
WEST_M, EAST_M = 260_000.0, 740_000.0
NORTH_M, SOUTH_M = 9_500_000.0, 7_500_000.0  # southern tropics


@dataclass(frozen=True)
class Place:
    """Upper left corner of a chip in metres of a UTM zone on the southern hemisphere."""

    crs: str
    left_m: float
    top_m: float

    def centre_m(self, size: int) -> tuple[float, float]:
        """The middle of a chip of `size` px."""
        half = size * PIXEL_M / 2
        return self.left_m + half, self.top_m - half


def place(seed: int, index: int, size: int) -> Place:
    """Position of a chip, a function of (seed, index, size) alone.

    Chips of consecutive numbers lie in blocks of four by four, and fours of them in quarters of a block, so that a
    region of 4 or 16 consecutive chips is compact. Each is moved at random within its cell; at least 8 px stay between
    chips.

    Raises:
        DataError: The set would not fit on the southern tropics of all UTM zones.
    """
    cell_px = size + size // 4 + 8
    jitter_px = numpy_generator(seed, "place", index).integers(0, size // 4 + 1, 2)
    block_m = (4 * cell_px + size // 2) * PIXEL_M
    columns, rows = int((EAST_M - WEST_M) / block_m), int((NORTH_M - SOUTH_M) / block_m)
    if columns == 0 or rows == 0:
        raise DataError(f"size {size} px is too large: 16 such chips do not fit into a UTM zone; choose a smaller size")
    block, within = divmod(index, BLOCK)
    zone_step, in_zone = divmod(block, columns * rows)
    if FIRST_ZONE + zone_step > LAST_ZONE:
        fit = (LAST_ZONE - FIRST_ZONE + 1) * columns * rows * BLOCK
        raise DataError(f"n is too large: {fit:,} chips of {size} px fit on the ground; choose fewer or smaller chips")
    quarter, inner = divmod(within, 4)
    column = 2 * (quarter % 2) + inner % 2
    row = 2 * (quarter // 2) + inner // 2
    left = WEST_M + (in_zone % columns) * block_m + (column * cell_px + int(jitter_px[0])) * PIXEL_M
    top = NORTH_M - (in_zone // columns) * block_m - (row * cell_px + int(jitter_px[1])) * PIXEL_M
    return Place(f"EPSG:{32700 + FIRST_ZONE + zone_step}", round(left, 2), round(top, 2))


def region_size(n: int, validate_fraction: float) -> int:
    """Chips per region: blocks where there are many, fewer where the split would else be too coarse."""
    smaller_split = round(n * min(validate_fraction, 1 - validate_fraction))
    return next((side for side in (BLOCK, 4) if n >= 20 * side and smaller_split >= side), 1)


def usages(seed: int, n: int, validate_fraction: float) -> list[str]:
    """`train` or `validate` for each chip; whole regions go to one side, and neither side is empty."""
    side = region_size(n, validate_fraction)
    regions = -(-n // side)
    wanted = int(np.clip(round(n * validate_fraction / side), 1, regions - 1))
    chosen = set(numpy_generator(seed, "split").permutation(regions)[:wanted].tolist())
    return ["validate" if index // side in chosen else "train" for index in range(n)]
