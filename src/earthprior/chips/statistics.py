"""Exact streaming statistics of bands, mergeable and independent of the order and number of readers.

Integers are counted in one bin per value (65,536 at most), which makes count, mean, standard deviation and percentiles
exact: everything follows from whole numbers. Floats are counted in 2^20 bins that follow the number format itself
(sign, exponent and the 11 leading bits of the mantissa of float32), so that no range needs to be known in advance: a
bin is never wider than 1/2048 of its value, which is the error of a percentile at most. Their count, minimum and
maximum are exact too; mean and variance are merged chip by chip in float64, always in the catalog's order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (0.1, 1, 2, 5, 25, 50, 75, 95, 98, 99, 99.9)
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
        """count, min, max, mean, std (of the population) and percentiles, physical units; count must be above 0."""
        mean, std, low, high = self._integer_moments() if self._exact else self._float_moments()
        return {
            "count": self.count,
            "min": low,
            "max": high,
            "mean": mean,
            "std": std,
            "percentiles": {f"{percent:g}": self.percentile(percent) for percent in PERCENTILES},
        }

    def percentile(self, percent: float) -> float:
        """As `numpy.percentile` (linear): exact for integers, within 1/2048 of the value for floats."""
        rank = (self.count - 1) * percent / 100
        low, high = self._at(math.floor(rank)), self._at(math.ceil(rank))
        return low + (high - low) * (rank - math.floor(rank))

    def histogram(self, bins: int) -> list[tuple[float, float]]:
        """(bin centre, density of all pixels) between the percentiles 0.1 and 99.9."""
        low, high = self.percentile(0.1), self.percentile(99.9)
        used = np.flatnonzero(self.counts)
        values = self._lower(used)
        if self._exact:
            # Bins that hold unequal numbers of integers would draw a comb.
            width = float(max(1, math.ceil((high - low + 1) / bins)))
            edges = math.floor(low) - 0.5 + width * np.arange(math.ceil((high - math.floor(low) + 1) / width) + 1)
        else:
            values = ((values + self._lower(used + 1)) / 2).clip(self._low, self._high)
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

    def _integer_moments(self) -> tuple[float, float, float, float]:
        # Python's integers: the sum of squares of 100,000 chips leaves 64 bits.
        used = np.flatnonzero(self.counts)
        offset = int(np.iinfo(self.dtype).min)
        pairs = [(int(position) + offset, int(self.counts[position])) for position in used]
        count = sum(number for _, number in pairs)
        total = sum(value * number for value, number in pairs)
        squares = sum(value * value * number for value, number in pairs)
        std = math.sqrt((count * squares - total * total) / count**2)
        return total / count, std, float(pairs[0][0]), float(pairs[-1][0])

    def _float_moments(self) -> tuple[float, float, float, float]:
        return self._mean, math.sqrt(self._m2 / self._count), self._low, self._high

    def _at(self, rank: int) -> float:
        """The value of the rank-th smallest pixel; within a float's bin, as if its pixels were spread evenly."""
        running = np.cumsum(self.counts)
        place = int(np.searchsorted(running, rank, side="right"))
        low = float(self._lower(np.array([place]))[0])
        if self._exact:
            return low
        width = float(self._lower(np.array([place + 1]))[0]) - low
        inside = (rank - (int(running[place]) - int(self.counts[place])) + 0.5) / int(self.counts[place])
        return min(max(low + width * inside, self._low), self._high)

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
