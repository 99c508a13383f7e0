"""Are frozen features worth anything: a linear classifier per pixel, the very same for every representation.

Logistic regression on standardized values, fitted on pixels of training chips and judged on chips that it never saw.
Which pixels is a function of the chip's path alone, so all representations, and all runs, are asked about the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from earthprior.chips.batch import Batch
from earthprior.randomness import numpy_generator
from earthprior.representations import Representation

Labels: TypeAlias = NDArray[Any]

MAX_CLASSES = 64
"""A label raster with more values than this is no map of classes."""

MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Pixels:
    """Sampled pixels of one split.

    Args:
        values: Per representation (N, D) float32.
        classes: (N,) label values.
        chips: How many chips they come from.
    """

    values: Mapping[str, NDArray[np.float32]]
    classes: Labels
    chips: int


@dataclass(frozen=True)
class ProbeResult:
    """What the probe found, or why there is none.

    Args:
        reason: Why there is no probe, as a sentence; None if there is one.
        scores: Per representation its scores by name; empty without a probe. The first score is the headline.
        facts: What was compared: classes, chips, pixels, chips without a label.
        unconverged: Representations whose fit was stopped at the iteration limit.
    """

    reason: str | None = None
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    unconverged: tuple[str, ...] = ()


def choose_classes(labels: Iterable[Labels], nodata: float | None) -> tuple[list[int], str | None]:
    """The label values that are classes, and otherwise the reason why there are none.

    A value that the label files declare as nodata is unlabelled. The exception are masks of 0 and 1 that declare
    nodata 0, as many tools write them: there 0 is a class, or no class would be left to tell 1 from.

    Args:
        labels: Rasters (H, W) of the training chips.
        nodata: What the label files declare, if anything.
    """
    values: set[float] = set()
    for label in labels:
        values |= {float(value) for value in np.unique(label[np.isfinite(label)])}
        if len(values) > MAX_CLASSES + 1:
            return [], f"the label rasters have more than {MAX_CLASSES} values; only maps of classes are probed"
    if any(value != round(value) for value in values):
        return [], "the label rasters hold fractions; only maps of classes are probed"
    classes = sorted(int(value) for value in values if value != nodata)
    if len(classes) == 1 and nodata == 0 and 0 in values:
        classes = [0, *classes]
    if len(classes) < 2:
        return [], f"the training chips' labels hold {len(classes)} class(es), and a probe needs two"
    return classes, None


def sample_points(chip: str, label: Labels, valid: NDArray[np.bool_], classes: Sequence[int], count: int) -> Labels:
    """Up to `count` labelled valid pixels of a chip, (N, 2) int64, chosen by the chip's path alone."""
    candidates = np.flatnonzero(valid & np.isin(label, classes))
    if len(candidates) > count:
        candidates = np.sort(numpy_generator("probe", chip).choice(candidates, count, replace=False))
    return np.stack(np.unravel_index(candidates, label.shape), axis=1).astype(np.int64)


def collect(
    batches: Iterable[tuple[Batch, Sequence[str], Sequence[Labels]]],
    representations: Mapping[str, Representation],
    classes: Sequence[int],
    pixels: int,
) -> Pixels:
    """Sample the pixels of one split, a batch of chips at a time.

    Args:
        batches: Whole chips, their paths, and their labels (H, W).
        representations: By name.
        classes: Label values that count.
        pixels: How many per chip.
    """
    values: dict[str, list[NDArray[np.float32]]] = {name: [] for name in representations}
    targets: list[Labels] = []
    for batch, chips, labels in batches:
        masks = batch.valid[:, 0].cpu().numpy()
        points = [
            sample_points(chip, label, mask, classes, pixels)
            for chip, label, mask in zip(chips, labels, masks, strict=True)
        ]
        targets += [label[at[:, 0], at[:, 1]] for label, at in zip(labels, points, strict=True) if len(at)]
        tensors = [torch.from_numpy(at) for at in points]
        for name, represent in representations.items():
            values[name] += [rows.numpy() for rows in represent(batch, tensors) if len(rows)]
    if not targets:
        return Pixels({}, np.zeros(0, np.int64), 0)
    return Pixels(
        {name: np.concatenate(rows) for name, rows in values.items()},
        np.concatenate(targets).astype(np.int64),
        len(targets),
    )


def judge(fit: Pixels, judged: Pixels, facts: Mapping[str, Any]) -> ProbeResult:
    """Fit and score the same classifier on every representation.

    Two classes give the average precision of the greater value. More give the macro average precision over the classes
    in the judged pixels, accuracy, and mean intersection over union.

    Args:
        fit: Pixels of training chips.
        judged: Pixels of other chips.
        facts: What else to report.
    """
    known, asked = np.unique(fit.classes), np.unique(judged.classes)
    counts = {
        "classes": len(known),
        "fit_chips": fit.chips,
        "fit_pixels": len(fit.classes),
        "judged_chips": judged.chips,
        "judged_pixels": len(judged.classes),
    }
    if len(known) < 2 or len(asked) < 2:
        where = "fitted" if len(known) < 2 else "judged"
        return ProbeResult(reason=f"the {where} pixels hold fewer than two classes", facts={**facts, **counts})
    scores, unconverged = {}, []
    for name, values in fit.values.items():
        probabilities, converged = _predict(values, fit.classes, judged.values[name])
        scores[name] = _score(probabilities, known, judged.classes)
        if not converged:
            unconverged.append(name)
    share = {"positive_share": float(np.mean(judged.classes == known[1]))} if len(known) == 2 else {}
    return ProbeResult(None, scores, {**facts, **counts, **share}, tuple(unconverged))


def _predict(values: Any, classes: Labels, asked: Any) -> tuple[Any, bool]:
    """Class probabilities (N, classes) of a logistic regression, and whether its fit converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(values, classes)
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return model.predict_proba(asked), converged


def _score(probabilities: Any, known: Labels, truth: Labels) -> dict[str, float]:
    from sklearn.metrics import average_precision_score

    if len(known) == 2:
        return {"average_precision": float(average_precision_score(truth == known[1], probabilities[:, 1]))}
    guess = known[probabilities.argmax(axis=1)]
    places = [(place, value) for place, value in enumerate(known) if np.any(truth == value)]
    precisions = [average_precision_score(truth == value, probabilities[:, place]) for place, value in places]
    overlaps = [
        np.sum((guess == value) & (truth == value)) / np.sum((guess == value) | (truth == value)) for _, value in places
    ]
    return {
        "average_precision": float(np.mean(precisions)),
        "accuracy": float(np.mean(guess == truth)),
        "mean_iou": float(np.mean(overlaps)),
    }
