"""Procedural satellite chips: seeded landscapes in four bands with land-cover labels.

They serve to try the whole pipeline without data of one's own, and to probe features where the truth is known. They
imitate 4.77 m surface-reflectance basemaps (red, green, blue, near infrared; uint16, reflectance x 10,000): fields,
forest, rivers and lakes, roads, towns, bare soil, relief in the sun, clouds with their shadows, the blur of the optics
and the noise of the sensor. Nothing is copied from any image.

Labels (uint8): 1 water, 2 cropland (also bare after tillage), 3 forest and single trees (also plantations), 4 built-up
and roads (also yards), 5 grass and shrubs, 6 bare soil and sand, 7 cloud; 0 only where the chip has no data. Land in
the shadow of a cloud keeps its class.

A chip is a function of (seed, index, size) and of nothing else, so any number of workers, any order and any resumption
give the same pixels. Bytes repeat on one machine and one set of library versions; between processors the last bit of a
float may differ and, rarely, move a pixel by one quantization step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from earthprior.chips.landscapes import built, land, waters
from earthprior.chips.landscapes.biomes import BIOMES, draw_biome
from earthprior.chips.landscapes.canvas import Canvas, start_canvas
from earthprior.chips.landscapes.noise import Fields
from earthprior.chips.landscapes.parcels import divide, locate, make_grid
from earthprior.chips.landscapes.spectra import CLOUD, HAZE, NODATA, SKY_LIGHT, mix, spectrum
from earthprior.randomness import numpy_generator

# Raise when a chip of the same seed and index comes out otherwise: an unfinished set is then not continued.
VERSION = 1

# Reflectance is stored in steps of 8 of 10,000. The sensor's noise has a standard deviation of 10 (water) to 35 (bright
# soil) and rounding to steps adds 8 / sqrt(12) = 2.3 in quadrature, at most 3 %; against steps of 4 it saves a sixth of
# each file, which lets a sample of 80 chips live in git.
STEP = 8
CLOUDY = 0.13
WEDGED = 0.05


@dataclass(frozen=True)
class ChipInfo:
    """What is known of a chip besides its pixels: the landscape, its share of cloud and of missing data."""

    biome: str
    cloud: float
    nodata: float


def synth_chip(seed: int, index: int, size: int = 224) -> tuple[NDArray[np.uint16], NDArray[np.uint8], ChipInfo]:
    """Make one chip.

    Args:
        seed: Seed of the whole set.
        index: Number of the chip in the set, from 0.
        size: Side in px, at least 16.

    Returns:
        Pixels (4, size, size) uint16 in red, green, blue, nir: reflectance x 10,000, 0 in all bands where there is no
        data and nowhere else in any band; labels (size, size) uint8, see the module; and the ChipInfo.
    """
    rng = numpy_generator(seed, "synth", index)
    name = draw_biome(rng)
    canvas = start_canvas(rng, BIOMES[name], size)
    _paint_landscape(canvas)
    relief = canvas.relief_factor(canvas.height, canvas.biome.draw(rng, "relief"))
    canvas.pixels = canvas.pixels * (1 + (relief - 1) * (1 - canvas.water))
    cloud = _paint_clouds(canvas) if rng.random() < CLOUDY else 0.0
    pixels = _observe(canvas)
    missing = _wedge(rng, size) if rng.random() < WEDGED else np.zeros((size, size), bool)
    pixels[:, missing] = 0
    canvas.label[missing] = NODATA
    return pixels, canvas.label, ChipInfo(name, cloud, float(missing.mean()))


def _paint_landscape(canvas: Canvas) -> None:
    """From the ground up: soil and grass, forest, fields, water, then what people build, then single trees."""
    rng, biome, size = canvas.rng, canvas.biome, canvas.fields.size
    soil = land.soil_plane(canvas)
    land.paint_ground(canvas, soil)
    land.paint_forest(canvas)
    grid = make_grid(rng, size, biome.draw(rng, "bend_px"))
    parcel_px = biome.draw(rng, "parcel_px")
    # Cuts that carry roads lie at least some 60 px apart, whatever the size of the fields.
    road_depth = int(rng.integers(0, 3)) + 2 * int(np.ceil(np.log2(max(2 * grid.reach / 320, 1))))
    division = divide(rng, grid.reach, parcel_px, biome.draw(rng, "spread"), biome.draw(rng, "stretch"), road_depth)
    ids = locate(grid, division.rects)
    fields = land.paint_fields(canvas, grid, division, ids, soil)
    # Roads bridge rivers but end at lakes.
    waters.paint_river(canvas)
    roads = built.paint_roads(canvas, grid, division, ids, soil)
    waters.paint_lakes(canvas)
    town = built.paint_town(canvas, grid, division, soil)
    built.paint_farmsteads(canvas, grid, fields * (1 - town) * (1 - canvas.water), roads, soil)
    density = np.float32(0.01 * biome.draw(rng, "shrubs")) * np.exp(np.float32(0.8) * canvas.moisture)
    open_land = (1 - np.float32(0.93) * fields * (1 - town)) * (1 - canvas.water) * (1 - roads)
    land.paint_trees(canvas, density * open_land)


def _paint_clouds(canvas: Canvas) -> float:
    """Broken clouds and their shadows, displaced away from the sun; returns the share of cloud."""
    rng, size = canvas.rng, canvas.fields.size
    height_px = rng.uniform(15, 90) * size / 224
    dy, dx = (round(shift) for shift in canvas.light.shadow_px(height_px))
    margin = max(abs(dy), abs(dx))
    wide = Fields(rng, size + 2 * margin).fractal(3.3, longest_px=rng.uniform(40, 140))
    level = float(np.quantile(wide, 1 - rng.uniform(0.02, 0.28)))
    thickness = np.clip(wide - level, 0, None) * np.float32(rng.uniform(2.5, 7.0))
    over = thickness[margin : margin + size, margin : margin + size]
    # The shadow on a pixel comes from the cloud that stands between it and the sun.
    cast = thickness[margin - dy : margin - dy + size, margin - dx : margin - dx + size]
    shadow = ndimage.gaussian_filter(1 - np.exp(-1.2 * cast), 1.2)
    canvas.pixels = canvas.pixels * (1 - np.float32(0.85) * shadow * (1 - SKY_LIGHT))
    share = 1 - np.exp(-over)
    billows = canvas.relief_factor(ndimage.gaussian_filter(over, 1.5), 0.35)
    bright = (0.72 + 0.38 * share) * (0.55 + 0.45 * billows)
    canvas.paint(share, np.clip(spectrum("cloud") * bright, 0, 0.98), CLOUD)
    return float((canvas.label == CLOUD).mean())


def _observe(canvas: Canvas) -> NDArray[np.uint16]:
    """Air, optics, sensor and quantization: reflectance (4, S, S) -> uint16 in steps of STEP, at least STEP."""
    rng, size = canvas.rng, canvas.fields.size
    haze = rng.gamma(2.0, 0.025) * (1 + np.float32(0.25) * canvas.fields.fractal(4.0))
    pixels = mix(canvas.pixels, np.float32(0.5) * np.ones((4, 1, 1), np.float32), 0.06 * haze) + HAZE * haze
    pixels = pixels * np.exp(rng.normal(0, [0.04, 0.03, 0.03, 0.05])).astype(np.float32).reshape(4, 1, 1)
    # The point spread of optics and resampling: no basemap has contrast left at its finest scale.
    psf_px = rng.uniform(0.5, 0.7)
    noise = rng.standard_normal((4, size, size), dtype=np.float32)
    read, shot = 0.0010 * rng.uniform(0.8, 1.3), 3.0e-5 * rng.uniform(0.5, 1.5)
    for band in range(4):
        pixels[band] = ndimage.gaussian_filter(pixels[band], psf_px, truncate=3.0)
        # Noise enters before the image is resampled to the map, hence it is slightly correlated as well.
        pixels[band] += ndimage.gaussian_filter(noise[band] * np.sqrt(read**2 + shot * pixels[band]), 0.4, truncate=3.0)
    # A valid pixel is never 0: that value is kept for missing data.
    steps = np.maximum(np.rint(np.clip(pixels, 0.0, 1.6) * (10_000 / STEP)), 1).astype(np.uint16)
    return np.asarray(steps * np.uint16(STEP))


def _wedge(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """Where an orbit's swath ends: everything beyond a straight line, (S, S)."""
    angle = np.deg2rad(rng.choice([10.0, 100.0, 190.0, 280.0]) + rng.normal(0, 3))
    axis = (np.arange(size) + 0.5) / size - 0.5
    return np.asarray(axis[None, :] * np.cos(angle) + axis[:, None] * np.sin(angle) > rng.uniform(0.15, 0.42))
