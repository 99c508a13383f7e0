"""What is had without pretraining: a linear classifier on each pixel and its surroundings, from the same labels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from earthprior.chips.batch import LABEL, UNLABELLED, Batch
from earthprior.chips.catalog import ChipRow
from earthprior.chips.loader import RawBatch
from earthprior.chips.normalize import Affine
from earthprior.chips.selection import chip_key, spread
from earthprior.downstream.fitting import Setup, read
from earthprior.probe import sample_points
from earthprior.representations import raw_context
from earthprior.scoring import Score, SegmentationScores

FITTED_PIXELS, FITTED_CHIPS = 50_000, 512
"""That it is fitted on, at most: more would sharpen no difference that matters."""

MAX_ITERATIONS = 300


def context_scores(setup: Setup, train: Sequence[ChipRow], judged: Sequence[ChipRow]) -> dict[str, Score]:
    """Scores of raw pixels with local context, see `representations.raw_context`; empty where it cannot be fitted.

    Args:
        setup: Of the finetuning, whose chips and labels it shares.
        train: That it learns from.
        judged: That it is judged on, whole.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    count, rows = len(setup.labels.classes), spread(train, FITTED_CHIPS)
    values, classes = [], []
    for chip, row, label in _chips(setup, rows):
        valid = chip.valid[0, 0].numpy()
        at = sample_points(chip_key(row), label, valid, range(count), FITTED_PIXELS // len(rows))
        values.append(raw_context(chip, [torch.from_numpy(at)])[0].numpy())
        classes.append(label[at[:, 0], at[:, 1]])
    known = np.unique(np.concatenate(classes))
    if len(known) < 2:
        return {}
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings():
        # A fit that is stopped early is a fit; what it is worth is measured.
        warnings.simplefilter("ignore")
        model.fit(np.concatenate(values), np.concatenate(classes))
    scores = SegmentationScores(range(count))
    for chip, _, label in _chips(setup, judged):
        everywhere = torch.from_numpy(np.stack(np.unravel_index(np.arange(label.size), label.shape), axis=1))
        probabilities = np.zeros((label.size, count), np.float32)
        probabilities[:, known] = model.predict_proba(raw_context(chip, [everywhere])[0].numpy())
        scores.add(probabilities, label.ravel(), chip.valid[0, 0].numpy().ravel() & (label.ravel() != UNLABELLED))
    return scores.scores()


def _chips(setup: Setup, rows: Sequence[ChipRow]) -> Iterator[tuple[Batch, ChipRow, NDArray[Any]]]:
    """Chips one by one, in physical values, with their labels (H, W)."""
    for raw in read(setup, rows, [[place] for place in range(len(rows))]):
        yield _physical(raw), raw.rows[0], raw.extra[LABEL][0].numpy()


def _physical(raw: RawBatch) -> Batch:
    nothing = torch.zeros(len(raw), raw.pixels.shape[1], 1, 1)
    return Batch(raw.pixels.to(torch.float32), raw.valid[:, None].clone(), Affine(nothing, nothing + 1))
