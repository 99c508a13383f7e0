"""Average precision of scores that come chip by chip, for any weighting of the chips, in bounded memory.

Each chip leaves two histograms, of its positive and of its negative pixels. The bins are chosen once, from the first
pixels that come: where their positives are (which decides the precision where positives are rare), where all of them
are (which keeps apart scores that differ little), and evenly in the logit (for what comes later). While the scores are
no more than the bins, every one has a bin of its own and the result is exact.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

BINS = 4096
"""Of a single ranked class; of K classes each has 2 / K as many, but MIN_BINS."""

MIN_BINS = 512
FIRST_PIXELS = 200_000
LOGIT_LIMIT = 20.0
CHIPS_AT_ONCE = 512


class RankedScores:
    """Scores of one class against all others.

    Args:
        classes: How many are ranked side by side, which share the bins.
    """

    def __init__(self, classes: int = 1) -> None:
        self._bins = BINS if classes == 1 else max(MIN_BINS, 2 * BINS // classes)
        self._waiting: list[tuple[Array, Array]] = []
        self._waiting_pixels = 0
        self._edges: Array | None = None
        self._chips: list[tuple[tuple[Array, Array], tuple[Array, Array]]] = []

    def add(self, scores: Array, positive: Array) -> None:
        """One chip: scores (N,) in any order-preserving unit, probabilities by preference, and truth (N,) bool."""
        self._waiting.append((np.asarray(scores, np.float64), np.asarray(positive, bool)))
        self._waiting_pixels += len(positive)
        if self._edges is not None or self._waiting_pixels >= FIRST_PIXELS:
            self._count()

    def average_precision(self, weights: Array) -> Array:
        """Of each weighting of the chips; NaN where no chip with a positive pixel has weight.

        The sum over thresholds of (recall_n - recall_(n-1)) precision_n, as scikit-learn has it, with the bins' edges
        as thresholds.

        Args:
            weights: (R, chips), such as the counts of a resample.

        Returns:
            (R,) float64.
        """
        self._count()
        positives, negatives = (self._weighted(weights, side) for side in (0, 1))
        # From the highest score down.
        hits = positives[:, ::-1].cumsum(axis=1)
        found = hits + negatives[:, ::-1].cumsum(axis=1)
        total = hits[:, -1]
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.where(found > 0, hits / found, 0)
            areas: Array = (positives[:, ::-1] * precision).sum(axis=1) / np.where(total > 0, total, np.nan)
        return areas

    def _count(self) -> None:
        """Turn what waits into histograms."""
        if not self._waiting:
            return
        if self._edges is None:
            self._edges = choose_edges(
                np.concatenate([scores for scores, _ in self._waiting]),
                np.concatenate([positive for _, positive in self._waiting]),
                self._bins,
            )
        for scores, positive in self._waiting:
            places = np.searchsorted(self._edges, scores, side="right")
            self._chips.append((_filled(places[positive]), _filled(places[~positive])))
        self._waiting, self._waiting_pixels = [], 0

    def _weighted(self, weights: Array, side: int) -> Array:
        """Histograms (R, bins) of the weighted chips, in the order of the edges."""
        assert self._edges is not None
        width = len(self._edges) + 1
        found = np.zeros((len(weights), width))
        for first in range(0, len(self._chips), CHIPS_AT_ONCE):
            part = self._chips[first : first + CHIPS_AT_ONCE]
            # float32: twice as fast, and exact for counts up to 16 million.
            dense = np.zeros((len(part), width), np.float32)
            for row, sides in zip(dense, part, strict=True):
                places, counts = sides[side]
                row[places] = counts
            found += weights[:, first : first + CHIPS_AT_ONCE].astype(np.float32) @ dense
        return found


def choose_edges(scores: Array, positive: Array, bins: int) -> Array:
    """Ascending lower edges of bins, at most `bins`; a bin holds its lower edge.

    Args:
        scores: (N,) probabilities.
        positive: (N,) bool.
        bins: How many.
    """
    different = np.unique(scores)
    if len(different) <= bins:
        return different
    third = bins // 3
    logit = np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, third)
    even = np.where(logit < 0, np.exp(logit), 1) / (1 + np.exp(-np.abs(logit)))
    shares = np.linspace(0, 1, third)
    quantiles = [
        # "nearest" takes scores that occur: several positives with one score fall into one bin, whole.
        np.quantile(part, shares, method="nearest")
        for part in (scores[positive], scores)
        if len(part)
    ]
    return np.unique(np.concatenate([even, *quantiles]))


def _filled(places: Array) -> tuple[Array, Array]:
    """The bins that hold something, and how much."""
    filled, counts = np.unique(places, return_counts=True)
    return filled.astype(np.uint16), counts.astype(np.uint32)
