"""How predictions are judged against labels, with 95 % intervals: a bootstrap over chips, the independent units.

Pixels of a chip are neighbours, so that an interval over pixels would be far too narrow. Scores are made of sums over
chips (counts of a confusion matrix, histograms of scores, squared errors), and a resample of chips is a weighted sum:
all resamples are one matrix product. Resamples are addressed by the number of chips alone, so methods that are judged
on the same chips see the same resamples.

A resample in which a score does not exist (no pixel of the class, no spread of the numbers) is left out. Where more
than `MAX_UNDEFINED` of them are, or chips are fewer than two, the interval is NaN: too few chips hold the class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from earthprior.errors import EarthPriorError
from earthprior.randomness import numpy_generator
from earthprior.ranking import RankedScores

Array: TypeAlias = NDArray[Any]

RESAMPLES = 1000
RESAMPLES_AT_ONCE = 100
CONFIDENCE = 0.95
MAX_UNDEFINED = 0.05


@dataclass(frozen=True)
class Score:
    """A score and the ends of its 95 % interval (percentile bootstrap over chips); NaN where there is none."""

    value: float
    low: float
    high: float


def flat_scores(scores: Mapping[str, Score]) -> dict[str, float]:
    """For metrics and tables: `iou`, `iou_low`, `iou_high`, ...; what is NaN is absent.

    Args:
        scores: By name.
    """
    found: dict[str, float] = {}
    for name, score in scores.items():
        ends = {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
        found |= {key: float(value) for key, value in ends.items() if np.isfinite(value)}
    return found


class SegmentationScores:
    """Scores of class maps, a chip at a time.

    Two classes: `average_precision`, `iou` and `f1` of the second one, which is predicted where its probability is
    above 0.5. More: `average_precision` and `f1` averaged over the classes that occur in the labels, `mean_iou`
    likewise, and `accuracy`.

    Memory: a chip leaves K x K counts and, per ranked class, the filled bins of two histograms: at most about 100 kB,
    for sampled pixels a few bytes each. See `RankedScores` for the bins.

    Args:
        classes: Label values, in the order of the probabilities; other values are unlabelled.
    """

    def __init__(self, classes: Sequence[int]) -> None:
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise ValueError(f"scores need two or more different classes, not {list(classes)}")
        self._classes = np.asarray(classes, np.int64)
        self._order = np.argsort(self._classes)
        ranked = len(classes) if len(classes) > 2 else 1
        self._ranked = [RankedScores(ranked) for _ in range(ranked)]
        self._confusions: list[Array] = []

    def add(self, probabilities: Array, labels: Array, valid: Array | None = None) -> Self:
        """Judge a chip; one without a labelled valid pixel changes nothing.

        Args:
            probabilities: (K, H, W), or (N, K) of single pixels.
            labels: (H, W), or (N,).
            valid: Like labels, bool; None where all are.

        Raises:
            EarthPriorError: A probability is no number.
        """
        count = len(self._classes)
        by_pixel = np.moveaxis(probabilities, 0, -1) if np.ndim(labels) == 2 else np.asarray(probabilities)
        if by_pixel.shape != (*np.shape(labels), count):
            raise ValueError(f"{count} classes, probabilities {np.shape(probabilities)}, labels {np.shape(labels)}")
        truth = self._places(np.asarray(labels))
        counted = truth >= 0 if valid is None else (truth >= 0) & valid
        truth, asked = truth[counted], by_pixel[counted]
        if not len(truth):
            return self
        if not np.isfinite(asked).all():
            raise EarthPriorError("predicted probabilities hold values that are no numbers: has the training diverged?")
        # Of equal probabilities the first class wins: 0.5 is not above 0.5.
        pairs = truth * count + asked.argmax(axis=1)
        self._confusions.append(np.bincount(pairs, minlength=count**2))
        for place, ranked in enumerate(self._ranked):
            column = place if len(self._ranked) > 1 else 1
            ranked.add(asked[:, column], truth == column)
        return self

    @property
    def chips(self) -> int:
        """How many chips were judged."""
        return len(self._confusions)

    def values(self) -> dict[str, float]:
        """As `scores`, without intervals: a thousandth of the work."""
        if not self._confusions:
            return {}
        found = self._scored(np.stack(self._confusions), np.ones((1, self.chips)))
        return {name: float(value[0]) for name, value in found.items()}

    def scores(self) -> dict[str, Score]:
        """All scores by name; NaN where labels do not hold what a score needs. Empty without a chip."""
        if not self._confusions:
            return {}
        confusions = np.stack(self._confusions)
        drawn = [self._scored(confusions, weights) for weights in resamples(self.chips)]
        return _intervals(self.values(), drawn, self.chips)

    def _places(self, labels: Array) -> Array:
        """Places in `classes`, -1 for other values, which may be NaN."""
        ordered = self._classes[self._order]
        place = np.searchsorted(ordered, labels).clip(0, len(ordered) - 1)
        return np.where(ordered[place] == labels, self._order[place], -1)

    def _scored(self, confusions: Array, weights: Array) -> dict[str, Array]:
        """Scores (R,) of each row of weights (R, chips)."""
        count = len(self._classes)
        tables = (weights @ confusions).reshape(-1, count, count)
        hits, truths, guesses = tables.diagonal(axis1=1, axis2=2), tables.sum(2), tables.sum(1)
        precisions = np.stack([ranked.average_precision(weights) for ranked in self._ranked], axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            iou, f1 = hits / (truths + guesses - hits), 2 * hits / (truths + guesses)
            if count == 2:
                return {"average_precision": precisions[:, 0], "iou": iou[:, 1], "f1": f1[:, 1]}
            accuracy = hits.sum(1) / tables.sum((1, 2))
        present = truths > 0
        return {
            "average_precision": _mean(precisions, present),
            "mean_iou": _mean(iou, present),
            "f1": _mean(f1, present),
            "accuracy": accuracy,
        }


def image_scores(kind: str, truths: Array, predictions: Array) -> dict[str, Score]:
    """Scores of whole images, each one a chip.

    Args:
        kind: "classification" or "regression".
        truths: (N,): places of the classes, 0 .. K - 1, or numbers.
        predictions: (N, K) probabilities, or (N,) or (N, 1) numbers.

    Returns:
        Classes: `average_precision` and `f1` (two: of the second one; more: averages over those that occur) and
        `accuracy`. Numbers: `r2`, the share of the variance that is explained, and `mae` in the label's unit.
    """
    if kind == "regression":
        return _number_scores(np.asarray(truths, np.float64), np.asarray(predictions, np.float64).reshape(len(truths)))
    probabilities = np.asarray(predictions)
    scores = SegmentationScores(range(probabilities.shape[1]))
    for truth, row in zip(np.asarray(truths), probabilities, strict=True):
        scores.add(row[None], np.asarray([truth]))
    hits = (probabilities.argmax(axis=1) == np.asarray(truths)).astype(np.float64)
    drawn = np.concatenate([weights @ hits / len(hits) for weights in resamples(len(hits))])
    accuracy = interval(float(hits.mean()), drawn, len(hits))
    found = scores.scores() | {"accuracy": accuracy}
    return {name: found[name] for name in ("average_precision", "f1", "accuracy")}


def _number_scores(truths: Array, predictions: Array) -> dict[str, Score]:
    if not (np.isfinite(truths).all() and np.isfinite(predictions).all()):
        raise EarthPriorError("labels or predictions hold values that are no numbers: has the training diverged?")
    # Centred first: E[x^2] - E[x]^2 of large numbers would leave no digits.
    centred, errors = truths - truths.mean(), predictions - truths
    sums = np.stack([np.ones_like(truths), centred, centred**2, errors**2, np.abs(errors)], axis=1)

    def scored(weights: Array) -> dict[str, Array]:
        n, first, second, squares, absolute = (weights @ sums).T
        variance = second / n - (first / n) ** 2
        # What is left of equal numbers after rounding is no spread.
        spread = np.where(variance > 1e-12 * (second / n).clip(min=1e-300), variance, np.nan)
        return {"r2": 1 - squares / n / spread, "mae": absolute / n}

    value = {name: float(one[0]) for name, one in scored(np.ones((1, len(truths)))).items()}
    drawn = [scored(weights) for weights in resamples(len(truths))]
    return _intervals(value, drawn, len(truths))


def resamples(chips: int) -> Iterator[Array]:
    """How often each chip is in each resample: blocks (RESAMPLES_AT_ONCE, chips), `RESAMPLES` rows in all.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, Section 13.3 (the percentile interval).
    """
    generator = numpy_generator("bootstrap", chips)
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        yield generator.multinomial(chips, np.full(chips, 1 / chips), RESAMPLES_AT_ONCE).astype(np.float64)


def interval(value: float, drawn: Array, chips: int) -> Score:
    """A score with the interval that its resamples tell.

    Args:
        value: Of the chips as they are.
        drawn: Of the resamples, (R,); NaN where it does not exist.
        chips: How many there are.
    """
    defined = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or chips < 2 or len(defined) < (1 - MAX_UNDEFINED) * len(drawn):
        return Score(value, np.nan, np.nan)
    rest = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(defined, [rest, 100 - rest])
    return Score(value, float(low), float(high))


def _intervals(values: dict[str, float], drawn: list[dict[str, Array]], chips: int) -> dict[str, Score]:
    """Of each name: its value, and its resamples, in blocks."""
    return {
        name: interval(value, np.concatenate([part[name] for part in drawn]), chips) for name, value in values.items()
    }


def _mean(values: Array, counted: Array) -> Array:
    """Row by row over what counts; NaN where nothing does."""
    counts = counted.sum(1)
    with np.errstate(invalid="ignore"):
        means: Array = np.where(counted, values, 0).sum(1) / np.where(counts, counts, np.nan)
    return means
