"""Where people divide the land: a rotated, gently bent grid of rectangles for fields, blocks and building lots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from earthprior.chips.landscapes.noise import Plane

# Outlines are drawn at twice the chip's resolution and averaged, so that slanted edges come out as mixed pixels.
OVERSAMPLING = 2

Ids = NDArray[np.int32]
Piece = tuple[tuple[float, ...], tuple[bool, ...], int]  # bounds, sides with roads, depth


@dataclass(frozen=True)
class Grid:
    """Plane coordinates (u, v) in px of every half-pixel, rotated against the image and bent.

    Attributes:
        u: (2S, 2S) coordinate along the rows of fields.
        v: (2S, 2S) coordinate across them.
        angle: Rotation of the u axis against the image's x axis, radians.
        reach: Coordinates lie within [-reach, reach].
    """

    u: Plane
    v: Plane
    angle: float
    reach: float


@dataclass(frozen=True)
class Division:
    """Rectangles in the (u, v) plane.

    Attributes:
        rects: (K, 4) bounds u0, u1, v0, v1 in px.
        roads: (K, 4) True where that side of the rectangle lies on a road.
    """

    rects: Plane
    roads: NDArray[np.bool_]


def make_grid(rng: np.random.Generator, size: int, bend_px: float) -> Grid:
    """A grid of random direction; `bend_px` moves its knots, so that fields become irregular quadrilaterals."""
    angle = float(rng.uniform(-np.pi / 4, np.pi / 4))
    count = size * OVERSAMPLING
    axis = ((np.arange(count, dtype=np.float32) + 0.5) / OVERSAMPLING - size / 2).astype(np.float32)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u = axis[None, :] * cos + axis[:, None] * sin
    v = axis[:, None] * cos - axis[None, :] * sin
    for plane in (u, v):
        plane += _bent(rng, count, bend_px)
    # Surveyed land is square only in part: shear the one direction against the other.
    u += np.float32(rng.normal(0.0, 0.004 * bend_px)) * v
    reach = float(max(np.abs(u).max(), np.abs(v).max())) + 1.0
    return Grid(u.astype(np.float32), v.astype(np.float32), angle, reach)


def _bent(rng: np.random.Generator, count: int, bend_px: float) -> Plane:
    """Displacement that is linear between knots: boundaries stay straight lines with kinks, as surveyors leave them."""
    knots = int(rng.integers(4, 8))
    values = rng.normal(0.0, bend_px, (knots, knots)).astype(np.float32)
    places = np.linspace(0, knots - 1, count, dtype=np.float32)
    # Hat functions: row i holds the weights of the knots at place i.
    weights = np.clip(1 - np.abs(places[:, None] - np.arange(knots, dtype=np.float32)), 0, 1)
    return np.asarray(weights @ values @ weights.T, dtype=np.float32)


def divide(
    rng: np.random.Generator, reach: float, target_px: float, spread: float, stretch: float, road_depth: int
) -> Division:
    """Split the plane again and again across the longer side until the pieces have about the wanted size.

    Args:
        rng: Source of randomness.
        reach: Half the side of the square to divide, px.
        target_px: Typical side of a piece, px.
        spread: 0 for equal halves, towards 1 for very unequal ones.
        stretch: Longest allowed ratio of the sides is about this number.
        road_depth: Cuts of fewer than so many levels down carry roads.
    """
    start = (-reach, reach, -reach, reach)
    return _refine(rng, [(start, (False,) * 4, 0)], target_px, spread, stretch, road_depth)


def subdivide(rng: np.random.Generator, rects: Plane, target_px: float, spread: float, stretch: float) -> Division:
    """Divide given rectangles (K, 4) further; only the old outlines count as roads."""
    start: list[Piece] = [(tuple(map(float, rect)), (True,) * 4, 99) for rect in rects]
    return _refine(rng, start, target_px, spread, stretch, 0)


def _refine(
    rng: np.random.Generator,
    todo: list[Piece],
    target_px: float,
    spread: float,
    stretch: float,
    road_depth: int,
) -> Division:
    rects, roads = [], []
    uniform = _uniforms(rng)
    while todo:
        (u0, u1, v0, v1), sides, depth = todo.pop()
        width, height = (u1 - u0) / stretch, v1 - v0
        limit = target_px * (0.75 + next(uniform))
        if max(width, height) < limit or max(u1 - u0, v1 - v0) < 0.9 * target_px:
            rects.append((u0, u1, v0, v1))
            roads.append(sides)
            continue
        share = 0.5 + spread * (0.7 * next(uniform) - 0.35)
        road = depth < road_depth
        if width >= height:
            cut = u0 + share * (u1 - u0)
            todo.append(((u0, cut, v0, v1), (sides[0], road, sides[2], sides[3]), depth + 1))
            todo.append(((cut, u1, v0, v1), (road, sides[1], sides[2], sides[3]), depth + 1))
        else:
            cut = v0 + share * (v1 - v0)
            todo.append(((u0, u1, v0, cut), (sides[0], sides[1], sides[2], road), depth + 1))
            todo.append(((u0, u1, cut, v1), (sides[0], sides[1], road, sides[3]), depth + 1))
    return Division(np.array(rects, np.float32).reshape(-1, 4), np.array(roads, bool).reshape(-1, 4))


def _uniforms(rng: np.random.Generator) -> Iterator[float]:
    """Numbers in [0, 1), drawn in bulk: single calls would cost more than the geometry."""
    while True:
        yield from rng.random(512).tolist()


def locate(grid: Grid, rects: Plane) -> Ids:
    """Which rectangle each half-pixel lies in, (2S, 2S); -1 for none."""
    scale = 2.0
    side = int(np.ceil(2 * grid.reach * scale)) + 2
    table = np.full((side, side), -1, np.int32)
    edges = np.rint((rects + grid.reach) * scale).astype(int)
    for number, (u0, u1, v0, v1) in enumerate(edges):
        table[max(v0, 0) : v1, max(u0, 0) : u1] = number
    row = ((grid.v + np.float32(grid.reach)) * np.float32(scale)).astype(np.int32)
    column = ((grid.u + np.float32(grid.reach)) * np.float32(scale)).astype(np.int32)
    return np.asarray(table.ravel().take(row * np.int32(side) + column))


def edge_distance(grid: Grid, ids: Ids, rects: Plane, sides: NDArray[np.bool_] | None = None) -> Plane:
    """Distance in px to the nearest side of the own rectangle, (2S, 2S); only over the chosen sides where given.

    Outside every rectangle, and where none of its sides counts, it is a large number.
    """
    far = np.float32(1e6)
    bounds = np.concatenate([rects, np.full((1, 4), far, np.float32)])
    bounds[-1] = (-far, far, -far, far)
    if sides is not None:
        chosen = np.concatenate([sides, np.zeros((1, 4), bool)])
        bounds = np.where(chosen, bounds, np.array([-far, far, -far, far], np.float32))
    u0, u1, v0, v1 = (look_up(column, ids) for column in bounds.T)
    along = np.minimum(grid.u - u0, u1 - grid.u)
    across = np.minimum(grid.v - v0, v1 - grid.v)
    return np.asarray(np.maximum(np.minimum(along, across), 0.0), dtype=np.float32)


def look_up(values: Plane, ids: Ids) -> Plane:
    """The value of each half-pixel's rectangle; id -1 takes the last value."""
    return np.asarray(np.ascontiguousarray(values).take(ids, mode="wrap"))


def shrink(plane: Plane) -> Plane:
    """Mean over the half-pixels of each pixel: (2S, 2S) -> (S, S)."""
    return np.float32(0.25) * (plane[::2, ::2] + plane[1::2, ::2] + plane[::2, 1::2] + plane[1::2, 1::2])
