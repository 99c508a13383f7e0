"""Random fields with a chosen spectrum: the raw material of relief, canopy, soil and clouds."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

Plane = NDArray[np.float32]


class Fields:
    """Draws Gaussian random fields of one size.

    Fields are made by shaping white noise in the frequency domain on a plane a fifth larger than the chip and cropping
    it: without the margin every chip would be periodic, which no landscape is.

    Args:
        rng: Source of randomness.
        size: Side of the fields in px.
    """

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        # SFC64 draws these millions of numbers in half the time of the addressed generator that seeds it.
        self.rng = np.random.Generator(np.random.SFC64(int(rng.integers(2**63))))
        self.size = size

    def fractal(self, slope: float, longest_px: float = 1e9, shortest_px: float = 2.0) -> Plane:
        """A field of power spectrum f^-slope between two wavelengths, flat above the longest.

        Relief has a slope near 4, soil moisture and land cover near 3, clouds near 8/3 + 1.

        Returns:
            (size, size) with mean 0 and standard deviation 1 over the chip.
        """
        radius = _frequencies(_padded(self.size))[2]
        amplitude = (radius**2 + longest_px**-2.0) ** (-slope / 4)
        if shortest_px > 2.0:
            amplitude = amplitude * np.exp(-((radius * shortest_px) ** 2))
        return self._draw(amplitude)

    def band(self, wavelength_px: float, width: float = 0.35) -> Plane:
        """A field whose power lies around one wavelength (log-normal ring); crowns, dunes, bushes."""
        radius = _frequencies(_padded(self.size))[2]
        log_ratio = np.log(np.maximum(radius, 1e-6) * wavelength_px)
        return self._draw(np.exp(-0.5 * (log_ratio / width) ** 2))

    def streaks(self, angle: float, along_px: float, across_px: float) -> Plane:
        """A field of streaks in direction `angle` (radians from the x axis): wind on water, tillage, drainage."""
        fy, fx, _ = _frequencies(_padded(self.size))
        along = fx * np.cos(angle) + fy * np.sin(angle)
        across = fy * np.cos(angle) - fx * np.sin(angle)
        return self._draw(np.exp(-2.0 * ((along * along_px) ** 2 + (across * across_px) ** 2)))

    def _draw(self, amplitude: Plane) -> Plane:
        padded = _padded(self.size)
        # Drawing the spectrum itself saves the forward transform; the inverse drops what breaks the symmetry.
        white = self.rng.standard_normal((*amplitude.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
        white[0, 0] = 0.0
        plane = fft.irfft2(white * amplitude.astype(np.float32), s=(padded, padded))[: self.size, : self.size]
        plane = plane - plane.mean()
        return np.asarray(plane / max(float(plane.std()), 1e-12), dtype=np.float32)


def line_noise(rng: np.random.Generator, length: int, smooth_px: float) -> Plane:
    """(length,) smooth one-dimensional noise, mean 0, standard deviation 1."""
    line = ndimage.gaussian_filter1d(rng.standard_normal(length), smooth_px, mode="wrap")
    return np.asarray((line - line.mean()) / max(float(line.std()), 1e-12), dtype=np.float32)


def distance_to_level(field: Plane, level: float = 0.0) -> Plane:
    """Signed distance in px from the contour where `field` equals `level`, to first order; positive above it.

    It lets natural outlines (shores, forest edges, rivers) be painted with sub-pixel coverage.
    """
    slope_y, slope_x = np.gradient(field)
    # Floor at a tenth of the mean slope: near a flat maximum the first-order distance would explode.
    slope = np.hypot(slope_y, slope_x)
    return np.asarray((field - level) / np.maximum(slope, 0.1 * float(slope.mean()) + 1e-12), dtype=np.float32)


def coverage(distance_px: Plane) -> Plane:
    """Share of a pixel covered by a region, from the signed distance of its centre to the edge (positive inside)."""
    return np.asarray(np.clip(distance_px + np.float32(0.5), 0.0, 1.0), dtype=np.float32)


def displaced(plane: Plane, dy: float, dx: float) -> Plane:
    """The plane moved down by `dy` and right by `dx` px (bilinear), its rim repeated."""
    return _moved(_moved(plane, dy, 0), dx, 1)


def _moved(plane: Plane, distance: float, axis: int) -> Plane:
    whole = int(np.floor(distance))
    part = np.float32(distance - whole)
    last = plane.shape[axis] - 1
    places = np.arange(last + 1) - whole
    near = plane.take(np.clip(places, 0, last), axis)
    far = plane.take(np.clip(places - 1, 0, last), axis)
    return np.asarray(near + part * (far - near), dtype=np.float32)


def _padded(size: int) -> int:
    return int(fft.next_fast_len(size + size // 5, real=True))


@lru_cache(maxsize=4)
def _frequencies(padded: int) -> tuple[Plane, Plane, Plane]:
    """Frequencies in cycles per px: fy (P, 1), fx (1, P // 2 + 1) and their radius."""
    fy = np.fft.fftfreq(padded).astype(np.float32)[:, None]
    fx = np.fft.rfftfreq(padded).astype(np.float32)[None, :]
    radius = np.hypot(fy, fx).astype(np.float32)
    radius[0, 0] = radius[0, 1]
    return fy, fx, radius
