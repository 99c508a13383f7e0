"""The picture under construction: reflectance, labels, and the light that falls on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from earthprior.chips.landscapes.biomes import Biome
from earthprior.chips.landscapes.noise import Fields, Plane, displaced
from earthprior.chips.landscapes.spectra import SKY_LIGHT, mix


@dataclass(frozen=True)
class Light:
    """The sun.

    Attributes:
        x: East component of the unit vector on the ground towards the sun.
        y: South component (image rows run south).
        elevation: Height above the horizon, radians.
    """

    x: float
    y: float
    elevation: float

    def shadow_px(self, height_px: float) -> tuple[float, float]:
        """Where the shadow of a point so high falls: px (down, right)."""
        length = height_px / float(np.tan(self.elevation))
        return -self.y * length, -self.x * length


@dataclass
class Canvas:
    """Reflectance (4, S, S) in [0, 1], classes (S, S) and what painters share while a chip is made.

    Attributes:
        pixels: Reflectance, red, green, blue, near infrared.
        label: Land-cover class per pixel.
        biome: The kind of landscape.
        rng: Source of randomness.
        fields: Random fields of the chip's size.
        light: The sun.
        height: (S, S) terrain height, standard deviation 1.
        moisture: (S, S) wetness of the ground, standard deviation 1.
        dryness: Season, 0 lush to 1 parched.
        water: (S, S) share of water, which lies flat and is therefore not shaded by the relief.
        crowns: Light on closed canopy and its mix of species, (S, S) each, once drawn (see land.canopy).
    """

    pixels: Plane
    label: NDArray[np.uint8]
    biome: Biome
    rng: np.random.Generator
    fields: Fields
    light: Light
    height: Plane
    moisture: Plane
    dryness: float
    water: Plane
    crowns: tuple[Plane, Plane] | None = None

    def paint(self, share: Plane, colour: Plane, label: int | None) -> None:
        """Cover a share (S, S) of each pixel with a colour (4, S, S) or (4, 1, 1)."""
        self.pixels = mix(self.pixels, colour, share)
        if label is not None:
            self.label[share >= 0.5] = label

    def cast_shadow(self, share: Plane, height_px: float, strength: float = 1.0) -> None:
        """Darken the ground where something of that height, covering `share`, keeps the sun away."""
        dy, dx = self.light.shadow_px(height_px)
        # Between foot and top the shadow is unbroken: two copies stand for all the heights between.
        cast = np.float32(0.5) * (displaced(share, dy, dx) + displaced(share, dy / 2, dx / 2))
        self.pixels = self.pixels * (1 - np.float32(strength) * cast * (1 - share) * (1 - SKY_LIGHT))

    def relief_factor(self, height: Plane, slope: float) -> Plane:
        """Illumination of a surface of given root-mean-square slope relative to level ground (Lambert), (S, S)."""
        gradient_y, gradient_x = np.gradient(height)
        scale = np.float32(slope / (np.sqrt(float((gradient_y**2 + gradient_x**2).mean())) + 1e-9))
        gradient_y, gradient_x = gradient_y * scale, gradient_x * scale
        towards_sun = gradient_x * np.float32(self.light.x) + gradient_y * np.float32(self.light.y)
        flat = np.sin(self.light.elevation)
        lit = flat - np.cos(self.light.elevation) * towards_sun
        factor = lit / np.sqrt(1 + gradient_x**2 + gradient_y**2) / np.float32(flat)
        # A fifth of the light comes from the sky and does not care for the slope.
        return np.asarray(0.2 + 0.8 * np.clip(factor, 0.05, 1.7), dtype=np.float32)


def start_canvas(rng: np.random.Generator, biome: Biome, size: int) -> Canvas:
    """An empty canvas with sun, terrain, moisture and season."""
    fields = Fields(rng, size)
    azimuth = np.deg2rad(rng.uniform(35, 110))
    light = Light(float(np.sin(azimuth)), float(-np.cos(azimuth)), float(np.deg2rad(rng.uniform(42, 68))))
    rough = fields.fractal(3.6, longest_px=rng.uniform(80, 250), shortest_px=6.0)
    # Folding a random field gives ridges and valleys, which plain fractal hills lack.
    folded = -np.abs(fields.fractal(3.8, longest_px=rng.uniform(60, 160), shortest_px=5.0))
    share = np.float32(rng.uniform(0.0, 1.3))
    height = ndimage.gaussian_filter(rough + share * folded, 1.0)
    height = (height - height.mean()) / height.std()
    moisture = fields.fractal(2.9, longest_px=rng.uniform(60, 300)) - np.float32(0.6) * height
    moisture = (moisture - moisture.mean()) / moisture.std()
    return Canvas(
        pixels=np.zeros((4, size, size), np.float32),
        label=np.zeros((size, size), np.uint8),
        biome=biome,
        rng=rng,
        fields=fields,
        light=light,
        height=height.astype(np.float32),
        moisture=moisture.astype(np.float32),
        dryness=biome.draw(rng, "dryness"),
        water=np.zeros((size, size), np.float32),
    )
