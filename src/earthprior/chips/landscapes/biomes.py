"""Kinds of landscape that the generator knows: which share of fields, forest, water and houses each one has."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

Range = tuple[float, float]


@dataclass(frozen=True)
class Biome:
    """Ranges from which a chip's landscape is drawn; shares lie in [0, 1], lengths are in px of 4.77 m.

    Attributes:
        weight: How often it occurs, relative to the others.
        parcel_px: Typical side of a field.
        spread: Inequality of neighbouring fields, 0 for surveyed land.
        stretch: Length of fields over their width.
        bend_px: How far corners of fields stray from a perfect grid.
        farmed: Share of parcels in use.
        wild: Share of the land that is never divided, with natural outlines.
        forest: Share of forest in what is not farmed.
        shrubs: Scattered trees and bushes per 100 px on open land.
        town: Share of built-up land; below 0.06 it is a hamlet.
        relief: Root mean square slope (rise over run).
        lakes: Share of standing water.
        river: Probability of a river.
        dryness: 0 for lush, 1 for the end of the dry season.
        pivots: Probability that fields are irrigated in circles.
        plantation: Share of farmed parcels planted with trees in rows.
        ponds: Share of farmed parcels under water (rice, fish).
        soils: Soils from which the chip's two are drawn.
    """

    weight: float
    parcel_px: Range
    spread: Range
    stretch: Range
    bend_px: Range
    farmed: Range
    wild: Range
    forest: Range
    shrubs: Range
    town: Range
    relief: Range
    lakes: Range
    river: float
    dryness: Range
    pivots: float
    plantation: Range
    ponds: Range
    soils: tuple[str, ...]

    def draw(self, rng: np.random.Generator, name: str) -> float:
        """A uniform draw from one of the ranges."""
        low, high = getattr(self, name)
        return float(rng.uniform(low, high))


BIOMES = MappingProxyType(
    {
        "plains": Biome(
            weight=2.2, parcel_px=(55, 130), spread=(0.1, 0.7), stretch=(0.8, 1.8), bend_px=(0.0, 1.2),
            farmed=(0.85, 1.0), wild=(0.02, 0.18), forest=(0.2, 0.7), shrubs=(0.0, 0.15), town=(0.0, 0.02),
            relief=(0.0, 0.03), lakes=(0.0, 0.12), river=0.35, dryness=(0.1, 0.8), pivots=0.3, plantation=(0.0, 0.05),
            ponds=(0.0, 0.0),
            soils=("soil_dark", "soil_brown", "soil_brown", "soil_red", "soil_ochre"),
        ),
        "smallholders": Biome(
            weight=2.2, parcel_px=(9, 26), spread=(0.6, 1.0), stretch=(0.7, 2.6), bend_px=(1.5, 6.0),
            farmed=(0.7, 0.95), wild=(0.05, 0.35), forest=(0.25, 0.8), shrubs=(0.2, 1.0), town=(0.0, 0.10),
            relief=(0.01, 0.10), lakes=(0.0, 0.03), river=0.5, dryness=(0.0, 0.8), pivots=0.0, plantation=(0.0, 0.2),
            ponds=(0.0, 0.12),
            soils=("soil_dark", "soil_brown", "soil_red", "soil_ochre", "soil_pale"),
        ),
        "frontier": Biome(
            weight=1.8, parcel_px=(35, 90), spread=(0.3, 0.9), stretch=(0.8, 2.5), bend_px=(0.5, 4.0),
            farmed=(0.35, 0.75), wild=(0.15, 0.45), forest=(0.8, 0.97), shrubs=(0.1, 0.5), town=(0.0, 0.01),
            relief=(0.02, 0.12), lakes=(0.0, 0.02), river=0.5, dryness=(0.1, 0.7), pivots=0.0, plantation=(0.0, 0.05),
            ponds=(0.0, 0.01),
            soils=("soil_red", "soil_ochre", "soil_brown"),
        ),
        "forest": Biome(
            weight=1.2, parcel_px=(18, 50), spread=(0.5, 1.0), stretch=(0.8, 2.0), bend_px=(2.0, 6.0),
            farmed=(0.0, 0.12), wild=(0.5, 0.9), forest=(0.9, 0.99), shrubs=(0.1, 0.6), town=(0.0, 0.0),
            relief=(0.06, 0.38), lakes=(0.0, 0.03), river=0.6, dryness=(0.0, 0.4), pivots=0.0, plantation=(0.0, 0.0),
            ponds=(0.0, 0.0),
            soils=("soil_brown", "soil_red"),
        ),
        "savanna": Biome(
            weight=1.4, parcel_px=(50, 140), spread=(0.3, 0.9), stretch=(0.8, 2.0), bend_px=(0.5, 3.0),
            farmed=(0.0, 0.35), wild=(0.4, 0.9), forest=(0.05, 0.35), shrubs=(0.4, 2.5), town=(0.0, 0.02),
            relief=(0.01, 0.12), lakes=(0.0, 0.04), river=0.4, dryness=(0.4, 1.0), pivots=0.1, plantation=(0.0, 0.0),
            ponds=(0.0, 0.0),
            soils=("soil_brown", "soil_red", "soil_ochre", "soil_pale"),
        ),
        "town": Biome(
            weight=1.4, parcel_px=(25, 70), spread=(0.4, 0.9), stretch=(0.8, 2.0), bend_px=(0.5, 4.0),
            farmed=(0.4, 0.9), wild=(0.05, 0.25), forest=(0.3, 0.8), shrubs=(0.2, 0.8), town=(0.3, 0.85),
            relief=(0.0, 0.06), lakes=(0.0, 0.03), river=0.35, dryness=(0.1, 0.9), pivots=0.0, plantation=(0.0, 0.1),
            ponds=(0.0, 0.05),
            soils=("soil_brown", "soil_red", "soil_ochre", "soil_pale"),
        ),
        "drylands": Biome(
            weight=0.9, parcel_px=(25, 80), spread=(0.4, 0.9), stretch=(0.8, 2.0), bend_px=(0.5, 4.0),
            farmed=(0.0, 0.35), wild=(0.5, 0.95), forest=(0.0, 0.04), shrubs=(0.1, 1.5), town=(0.0, 0.03),
            relief=(0.02, 0.25), lakes=(0.0, 0.01), river=0.5, dryness=(0.8, 1.0), pivots=0.3, plantation=(0.0, 0.0),
            ponds=(0.0, 0.0),
            soils=("soil_red", "soil_ochre", "soil_pale", "sand"),
        ),
        "wetland": Biome(
            weight=1.4, parcel_px=(14, 45), spread=(0.3, 0.9), stretch=(0.8, 3.0), bend_px=(1.0, 4.0),
            farmed=(0.2, 0.8), wild=(0.2, 0.7), forest=(0.2, 0.8), shrubs=(0.1, 0.6), town=(0.0, 0.03),
            relief=(0.0, 0.02), lakes=(0.08, 0.45), river=0.8, dryness=(0.0, 0.5), pivots=0.0, plantation=(0.0, 0.1),
            ponds=(0.1, 0.5),
            soils=("soil_dark", "mud", "soil_brown"),
        ),
        "plantation": Biome(
            weight=0.9, parcel_px=(35, 80), spread=(0.1, 0.6), stretch=(0.8, 2.2), bend_px=(0.5, 3.0),
            farmed=(0.85, 1.0), wild=(0.05, 0.25), forest=(0.5, 0.95), shrubs=(0.05, 0.3), town=(0.0, 0.02),
            relief=(0.01, 0.14), lakes=(0.0, 0.02), river=0.4, dryness=(0.0, 0.6), pivots=0.0, plantation=(0.6, 0.95),
            ponds=(0.0, 0.02),
            soils=("soil_red", "soil_brown", "soil_ochre"),
        ),
    }
)  # fmt: skip


def draw_biome(rng: np.random.Generator) -> str:
    """Name of a landscape, by weight."""
    names = list(BIOMES)
    weights = np.array([BIOMES[name].weight for name in names])
    return str(rng.choice(names, p=weights / weights.sum()))
