"""Painters of rivers and lakes."""

from __future__ import annotations

import numpy as np

from earthprior.chips.landscapes.canvas import Canvas
from earthprior.chips.landscapes.land import canopy
from earthprior.chips.landscapes.noise import Plane, coverage, distance_to_level
from earthprior.chips.landscapes.spectra import BARE, FOREST, WATER, mix, spectrum

KINDS = ("water_clear", "water_black", "water_green", "water_turbid")


def paint_lakes(canvas: Canvas) -> None:
    """Lakes where the ground is low."""
    rng = canvas.rng
    lakes = canvas.biome.draw(rng, "lakes")
    if lakes > 0.005:
        # Waves and silt smooth a shore; only floodplains keep it ragged.
        shore = rng.uniform(3.6, 4.6)
        basin = canvas.fields.fractal(shore, longest_px=rng.uniform(60, 220), shortest_px=rng.uniform(3, 10))
        basin -= np.float32(0.25) * canvas.height
        _paint_water(canvas, distance_to_level(basin, float(np.quantile(basin, 1 - lakes))), rng.uniform(0.0, 2.2))


def paint_river(canvas: Canvas) -> None:
    """By the biome's chance, a meandering river with its trees, banks and bars.

    It is the zero contour of a ramp plus smooth noise, which crosses the chip and never crosses itself.
    """
    rng, size = canvas.rng, canvas.fields.size
    if rng.random() >= canvas.biome.river:
        return
    half_width = float(np.exp(rng.uniform(np.log(0.5), np.log(12))))
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.arange(size, dtype=np.float32) - size / 2
    ramp = axis[None, :] * np.float32(np.cos(angle)) + axis[:, None] * np.float32(np.sin(angle))
    wavelength = 35 + 7 * half_width
    bends = canvas.fields.fractal(5.0, longest_px=wavelength, shortest_px=min(4 + half_width, 10))
    # Where the noise falls faster than the ramp rises, the contour turns back on itself and at last closes to a ring:
    # rivers do the first and never the second, so its slope is bounded.
    steepness = np.sqrt(float(np.mean(np.square(np.gradient(bends)))))
    course = ramp + rng.uniform(-0.3, 0.3) * size + bends * np.float32(rng.uniform(0.15, 0.5) / steepness)
    distance = distance_to_level(course)
    unsteady = 1 + np.float32(0.25) * canvas.fields.fractal(3.0, longest_px=40)
    inside = np.float32(half_width) * np.clip(unsteady, 0.35, 2.0) - np.abs(distance)
    if canvas.dryness < 0.75 and rng.random() < 0.8:
        belt = inside + np.float32(rng.uniform(1.5, 9.0)) + np.float32(2.5) * canvas.fields.band(7.0)
        trees = coverage(belt)
        canvas.cast_shadow(trees, 2.0, 0.6)
        canvas.paint(trees, canopy(canvas, "forest_moist", "forest_dry"), FOREST)
    bars = inside + np.float32(half_width * 0.5) * (canvas.fields.fractal(3.2, longest_px=30) - np.float32(0.4))
    if rng.random() < 0.7:
        canvas.paint(coverage(bars), mix(spectrum("sand"), spectrum("mud"), np.float32(rng.random())), BARE)
    if canvas.dryness > 0.85 and rng.random() < 0.7:
        # A dry bed: sand where water runs for a few weeks.
        canvas.paint(coverage(inside), spectrum("sand") * (1 + np.float32(0.06) * canvas.moisture), BARE)
        return
    _paint_water(canvas, inside, 0.0)


def _paint_water(canvas: Canvas, inside: Plane, beach_px: float) -> None:
    """Water where `inside` (px from the shore, positive in the water) says, brighter in the shallows."""
    rng = canvas.rng
    first, second = (spectrum(KINDS[i]) for i in rng.choice(len(KINDS), 2, p=[0.3, 0.2, 0.25, 0.25]))
    mixing = np.clip(0.35 + 0.35 * canvas.fields.fractal(3.4, longest_px=200), 0, 1)
    colour = mix(first, second, mixing)
    shallow = np.exp(-np.clip(inside, 0, None) / np.float32(rng.uniform(1.0, 5.0))) * np.float32(rng.uniform(0.1, 0.6))
    colour = mix(colour, np.float32(0.75) * spectrum("water_turbid"), shallow)
    wind = canvas.fields.streaks(float(rng.uniform(0, np.pi)), 14.0, 2.0)
    colour = colour * (1 + np.float32(rng.uniform(0.0, 0.06)) * wind)
    if beach_px > 0.7:
        bank = mix(spectrum("mud"), spectrum("soil_pale"), np.float32(rng.random() ** 2))
        uneven = np.float32(beach_px) * np.clip(0.6 + 0.8 * canvas.fields.fractal(2.8, longest_px=60), -0.5, 2.5)
        canvas.paint(np.float32(0.85) * coverage(inside + uneven), bank, BARE)
    alpha = coverage(inside)
    canvas.paint(alpha, colour, WATER)
    canvas.water = np.maximum(canvas.water, alpha)
