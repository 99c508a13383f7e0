"""Spectral library of the procedural landscapes: surface reflectance in red, green, blue and near infrared.

Values are set by hand to what 4.77 m surface-reflectance basemaps show (blue 455-515, green 500-590, red 590-670, near
infrared 780-860 nm): chlorophyll absorbs red and blue and leaves reflect the near infrared, so vegetation has a high
NDVI; water absorbs the near infrared; soils rise steadily from blue to near infrared; artificial surfaces are flat.
They are no measurements.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from earthprior.chips.landscapes.noise import Plane

BANDS = ("red", "green", "blue", "nir")

# The classes of a label raster. 0 is written only where the chip has no data, so that no class hides behind it.
CLASSES = MappingProxyType(
    {
        0: "no data",
        1: "water",
        2: "cropland",
        3: "forest and trees",
        4: "built-up and roads",
        5: "grass and shrubs",
        6: "bare soil and sand",
        7: "cloud",
    }
)
NODATA, WATER, CROPLAND, FOREST, BUILT, GRASS, BARE, CLOUD = range(8)

# fmt: off
SPECTRA = MappingProxyType({
    #                        red    green  blue   nir
    "forest_moist":         (0.026, 0.046, 0.024, 0.300),
    "forest_dry":           (0.043, 0.058, 0.033, 0.262),
    "plantation":           (0.030, 0.054, 0.027, 0.345),
    "crop_lush":            (0.034, 0.071, 0.033, 0.440),
    "crop_deep":            (0.030, 0.056, 0.030, 0.370),
    "crop_bright":          (0.052, 0.096, 0.042, 0.410),
    "crop_ripe":            (0.175, 0.150, 0.090, 0.300),
    "stubble":              (0.215, 0.180, 0.128, 0.310),
    "grass_green":          (0.058, 0.086, 0.046, 0.310),
    "grass_dry":            (0.140, 0.122, 0.080, 0.255),
    "soil_dark":            (0.085, 0.072, 0.058, 0.125),
    "soil_brown":           (0.140, 0.108, 0.078, 0.205),
    "soil_red":             (0.195, 0.112, 0.070, 0.270),
    "soil_ochre":           (0.235, 0.172, 0.110, 0.320),
    "soil_pale":            (0.285, 0.242, 0.190, 0.350),
    "sand":                 (0.330, 0.295, 0.240, 0.385),
    "mud":                  (0.125, 0.108, 0.084, 0.150),
    "water_clear":          (0.018, 0.032, 0.036, 0.012),
    "water_black":          (0.016, 0.018, 0.017, 0.010),
    "water_green":          (0.036, 0.066, 0.036, 0.026),
    "water_turbid":         (0.112, 0.098, 0.066, 0.048),
    "asphalt":              (0.098, 0.097, 0.094, 0.125),
    "concrete":             (0.215, 0.208, 0.190, 0.250),
    "roof_metal":           (0.360, 0.365, 0.360, 0.390),
    "roof_white":           (0.520, 0.525, 0.520, 0.545),
    "roof_tile":            (0.205, 0.128, 0.094, 0.255),
    "roof_grey":            (0.165, 0.160, 0.152, 0.190),
    "roof_rust":            (0.175, 0.118, 0.092, 0.215),
    "roof_blue":            (0.110, 0.165, 0.270, 0.300),
    "cloud":                (0.640, 0.645, 0.660, 0.690),
})
# fmt: on

# Light left in a full cast shadow: what the sky scatters, which is bluer than the sun.
SKY_LIGHT = np.array([0.26, 0.29, 0.36, 0.22], np.float32).reshape(4, 1, 1)

# Path radiance that haze of optical depth 1 would add, falling with wavelength about as lambda^-2.
HAZE = np.array([0.075, 0.095, 0.130, 0.045], np.float32).reshape(4, 1, 1)


def spectrum(name: str) -> Plane:
    """Reflectance of a material, shape (4, 1, 1), ready to broadcast over a chip."""
    return np.array(SPECTRA[name], np.float32).reshape(4, 1, 1)


def spectra(names: tuple[str, ...]) -> Plane:
    """Reflectance of several materials, shape (len(names), 4)."""
    return np.array([SPECTRA[name] for name in names], np.float32)


def mix(first: Plane, second: Plane, share: Plane | np.float32 | float) -> Plane:
    """Linear mixture: `first` where share is 0, `second` where it is 1."""
    return first + share * (second - first)


def vary(rng: np.random.Generator, colours: Plane, brightness: float = 0.12, hue: float = 0.04) -> Plane:
    """Individual materials around library ones: a common brightness factor and a small one per band.

    Args:
        rng: Source of randomness.
        colours: (N, 4) reflectances.
        brightness: Standard deviation of the log brightness.
        hue: Standard deviation of the log factor of each band.
    """
    count = len(colours)
    factor = rng.standard_normal((count, 1)) * brightness + rng.standard_normal((count, 4)) * hue
    return (colours * np.exp(factor)).astype(np.float32)


def ndvi(pixels: NDArray[np.generic]) -> Plane:
    """Normalized difference vegetation index of (4, ...) reflectances in any unit; 0 where both bands are 0."""
    red, nir = pixels[0].astype(np.float32), pixels[3].astype(np.float32)
    return np.asarray((nir - red) / np.maximum(nir + red, 1e-6), dtype=np.float32)
