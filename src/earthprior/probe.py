"""Are frozen features worth anything: small classifiers per pixel, the very same for every representation.

Fitted on pixels of training chips and judged on chips that they never saw. Which pixels is a function of the chip's
path alone, so all representations, and all runs, are asked about the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from earthprior.chips.batch import Batch
from earthprior.probe_models import Probe
from earthprior.randomness import numpy_generator
from earthprior.representations import Representation
from earthprior.scoring import Score, SegmentationScores

Labels: TypeAlias = NDArray[Any]

MAX_CLASSES = 64
"""A label raster with more values than this is no map of classes."""


@dataclass(frozen=True)
class Pixels:
    """Sampled pixels of one split in one representation.

    Args:
        values: (N, D) float32.
        classes: (N,) label values.
        counts: How many of them each chip has, in their order.
    """

    values: NDArray[np.float32]
    classes: Labels
    counts: Sequence[int]


@dataclass(frozen=True)
class ProbeResult:
    """What probes found, or why there are none.

    Args:
        reason: Why there is no probe, as a sentence; None if there is one.
        scores: By probe, representation and name, with intervals; empty without a probe. The first score of each is the
            headline.
        facts: What was compared: classes, chips, pixels, chips without a label.
        unconverged: Probe and representation, as words, where a fit was stopped at the iteration limit.
    """

    reason: str | None = None
    scores: Mapping[str, Mapping[str, Mapping[str, Score]]] = field(default_factory=dict)
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
    represent: Representation,
    classes: Sequence[int],
    pixels: int,
) -> Pixels:
    """Sample the pixels of one split, a batch of chips at a time.

    Args:
        batches: Whole chips, their paths, and their labels (H, W).
        represent: What is kept of each pixel.
        classes: Label values that count.
        pixels: How many per chip.
    """
    values: list[NDArray[np.float32]] = []
    targets: list[Labels] = []
    for batch, chips, labels in batches:
        masks = batch.valid[:, 0].cpu().numpy()
        points = [
            sample_points(chip, label, mask, classes, pixels)
            for chip, label, mask in zip(chips, labels, masks, strict=True)
        ]
        targets += [label[at[:, 0], at[:, 1]] for label, at in zip(labels, points, strict=True) if len(at)]
        tensors = [torch.from_numpy(at) for at in points]
        values += [rows.numpy() for rows in represent(batch, tensors) if len(rows)]
    if not targets:
        return Pixels(np.zeros((0, 0), np.float32), np.zeros(0, np.int64), [])
    return Pixels(np.concatenate(values), np.concatenate(targets).astype(np.int64), [len(part) for part in targets])


def unprobeable(fit: Labels, judged: Labels) -> str | None:
    """Why pixels of these classes (N,) tell nothing, or None."""
    for where, classes in (("fitted", fit), ("judged", judged)):
        if len(np.unique(classes)) < 2:
            return f"the {where} pixels hold fewer than two classes"
    return None


def judge(probe: Probe, fit: Pixels, judged: Pixels, classes: Sequence[int]) -> tuple[SegmentationScores, bool]:
    """Fit a probe, and score what it says of other pixels, a chip at a time.

    Args:
        probe: One of `PIXEL_PROBES`.
        fit: Pixels of training chips, of two or more classes.
        judged: Pixels of other chips.
        classes: All label values that count; one that no fitted pixel has gets no probability.

    Returns:
        The scores, and whether the fit converged.
    """
    known, places = np.unique(fit.classes, return_inverse=True)
    answer, converged = probe(fit.values, places, judged.values)
    probabilities = np.zeros((len(answer), len(classes)))
    probabilities[:, [list(classes).index(value) for value in known]] = answer
    scores = SegmentationScores(classes)
    ends = np.cumsum(judged.counts)
    for start, end in zip(ends - judged.counts, ends, strict=True):
        scores.add(probabilities[start:end], judged.classes[start:end])
    return scores, converged
