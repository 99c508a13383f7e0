"""Painters of what people build: roads, tracks, towns, farmsteads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from earthprior.chips.landscapes.canvas import Canvas
from earthprior.chips.landscapes.noise import Plane, coverage, distance_to_level
from earthprior.chips.landscapes.parcels import (
    OVERSAMPLING,
    Division,
    Grid,
    Ids,
    edge_distance,
    locate,
    look_up,
    shrink,
    subdivide,
)
from earthprior.chips.landscapes.spectra import BUILT, mix, spectra, spectrum, vary

ROOFS = ("roof_tile", "roof_metal", "roof_grey", "roof_rust", "roof_white", "roof_blue", "concrete")
POOR = np.array([0.10, 0.30, 0.20, 0.25, 0.05, 0.02, 0.08])
RICH = np.array([0.45, 0.10, 0.18, 0.07, 0.10, 0.02, 0.08])


def paint_roads(canvas: Canvas, grid: Grid, division: Division, ids: Ids, soil: Plane) -> Plane:
    """Roads along the main cuts of the land, and at times one that follows the terrain; returns their share (S, S)."""
    rng = canvas.rng
    paved = rng.random() < 0.4
    half_width = np.float32(rng.uniform(0.45, 0.8) if not paved else rng.uniform(0.7, 1.3))
    distance = edge_distance(grid, ids, division.rects, division.roads)
    alpha = shrink(np.clip(2 * (half_width - distance) + 0.5, 0, 1))
    if rng.random() < 0.45:
        alpha = np.maximum(alpha, _winding_track(canvas))
    dirt = np.clip(1.25 * soil, 0, 0.5)
    surface = mix(dirt, spectrum("asphalt"), 0.85) if paved else dirt
    if paved:
        verge = shrink(np.clip(2 * (half_width + 0.8 - distance) + 0.5, 0, 1))
        canvas.paint(verge * np.float32(0.6), dirt, None)
    canvas.paint(alpha, surface, BUILT)
    return alpha


def _winding_track(canvas: Canvas) -> Plane:
    rng, size = canvas.rng, canvas.fields.size
    axis = np.arange(size, dtype=np.float32) - size * rng.uniform(0.2, 0.8)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = axis[None, :] * np.float32(np.cos(angle)) + axis[:, None] * np.float32(np.sin(angle))
    bend = canvas.fields.fractal(4.2, longest_px=90, shortest_px=12)
    # A gentle slope against the ramp's, or the line would close to rings (see waters.py).
    bend *= np.float32(rng.uniform(0.1, 0.4) / np.sqrt(float(np.mean(np.square(np.gradient(bend))))))
    distance = distance_to_level(ramp + bend)
    return coverage(np.float32(rng.uniform(0.3, 0.9)) - np.abs(distance))


def paint_town(canvas: Canvas, grid: Grid, division: Division, soil: Plane) -> Plane:
    """Blocks, streets, yards and buildings with shadows; returns the share (S, S) of built-up land."""
    rng, size = canvas.rng, canvas.fields.size
    share = canvas.biome.draw(rng, "town")
    if share < 0.004:
        return np.zeros((size, size), np.float32)
    blocks = subdivide(rng, division.rects, rng.uniform(13, 26), rng.uniform(0.1, 0.7), rng.uniform(0.9, 1.8))
    block_ids = locate(grid, blocks.rects)
    settled = _settled_blocks(canvas, block_ids, len(blocks.rects), share)
    town = settled[block_ids]
    edge = edge_distance(grid, block_ids, blocks.rects)
    street = np.float32(rng.uniform(0.45, 1.0))
    streets = shrink(np.clip(2 * (street - edge) + 0.5, 0, 1) * town)
    area = shrink(town.astype(np.float32))

    greenery = np.clip(0.35 + 0.3 * canvas.fields.fractal(1.8, longest_px=40) - 0.3 * canvas.dryness, 0, 1)
    yards = mix(soil * np.float32(0.95), spectrum("grass_green"), greenery)
    canvas.paint(area, mix(yards, spectrum("concrete"), float(rng.uniform(0.0, 0.35))), BUILT)
    paved = mix(np.clip(1.15 * soil, 0, 0.5), spectrum("asphalt"), float(rng.choice([0.15, 0.9])))
    canvas.paint(streets, paved, BUILT)
    _paint_buildings(canvas, grid, blocks.rects[settled], street)
    return area


def _settled_blocks(canvas: Canvas, block_ids: Ids, count: int, share: float) -> NDArray[np.bool_]:
    """Which blocks belong to the town: those highest in a smooth field, so that the town hangs together."""
    size, rng = canvas.fields.size, canvas.rng
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    centre_y, centre_x = rng.uniform(0.15, 0.85, 2)
    pull = -3.0 * np.hypot(y - centre_y, x - centre_x) + 0.5 * canvas.fields.fractal(3.0, longest_px=80)
    near = block_ids[::2, ::2].ravel()
    area = np.bincount(near, minlength=count)
    score = np.bincount(near, weights=pull.ravel(), minlength=count) / np.maximum(area, 1)
    order = np.argsort(-np.where(area > 0, score, -np.inf), kind="stable")
    settled = np.zeros(count, bool)
    settled[order[np.cumsum(area[order]) <= share * area.sum()]] = True
    # Some blocks stay open: squares, sports grounds, building land.
    return settled & (rng.random(count) > 0.07)


def _paint_buildings(canvas: Canvas, grid: Grid, blocks: Plane, street: np.float32) -> None:
    rng = canvas.rng
    if len(blocks) == 0:
        return
    inner = blocks + np.array([street, -street, street, -street], np.float32)
    lots = subdivide(rng, inner, rng.uniform(2.7, 5.0), 0.7, rng.uniform(0.7, 1.5)).rects
    sheds = subdivide(rng, inner[rng.random(len(inner)) < 0.12], 11.0, 0.8, 1.0).rects
    for rects, chance in ((lots, rng.uniform(0.7, 1.0)), (sheds, 0.7)):
        kept = rects[rng.random(len(rects)) < chance]
        if len(kept) == 0:
            continue
        sides = kept.copy()
        inset = rng.uniform(0.1, 0.8, kept.shape).astype(np.float32)
        sides += inset * np.array([1, -1, 1, -1], np.float32)
        ids = locate(grid, sides[(sides[:, 1] - sides[:, 0] > 0.8) & (sides[:, 3] - sides[:, 2] > 0.8)])
        _paint_roofs(canvas, ids)


def _paint_roofs(canvas: Canvas, ids: Ids) -> None:
    rng = canvas.rng
    count = int(ids.max()) + 1
    if count == 0:
        return
    wealth = rng.random()
    weights = mix(POOR, RICH, wealth)
    colours = vary(rng, spectra(ROOFS)[rng.choice(len(ROOFS), count, p=weights / weights.sum())], 0.22, 0.03)
    table = np.concatenate([colours, np.zeros((1, 4), np.float32)])
    alpha = shrink((ids >= 0).astype(np.float32))
    bands = np.stack([shrink(look_up(band, ids)) for band in table.T])
    colour = (bands / np.maximum(alpha, 0.25)).astype(np.float32)
    canvas.cast_shadow(alpha, rng.uniform(0.9, 2.0), 0.9)
    canvas.paint(alpha, colour, BUILT)


def paint_farmsteads(canvas: Canvas, grid: Grid, fields: Plane, roads: Plane, soil: Plane) -> None:
    """A few groups of houses and barns beside roads."""
    rng, size = canvas.rng, canvas.fields.size
    fine = size * OVERSAMPLING
    rows, columns = np.nonzero((roads < 0.1) & (fields > 0.9) & _near(roads, 7))
    if len(rows) == 0:
        return
    for _ in range(rng.poisson(1.2)):
        place = rng.integers(len(rows))
        ids = np.full((fine, fine), -1, np.int32)
        for number in range(int(rng.integers(2, 9))):
            y, x = np.array([rows[place], columns[place]]) + rng.normal(0, 4.5, 2)
            _mark_building(rng, grid, ids, number, y, x)
        yard = shrink((_near_mask(ids >= 0, 5)).astype(np.float32)) * (roads < 0.5)
        canvas.paint(np.float32(0.6) * yard, np.float32(1.1) * soil, BUILT)
        _paint_roofs(canvas, ids)


def _mark_building(rng: np.random.Generator, grid: Grid, ids: Ids, number: int, y: float, x: float) -> None:
    """Write one rectangle along the grid's direction into `ids` (2S, 2S)."""
    reach = 10
    row, column = int(y * OVERSAMPLING), int(x * OVERSAMPLING)
    window = np.s_[max(row - reach, 0) : row + reach, max(column - reach, 0) : column + reach]
    if not (0 <= row < len(ids) and 0 <= column < len(ids)):
        return
    half_u, half_v = rng.uniform(0.8, 2.6), rng.uniform(0.7, 1.5)
    du = np.abs(grid.u[window] - grid.u[row, column])
    dv = np.abs(grid.v[window] - grid.v[row, column])
    ids[window][(du < half_u) & (dv < half_v)] = number


def _near(plane: Plane, reach: int) -> NDArray[np.bool_]:
    return _near_mask(plane > 0.5, reach)


def _near_mask(mask: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    return np.asarray(ndimage.uniform_filter(mask.astype(np.float32), 2 * reach + 1) > 1e-4)
