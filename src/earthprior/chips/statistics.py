"""Exact streaming statistics of bands, mergeable and independent of the order and number of readers.

Integers are counted in one bin per value (65,536 at most), which makes count, mean, standard deviation and percentiles
exact, also of clipped pixels: everything follows from whole numbers. Floats are counted in 2^20 bins that follow the
number format itself (sign, exponent and the 11 leading bits of the mantissa of float32), so that no range needs to be
known in advance: a bin is never wider than 1/2048 of its value, which is the error of a percentile at most. Moments of
clipped floats take every pixel at its bin's middle, which is at most 1/4096 of its value away. Count, minimum and
maximum are exact for floats too; their mean and variance are merged chip by chip in float64, always in the catalog's
order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from earthprior.params import CLIP_PERCENTS

PERCENTILES = (0.1, 0.5, 1, 2, 5, 25, 50, 75, 95, 98, 99, 99.5, 99.9)
FLOAT_BINS = 2**20
_DROPPED_BITS = 12


@dataclass(frozen=True)
class BandSummary:
    """What one chip adds to one band.

    Attributes:
        first: The bin that `counts` begins with.
        counts: Valid pixels per bin, from the lowest value in the chip to the highest.
        count: Valid pixels.
        mean: Of the valid pixels, physical units.
        m2: Their summed squared distance from the mean.
        low: Smallest value.
        high: Largest value.
    """

    first: int
    counts: NDArray[np.int64]
    count: int
    mean: float
    m2: float
    low: float
    high: float


def summarize(values: NDArray[Any]) -> BandSummary:
    """Count one band's valid pixels (n,), n > 0, in the file's dtype."""
    if values.dtype.kind == "f":
        values = values.astype(np.float32)
        bins = _float_bins(values)
        # Only these three sums are inexact, and only for floats.
        wide = values.astype(np.float64)
        mean = float(wide.mean())
        moments = (mean, float(np.square(wide - mean).sum()), float(values.min()), float(values.max()))
    else:
        bins = values.astype(np.intp) - np.iinfo(values.dtype).min
        moments = (0.0, 0.0, 0.0, 0.0)
    first = int(bins.min())
    return BandSummary(first, np.bincount(bins - first), values.size, *moments)


class BandStatistics:
    """The statistics of one band (or of all) over many chips.

    Args:
        dtype: The chips' dtype.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self._exact = self.dtype.kind != "f"
        size = int(np.iinfo(self.dtype).max) - int(np.iinfo(self.dtype).min) + 1 if self._exact else FLOAT_BINS
        self.counts = np.zeros(size, dtype=np.int64)
        self._count, self._mean, self._m2 = 0, 0.0, 0.0
        self._low, self._high = math.inf, -math.inf

    def add(self, summary: BandSummary) -> None:
        """Take in one chip; for floats the order of calls decides the last bits."""
        self.counts[summary.first : summary.first + len(summary.counts)] += summary.counts
        if not self._exact:
            self._merge(summary.count, summary.mean, summary.m2, summary.low, summary.high)

    def merge(self, other: BandStatistics) -> None:
        """Take in another band's statistics."""
        self.counts += other.counts
        if not self._exact:
            self._merge(other._count, other._mean, other._m2, other._low, other._high)

    @property
    def count(self) -> int:
        """Valid pixels."""
        return int(self.counts.sum())

    def to_json(self) -> dict[str, Any]:
        """count, min, max, mean, std (of the population), percentiles and clipped, physical units; count must not be 0.

        clipped holds, per percentage p, min, max, mean and std of the pixels cut to the percentiles p and 100 - p.
        """
        mean, std, low, high = self._integer_moments() if self._exact else self._float_moments()
        at = {percent: self.percentile(percent) for percent in PERCENTILES}
        return {
            "count": self.count,
            "min": low,
            "max": high,
            "mean": mean,
            "std": std,
            "percentiles": {f"{percent:g}": value for percent, value in at.items()},
            "clipped": {f"{percent:g}": self._clipped(at[percent], at[100 - percent]) for percent in CLIP_PERCENTS[1:]},
        }

    def percentile(self, percent: float) -> float:
        """As `numpy.percentile` (linear): exact for integers, within 1/2048 of the value for floats."""
        running = np.cumsum(self.counts)
        rank = (int(running[-1]) - 1) * percent / 100
        low, high = self._at(math.floor(rank), running), self._at(math.ceil(rank), running)
        return low + (high - low) * (rank - math.floor(rank))

    def histogram(self, bins: int) -> list[tuple[float, float]]:
        """(bin centre, density of all pixels) between the percentiles 0.1 and 99.9."""
        low, high = self.percentile(0.1), self.percentile(99.9)
        used = np.flatnonzero(self.counts)
        if self._exact:
            values = self._lower(used)
            # Bins that hold unequal numbers of integers would draw a comb.
            width = float(max(1, math.ceil((high - low + 1) / bins)))
            edges = math.floor(low) - 0.5 + width * np.arange(math.ceil((high - math.floor(low) + 1) / width) + 1)
        else:
            values = self._middles(used)
            high = high if high > low else low + max(abs(low), 1.0) * 1e-6
            edges = np.linspace(low, high, bins + 1)
        found, _ = np.histogram(values, bins=edges, weights=self.counts[used].astype(np.float64))
        density = found / (self.count * np.diff(edges))
        centres = (edges[1:] + edges[:-1]) / 2
        return list(zip(centres.tolist(), density.tolist(), strict=True))

    def _merge(self, count: int, mean: float, m2: float, low: float, high: float) -> None:
        """Join two samples' moments. Source: Chan, Golub & LeVeque 1983, Equations 1.1 and 1.5."""
        if count == 0:
            return
        total = self._count + count
        apart = mean - self._mean
        self._mean += apart * count / total
        self._m2 += m2 + apart * apart * self._count * count / total
        self._count, self._low, self._high = total, min(self._low, low), max(self._high, high)

    def _clipped(self, low: float, high: float) -> dict[str, float]:
        mean, std = self._clipped_moments(low, high) if low < high else (low, 0.0)
        return {"min": low, "max": high, "mean": mean, "std": std}

    def _clipped_moments(self, low: float, high: float) -> tuple[float, float]:
        if self._exact:
            pairs = self._pairs()
            under = sum(number for value, number in pairs if value < low)
            above = sum(number for value, number in pairs if value > high)
            inside = [(value, number) for value, number in pairs if low <= value <= high]
            # The limits lie between whole numbers. They come last, so that only the last sums are of fractions.
            return _moments([*inside, (Fraction(low), under), (Fraction(high), above)])
        used = np.flatnonzero(self.counts)
        values, counts = self._middles(used).clip(low, high), self.counts[used]
        mean = float((values * counts).sum() / counts.sum())
        return mean, math.sqrt(float((np.square(values - mean) * counts).sum() / counts.sum()))

    def _integer_moments(self) -> tuple[float, float, float, float]:
        pairs = self._pairs()
        return *_moments(pairs), float(pairs[0][0]), float(pairs[-1][0])

    def _pairs(self) -> list[tuple[int, int]]:
        """(value, pixels) of every integer that occurs, ascending; Python's integers, for `_moments`."""
        used = np.flatnonzero(self.counts)
        values = used + int(np.iinfo(self.dtype).min)
        return list(zip(values.tolist(), self.counts[used].tolist(), strict=True))

    def _float_moments(self) -> tuple[float, float, float, float]:
        return self._mean, math.sqrt(self._m2 / self._count), self._low, self._high

    def _at(self, rank: int, running: NDArray[np.int64]) -> float:
        """The value of the rank-th smallest pixel; within a float's bin, as if its pixels were spread evenly."""
        place = int(np.searchsorted(running, rank, side="right"))
        low = float(self._lower(np.array([place]))[0])
        if self._exact:
            return low
        width = float(self._lower(np.array([place + 1]))[0]) - low
        inside = (rank - (int(running[place]) - int(self.counts[place])) + 0.5) / int(self.counts[place])
        return min(max(low + width * inside, self._low), self._high)

    def _middles(self, bins: NDArray[Any]) -> NDArray[np.float64]:
        """Middle of each float bin, inside the values that occur."""
        return ((self._lower(bins) + self._lower(bins + 1)) / 2).clip(self._low, self._high)

    def _lower(self, bins: NDArray[Any]) -> NDArray[np.float64]:
        """Smallest value of each bin."""
        if self._exact:
            return bins.astype(np.float64) + float(np.iinfo(self.dtype).min)
        return _float_edges(bins)


def merged(parts: Sequence[BandStatistics]) -> BandStatistics:
    """The statistics over all bands."""
    whole = BandStatistics(parts[0].dtype.name)
    for part in parts:
        whole.merge(part)
    return whole


def _moments(pairs: Sequence[tuple[int | Fraction, int]]) -> tuple[float, float]:
    """Mean and population standard deviation of (value, pixels), without rounding before the end.

    In Python's integers: the sum of squares of 100,000 chips leaves 64 bits.
    """
    count = sum(number for _, number in pairs)
    total = sum(value * number for value, number in pairs)
    squares = sum(value * value * number for value, number in pairs)
    return float(total / count), math.sqrt((count * squares - total * total) / count**2)


def _float_bins(values: NDArray[np.float32]) -> NDArray[np.intp]:
    """The bin of each float: its bits, reordered so that they ascend with the value, less the lowest ones."""
    # Adding 0 turns -0 into 0, which are one value but two bit patterns.
    bits = (values + np.float32(0)).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    return (ordered >> _DROPPED_BITS).astype(np.intp)


def _float_edges(bins: NDArray[Any]) -> NDArray[np.float64]:
    """Smallest value of each bin, the inverse of `_float_bins`."""
    ordered = (bins.astype(np.uint64) << np.uint64(_DROPPED_BITS)).astype(np.uint32)
    bits = np.where(ordered >> 31, ordered & np.uint32(0x7FFFFFFF), ~ordered)
    return np.asarray(bits.astype(np.uint32).view(np.float32), dtype=np.float64)
