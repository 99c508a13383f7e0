"""Painters of the land: open ground, forest, fields and scattered trees."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from earthprior.chips.landscapes.canvas import Canvas
from earthprior.chips.landscapes.noise import Plane, coverage, displaced, distance_to_level, line_noise
from earthprior.chips.landscapes.parcels import Division, Grid, Ids, edge_distance, look_up, shrink
from earthprior.chips.landscapes.spectra import BARE, CROPLAND, FOREST, GRASS, WATER, mix, spectra, spectrum, vary

CROPS = ("crop_lush", "crop_deep", "crop_bright", "crop_lush", "crop_ripe", "stubble")


def soil_plane(canvas: Canvas) -> Plane:
    """Bare soil of the chip, (4, S, S): two soils in patches, darker where moist."""
    rng, names = canvas.rng, canvas.biome.soils
    first, second = (spectrum(names[i]) for i in rng.integers(0, len(names), 2))
    patches = np.clip(0.5 + 0.5 * canvas.fields.fractal(2.8, longest_px=120), 0, 1)
    patches = patches * np.float32(rng.uniform(0.2, 1.0))
    fine = canvas.fields.fractal(1.8, longest_px=60)
    factor = 1 - np.float32(0.09) * canvas.moisture + np.float32(rng.uniform(0.03, 0.07)) * fine
    return np.asarray(mix(first, second, patches) * np.clip(factor, 0.4, 1.7), dtype=np.float32)


def paint_ground(canvas: Canvas, soil: Plane) -> None:
    """Grass and herbs of varying cover over bare soil, everywhere."""
    rng = canvas.rng
    dry = np.clip(canvas.dryness - np.float32(0.22) * canvas.moisture + rng.normal(0, 0.05), 0, 1)
    grass = mix(spectrum("grass_green"), spectrum("grass_dry"), dry)
    tufts = canvas.fields.fractal(1.6, longest_px=40)
    cover = 0.92 - 0.55 * canvas.dryness**2 + rng.normal(0, 0.08)
    if "sand" in canvas.biome.soils:
        cover -= rng.uniform(0.15, 0.45)
    share = np.clip(np.float32(cover) + np.float32(0.16) * canvas.moisture + np.float32(0.09) * tufts, 0, 1)
    canvas.paint(np.ones_like(share), mix(soil, grass, share), GRASS)
    canvas.label[share < 0.35] = BARE


def paint_forest(canvas: Canvas) -> None:
    """Closed forest with natural outlines, crowns lit from the sun's side, and a shadow along its edge."""
    rng, fields = canvas.rng, canvas.fields
    share = canvas.biome.draw(rng, "forest")
    if share < 0.01:
        return
    outline = fields.fractal(rng.uniform(2.5, 3.6), longest_px=rng.uniform(50, 200))
    outline += np.float32(rng.uniform(0.3, 1.0)) * canvas.moisture
    level = float(np.quantile(outline, 1 - share))
    # Loose trees at the edge: the outline is roughened by single crowns.
    distance = distance_to_level(outline, level) + np.float32(rng.uniform(0.3, 1.5)) * fields.band(5.0)
    alpha = coverage(np.float32(0.7) * distance)
    canvas.cast_shadow(alpha, rng.uniform(1.5, 4.0), 0.75)
    canvas.paint(alpha, canopy(canvas, "forest_moist", "forest_dry"), FOREST)


def canopy(canvas: Canvas, first: str, second: str) -> Plane:
    """Reflectance of closed canopy, (4, S, S): crowns of 2 to 6 px as bumps in the sun, stands of differing species."""
    # All tree stands of a chip share one draw: they never overlap, and the fields are half of a chip's time.
    light, species = canvas.crowns = canvas.crowns or _draw_crowns(canvas)
    return mix(spectrum(first), spectrum(second), species) * light


def _draw_crowns(canvas: Canvas) -> tuple[Plane, Plane]:
    rng, fields = canvas.rng, canvas.fields
    crowns = fields.band(rng.uniform(3.2, 5.0)) + np.float32(0.7) * fields.band(rng.uniform(6.5, 11.0))
    stands = np.clip(canvas.dryness + np.float32(0.3) * fields.fractal(2.6, longest_px=90), 0, 1)
    light = canvas.relief_factor(crowns, rng.uniform(0.22, 0.42))
    # Gaps between crowns hold shade: brightness falls faster below the mean than it rises above.
    depth = 1 + np.float32(0.055) * crowns - np.float32(0.03) * np.clip(-crowns, 0, None) ** 2
    emergent = np.clip(fields.band(7.0) - 1.6, 0, 1)
    return np.clip(light * depth, 0.25, 1.8) * (1 + np.float32(0.2) * emergent), stands


def paint_fields(canvas: Canvas, grid: Grid, division: Division, ids: Ids, soil: Plane) -> Plane:
    """Fields in use over whatever was there; returns the share of each pixel that they cover, (S, S)."""
    rng, biome = canvas.rng, canvas.biome
    count = len(division.rects)
    used = rng.random(count) < biome.draw(rng, "farmed")
    wild = biome.draw(rng, "wild")
    nature = canvas.fields.fractal(rng.uniform(2.7, 4.0), longest_px=130) + np.float32(0.4) * canvas.moisture
    open_land = coverage(-distance_to_level(nature, float(np.quantile(nature, 1 - wild))))
    margin = np.float32(rng.uniform(0.2, 1.0) * rng.choice([0.4, 1.0]))
    inside = np.clip(edge_distance(grid, ids, division.rects) - margin + 0.5, 0, 1)
    if rng.random() < biome.pivots:
        inside = inside * _pivots(grid, ids, division.rects)
    alpha = shrink(inside * used[ids]) * open_land

    kinds = rng.random(count)
    planted = kinds < biome.draw(rng, "plantation")
    ponds = ~planted & (kinds > 1 - biome.draw(rng, "ponds"))
    canvas.paint(alpha, _crop_colour(canvas, grid, ids, count, soil), CROPLAND)
    if planted.any():
        _paint_rows_of_trees(canvas, grid, alpha * shrink(planted[ids].astype(np.float32)))
    if ponds.any():
        wet = alpha * shrink(ponds[ids].astype(np.float32))
        muddy = np.clip(shrink(rng.random(count).astype(np.float32)[ids]), 0, 1)
        colour = mix(spectrum("water_green"), spectrum("water_turbid"), muddy)
        canvas.paint(wet, colour * (1 + np.float32(0.04) * canvas.moisture), WATER)
        canvas.water = np.maximum(canvas.water, wet)
    return alpha


def _crop_colour(canvas: Canvas, grid: Grid, ids: Ids, count: int, soil: Plane) -> Plane:
    """Each field its crop, growth and tillage, with swaths along the rows and patches across, (4, S, S)."""
    rng = canvas.rng
    weights = np.array([1, 1, 1, 1, 0.3 + 2 * canvas.dryness, 0.2 + 2 * canvas.dryness])
    crop = rng.choice(len(CROPS), count, p=weights / weights.sum())
    colours = vary(rng, spectra(CROPS)[crop], 0.13, 0.04)
    # Growth is bimodal: fields are either bare after tillage or closed, seldom between.
    bare = rng.random(count) < 0.15 + 0.35 * canvas.dryness
    growth = np.where(bare, rng.beta(1.2, 6.0, count), rng.beta(5.0, 1.6, count)).astype(np.float32)
    tilled = np.exp(rng.normal(0, 0.16, count)).astype(np.float32)
    patchy = np.where(bare, 0.05, rng.uniform(0.02, 0.16, count)).astype(np.float32)

    table = np.concatenate([colours, growth[:, None], tilled[:, None], patchy[:, None]], axis=1)
    *crop_bands, share, till, patch = (shrink(look_up(column, ids)) for column in table.T)
    swaths, rows = _tillage(canvas, grid, ids, count)
    fine = canvas.fields.fractal(1.7, longest_px=50)
    share = np.clip(share + patch * canvas.moisture + np.float32(0.04) * fine + 0.5 * swaths + rows, 0, 1)
    ground = soil * (till * (1 + swaths - rows))
    vigour = 1 + np.float32(0.03) * fine + np.float32(0.5) * patch * canvas.moisture + 0.5 * rows
    return mix(ground, np.stack(crop_bands) * vigour, share)


def _tillage(canvas: Canvas, grid: Grid, ids: Ids, count: int) -> tuple[Plane, Plane]:
    """Swaths of machines (irregular stripes) and rows (regular ones) along each field's direction, (S, S) each."""
    rng = canvas.rng
    near = ids[::2, ::2]
    along = rng.random(count) < 0.5
    # Where fields are small, hand work leaves fainter traces than machines on large ones.
    strength = np.float32(0.04 if canvas.biome.parcel_px[1] > 40 else 0.02)
    across = np.where(along[near], grid.u[::2, ::2], grid.v[::2, ::2])
    length = 4096
    line = line_noise(rng, length, rng.uniform(2.0, 5.0))
    start = rng.integers(0, length, count)
    swaths = line[(across * 4 + start[near]).astype(np.int32) % length]
    period = rng.uniform(2.6, 7.0, count).astype(np.float32)
    amplitude = (rng.random(count) ** 3).astype(np.float32) * 0.06
    rows = np.sin(across * (np.float32(2 * np.pi) / period[near])) * amplitude[near]
    faint = (rng.random(count) ** 2).astype(np.float32)
    return swaths * strength * faint[near], rows.astype(np.float32)


def _pivots(grid: Grid, ids: Ids, rects: Plane) -> Plane:
    """Circles inscribed in the rectangles, (2S, 2S) coverage."""
    centre_u, centre_v = rects[:, :2].mean(1), rects[:, 2:].mean(1)
    radius = 0.5 * np.minimum(rects[:, 1] - rects[:, 0], rects[:, 3] - rects[:, 2])
    distance = np.hypot(grid.u - centre_u[ids], grid.v - centre_v[ids])
    return np.asarray(np.clip(radius[ids] - distance, 0, 1), dtype=np.float32)


def _paint_rows_of_trees(canvas: Canvas, grid: Grid, alpha: Plane) -> None:
    """Plantation: trees in rows, so dense that mostly the light between rows shows."""
    rng = canvas.rng
    spacing = np.float32(2 * np.pi / rng.uniform(2.2, 3.4))
    u, v = grid.u[::2, ::2], grid.v[::2, ::2]
    rows = np.cos(u * spacing) * np.float32(rng.uniform(0.3, 1.0)) + np.cos(v * spacing) * np.float32(rng.uniform(0, 1))
    colour = canopy(canvas, "plantation", "forest_dry") * (1 + np.float32(0.10) * rows)
    canvas.paint(alpha, colour * (1 + np.float32(0.04) * canvas.moisture), FOREST)


def paint_trees(canvas: Canvas, density: Plane) -> None:
    """Single trees and bushes with their shadows; `density` is their number per px, (S, S)."""
    rng, size = canvas.rng, canvas.fields.size
    rows, columns = np.nonzero(rng.random((size, size), dtype=np.float32) < density)
    if len(rows) == 0:
        return
    weight = rng.gamma(2.0, 0.7, len(rows))
    points = np.zeros((size, size), np.float32)
    points[rows, columns] = weight
    radius = rng.uniform(0.65, 1.05)
    alpha = 1 - np.exp(np.float32(-5.0) * ndimage.gaussian_filter(points, radius))
    canvas.cast_shadow(alpha, rng.uniform(1.2, 2.2), 0.75)
    lit = 1 + np.float32(0.25) * (displaced(alpha, *canvas.light.shadow_px(1.0)) - alpha)
    species = np.clip(canvas.dryness + np.float32(0.3) * canvas.moisture, 0, 1)
    colour = mix(spectrum("forest_moist"), spectrum("forest_dry"), species)
    canvas.paint(alpha.astype(np.float32), colour * lit, FOREST)
