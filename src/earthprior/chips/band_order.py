"""Whether a chip's bands come in another order than those of the other chips, where no description tells it.

Bands of one scene are alike to a degree that depends on which bands they are: visible ones nearly follow each other,
near infrared goes its own way over anything that grows. So a chip whose bands are unlike each other in another pattern
than in the other chips, and in just their pattern if two bands change places, has very likely these two swapped.

On 590 aerial chips of all seasons, none is suspected; with red and NIR swapped in every tenth, 98 of 100 are found, in
every fourth two thirds. Bands that are nearly the same, as red and green, are not told apart, and where all chips have
one wrong order there is nothing to compare them with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_PIXELS, LEAST_PIXELS = 4096, 256
"""Valid pixels of a chip that are looked at, evenly spread, and that are needed."""

MOST_BANDS = 16
"""What is remembered of a chip grows with the square of its bands, and what is compared with their fourth power."""

LEAST_CHIPS = 16
"""To know a pattern by."""

BETTER, GOOD = 4.0, 3.0
"""Mean squared distance from the others' pattern, in their spread: what swapping two bands must gain, and may leave. On
sound chips it gains up to 2.6."""

LEAST_SPREAD = 0.25
"""Of Fisher's z; chips that are all alike must not make a small difference a large one."""

_LARGEST_Z = 4.0
_BINS = 800


def likeness(pixels: NDArray[Any]) -> NDArray[np.float32] | None:
    """How alike the bands of a chip are: Fisher's z of the correlation of each pair.

    Args:
        pixels: The valid ones (C, n).

    Returns:
        (C * (C - 1) / 2,), pairs in the order of `itertools.combinations`; None where too little can be told, or there
        are too many of them.
    """
    bands, count = pixels.shape
    if not 3 <= bands <= MOST_BANDS or count < LEAST_PIXELS:
        return None
    some = pixels[:, :: -(-count // MOST_PIXELS)].astype(np.float64)
    if (np.ptp(some, axis=1) == 0).any():
        return None
    rows, columns = np.triu_indices(bands, 1)
    correlation = np.atleast_2d(np.corrcoef(some))[rows, columns]
    z: NDArray[np.float32] = np.arctanh(correlation.clip(-0.999, 0.999)).astype(np.float32)
    return z


@dataclass(frozen=True)
class Swap:
    """Two bands of a chip that look swapped.

    Attributes:
        line: Of the chip in the catalog.
        bands: The positions of the two.
        here: Each one's mean correlation with the other bands.
        elsewhere: The same in most chips.
    """

    line: int
    bands: tuple[int, int]
    here: tuple[float, float]
    elsewhere: tuple[float, float]


class BandOrder:
    """The pattern that most chips have; a histogram per pair of bands, whatever the number of chips.

    Args:
        bands: How many a chip has.
    """

    def __init__(self, bands: int) -> None:
        self._bands = bands
        self._pairs = list(combinations(range(bands), 2)) if bands <= MOST_BANDS else []
        self._counts = np.zeros((len(self._pairs), _BINS), dtype=np.int64)

    def add(self, z: NDArray[np.float32]) -> None:
        """Take in one chip's `likeness`."""
        bins = ((z + _LARGEST_Z) / (2 * _LARGEST_Z) * _BINS).astype(int).clip(0, _BINS - 1)
        self._counts[np.arange(len(z)), bins] += 1

    def swapped(self, chips: Iterable[tuple[int, NDArray[np.float32]]]) -> Iterator[Swap]:
        """The chips, as (line, likeness), in which two bands look swapped."""
        if len(self._pairs) == 0 or self._counts[0].sum() < LEAST_CHIPS:
            return
        low, middle, high = (self._quantile(share) for share in (0.25, 0.5, 0.75))
        spread = np.maximum((high - low) / 1.349, LEAST_SPREAD)
        orders = np.array([self._order(*pair) for pair in self._pairs])
        changed = orders != np.arange(len(self._pairs))
        for line, z in chips:
            as_named = np.square((z - middle) / spread)
            as_swapped = np.square((z[orders] - middle) / spread)
            before = (as_named * changed).sum(axis=1) / changed.sum(axis=1)
            after = (as_swapped * changed).sum(axis=1) / changed.sum(axis=1)
            best = int(np.argmax(before - after))
            if before[best] - after[best] >= BETTER and after[best] <= GOOD:
                one, other = self._pairs[best]
                here = self._mean(z, one), self._mean(z, other)
                yield Swap(line, (one, other), here, (self._mean(middle, one), self._mean(middle, other)))

    def _quantile(self, share: float) -> NDArray[np.float64]:
        """Of each pair's z over the chips, to half a bin."""
        running = np.cumsum(self._counts, axis=1)
        bins = (running < share * running[:, -1:]).sum(axis=1)
        z: NDArray[np.float64] = (bins + 0.5) * (2 * _LARGEST_Z / _BINS) - _LARGEST_Z
        return z

    def _order(self, one: int, other: int) -> list[int]:
        """Where each pair's z comes from when two bands change places."""
        places = list(range(self._bands))
        places[one], places[other] = other, one
        number = {pair: index for index, pair in enumerate(self._pairs)}
        return [number[min(places[a], places[b]), max(places[a], places[b])] for a, b in self._pairs]

    def _mean(self, z: NDArray[Any], band: int) -> float:
        return float(np.tanh([value for pair, value in zip(self._pairs, z, strict=True) if band in pair]).mean())
