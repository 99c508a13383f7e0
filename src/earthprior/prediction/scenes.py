"""Maps of scenes: read, normalized, predicted and blended strip by strip, so that memory does not grow with the height.

Wide scenes are worked through in parts of their width; tiles that reach into two parts are predicted twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from earthprior.chips.scene import BLOCK_PX, Scene
from earthprior.prediction.tiling import TILES_AT_ONCE, Blend, Placed, mirrored, place

BAND_BYTES = 64 * 2**20
"""Of the map that is under way, which bounds the width of a part."""


class MapModel(Protocol):
    """What a scene is mapped by."""

    def normalize(self, raw: Tensor, valid: Tensor) -> Tensor:
        """Physical values (N, C, H, W) and where there is data (N, H, W) -> x0."""

    def predict(self, x0: Tensor) -> Tensor:
        """Maps (N, K, H, W) of tiles."""


@dataclass(frozen=True)
class Tiling:
    """How a scene is cut.

    Attributes:
        px: Width and height of a tile.
        overlap_px: Of neighbouring tiles.
        around_px: Width and height of what a tile is normalized with: the tile itself where the statistics are the
            training chips', else the surroundings as large as a chip, by whose statistics it was in training.
    """

    px: int
    overlap_px: int
    around_px: int


@dataclass(frozen=True)
class Rows:
    """Finished rows of a part of a map.

    Attributes:
        left: First column.
        values: (K, n, W) float32, or None where no pixel has data.
        valid: (n, W).
    """

    left: int
    values: NDArray[np.float32] | None
    valid: NDArray[np.bool_]


def map_rows(scene: Scene, model: MapModel, tiling: Tiling, channels: int, device: torch.device) -> Iterator[Rows]:
    """The map of a scene, part by part from the left, each from top to bottom.

    Args:
        scene: Its bands chosen as the model has them.
        model: Gives `channels` values per pixel.
        tiling: How it is cut.
        channels: K.
        device: Of the model.

    Raises:
        ChipError: The file is damaged.
    """
    width = scene.grid.width
    columns = place(width, tiling.px, tiling.overlap_px)
    # Whole blocks, and never so narrow that most tiles would lie in two parts.
    part_px = max(4 * tiling.px, BAND_BYTES // (4 * channels * tiling.px))
    part_px = -(-part_px // BLOCK_PX) * BLOCK_PX
    for start in range(0, width, part_px):
        stop = min(start + part_px, width)
        served = [tile for tile in columns if tile.origin < stop and tile.origin + tiling.px > start]
        yield from _part(scene, model, tiling, served, (start, stop), device)


def _part(
    scene: Scene,
    model: MapModel,
    tiling: Tiling,
    columns: Sequence[Placed],
    part: tuple[int, int],
    device: torch.device,
) -> Iterator[Rows]:
    start, stop = part
    rows = place(scene.grid.height, tiling.px, tiling.overlap_px)
    blend = Blend(scene.grid.height, rows, start, stop)
    for row in rows:
        strip = _Strip(scene, tiling, row.origin, columns)
        waiting = (tile for tile in columns if strip.has_data(tile.origin))
        while some := list(islice(waiting, TILES_AT_ONCE)):
            blend.add(_predicted(model, strip, tiling.px, [tile.origin for tile in some], device), some)
        count, values = blend.advance()
        valid = strip.valid_rows(count, start, stop)
        yield Rows(start, None if values is None or not valid.any() else values[0].cpu().numpy(), valid)


@torch.no_grad()
def _predicted(model: MapModel, strip: _Strip, px: int, origins: Sequence[int], device: torch.device) -> Tensor:
    """Maps (N, 1, K, px, px) of some tiles of a strip."""
    cut = [strip.around(origin) for origin in origins]
    raw = torch.from_numpy(np.stack([pixels for pixels, _, _, _ in cut])).to(device)
    valid = torch.from_numpy(np.stack([mask for _, mask, _, _ in cut])).to(device)
    normalized = model.normalize(raw, valid)
    tiles = [x0[:, top : top + px, left : left + px] for x0, (_, _, top, left) in zip(normalized, cut, strict=True)]
    return model.predict(mirrored(torch.stack(tiles), px))[:, None]


class _Strip:
    """What a row of tiles needs of a scene: their rows, and those around them.

    Args:
        scene: Read from.
        tiling: How it is cut.
        top: First row of the tiles.
        columns: The tiles.
    """

    def __init__(self, scene: Scene, tiling: Tiling, top: int, columns: Sequence[Placed]) -> None:
        self._tiling, self._grid = tiling, scene.grid
        self._top = self._begin(top, scene.grid.height)
        self._row = top - self._top
        self._left = self._begin(columns[0].origin, scene.grid.width)
        right = self._begin(columns[-1].origin, scene.grid.width) + tiling.around_px
        height = min(tiling.around_px, scene.grid.height)
        width = min(right, scene.grid.width) - self._left
        self._pixels, self._valid = scene.read(self._top, self._left, height, width)

    def has_data(self, origin: int) -> bool:
        """Whether any pixel of the tile at this column has."""
        left, px = origin - self._left, self._tiling.px
        return bool(self._valid[self._row : self._row + px, left : left + px].any())

    def around(self, origin: int) -> tuple[NDArray[Any], NDArray[np.bool_], int, int]:
        """Pixels, their validity, and where in them the tile at this column begins (row, column)."""
        begin = self._begin(origin, self._grid.width)
        window = slice(begin - self._left, begin - self._left + self._tiling.around_px)
        return self._pixels[:, :, window], self._valid[:, window], self._row, origin - begin

    def valid_rows(self, count: int, start: int, stop: int) -> NDArray[np.bool_]:
        """Validity of the tiles' first rows, from column `start` to `stop`."""
        return self._valid[self._row : self._row + count, start - self._left : stop - self._left]

    def _begin(self, origin: int, size_px: int) -> int:
        """First pixel of what surrounds a tile along one axis: the tile in its middle, but inside the scene."""
        around = self._tiling.around_px
        return max(0, min(origin - (around - self._tiling.px) // 2, size_px - around))
