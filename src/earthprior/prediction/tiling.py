"""One map from overlapping tiles, without seams: for chips, and for scenes of any size.

A network knows least at a tile's rim, where half of the surroundings is missing. So a tile counts most in its middle,
and between two neighbours the one fades into the other over the middle half of their overlap; what lies further out
counts only at the rim of the scene, where there is nothing else. A network that looks no further than a quarter of the
overlap is reproduced exactly, wherever the tiles lie; one that looks at the pixel alone whatever the overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor

from earthprior.chips.crops import grid_origins

TileFunction: TypeAlias = Callable[[Tensor], Tensor]
"""Tiles (N, C, px, px) -> maps (N, K, px, px)."""

TILES_AT_ONCE = 16

_RIM = 1e-6
"""Weight of a tile's rim beside its middle: nothing, yet enough where it is all there is."""


@dataclass(frozen=True)
class Placed:
    """A tile along one axis.

    Attributes:
        origin: Its first pixel.
        weights: (px,) float32, what each of its pixels counts; over all tiles they add up to 1 at every pixel.
    """

    origin: int
    weights: Tensor


def default_overlap(px: int) -> int:
    """Half a tile, px."""
    return px // 2


def place(size_px: int, px: int, overlap_px: int) -> list[Placed]:
    """The tiles that cover `size_px` along one axis; a single one that reaches beyond it where that is smaller.

    Raises:
        ValueError: The overlap is not in [0, px).
    """
    if not 0 <= overlap_px < px:
        raise ValueError(f"tiles of {px} px cannot overlap by {overlap_px} px")
    origins = grid_origins(size_px, px, overlap_px)
    window = _window(px, overlap_px)
    total = torch.zeros(max(size_px, px), dtype=torch.float64)
    for origin in origins:
        total[origin : origin + px] += window
    return [Placed(origin, (window / total[origin : origin + px]).float()) for origin in origins]


def _window(px: int, overlap_px: int) -> Tensor:
    """(px,) float64: 1 in the middle, falling as a squared sine over half the overlap, about 0 at the outer quarter."""
    rim = overlap_px // 4
    ramp = max(1, overlap_px - 2 * rim)
    outward = torch.arange(px, dtype=torch.float64)
    inward = torch.minimum(outward, outward.flip(0)) + 0.5 - rim
    return torch.sin((inward / ramp).clamp(0, 1) * (torch.pi / 2)).square().clamp(min=_RIM)


def mirrored(x: Tensor, px: int) -> Tensor:
    """Grown at bottom and right to at least px x px by mirroring, again and again where need be.

    Args:
        x: (..., H, W).
        px: Of a tile.
    """
    for axis in (-2, -1):
        size = x.shape[axis]
        if size < px:
            period = max(1, 2 * (size - 1))
            there = torch.arange(px, device=x.device) % period
            x = x.index_select(axis, torch.minimum(there, period - there) if size > 1 else there)
    return x


class Blend:
    """Rows of tiles, added from top to bottom, and the rows of the map that no further tile can change.

    Holds a band of the map as high as a tile, whatever the height of the whole.

    Args:
        height: Of the whole map, px.
        rows: The tiles along the height, as `place` puts them.
        start: First column of the part of the map that is wanted.
        stop: The column after its last.
    """

    def __init__(self, height: int, rows: Sequence[Placed], start: int, stop: int) -> None:
        self._height, self._start, self._stop = height, start, stop
        self._rows = rows
        self._row = 0
        self._band: Tensor | None = None

    def add(self, tiles: Tensor, columns: Sequence[Placed]) -> None:
        """Add tiles of the current row.

        Args:
            tiles: (N, B, K, px, px): N places, of B maps at once.
            columns: The places along the width (N,).
        """
        tiles = tiles.float()
        down = self._rows[self._row].weights.to(tiles.device)[:, None]
        px = tiles.shape[-1]
        if self._band is None:
            self._band = tiles.new_zeros(*tiles.shape[1:3], px, self._stop - self._start)
        for tile, column in zip(tiles, columns, strict=True):
            first, last = max(column.origin, self._start), min(column.origin + px, self._stop)
            inside = slice(first - column.origin, last - column.origin)
            weights = down * column.weights[inside].to(tiles.device)
            self._band[..., first - self._start : last - self._start] += tile[..., inside] * weights

    def advance(self) -> tuple[int, Tensor | None]:
        """End the row: how many rows of the map are done with it, and these rows (B, K, n, stop - start).

        None instead of them where neither this row had a tile nor any before it.
        """
        here = self._rows[self._row].origin
        self._row += 1
        last = self._row == len(self._rows)
        count = (self._height if last else self._rows[self._row].origin) - here
        if self._band is None:
            return count, None
        done = self._band[..., :count, :].clone()
        self._band = torch.cat([self._band[..., count:, :], torch.zeros_like(done)], dim=-2)
        return count, done


@torch.no_grad()
def predict_chip(fn: TileFunction, x0: Tensor, px: int, overlap: int | None = None) -> Tensor:
    """A map of whole chips, tile by tile.

    Args:
        fn: Makes maps (N, K, px, px) of tiles (N, C, px, px).
        x0: Chips (B, C, H, W), normalized; of any size, also smaller than a tile.
        px: Width and height of a tile: what the network was trained on.
        overlap: Of neighbouring tiles, px; half a tile by default.

    Returns:
        (B, K, H, W), of what `fn` returns (probabilities stay probabilities: every pixel is a weighted mean).
    """
    height, width = x0.shape[-2:]
    overlap = default_overlap(px) if overlap is None else overlap
    x0 = mirrored(x0, px)
    columns = place(width, px, overlap)
    rows = place(height, px, overlap)
    blend, parts = Blend(height, rows, 0, width), []
    for row in rows:
        tiles = (x0[..., row.origin : row.origin + px, c.origin : c.origin + px] for c in columns)
        for places, maps in _mapped(fn, zip(columns, tiles, strict=True), max(1, TILES_AT_ONCE // len(x0))):
            blend.add(maps, places)
        _, done = blend.advance()
        assert done is not None
        parts.append(done)
    return torch.cat(parts, dim=-2)


def _mapped(
    fn: TileFunction, tiles: Iterable[tuple[Placed, Tensor]], at_once: int
) -> Iterator[tuple[list[Placed], Tensor]]:
    """Some places at a time, and their maps (N, B, K, px, px)."""
    waiting = iter(tiles)
    while part := list(islice(waiting, at_once)):
        stacked = torch.stack([tile for _, tile in part])
        maps = fn(stacked.flatten(0, 1))
        yield [where for where, _ in part], maps.reshape(*stacked.shape[:2], *maps.shape[1:])
