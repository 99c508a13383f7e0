"""A finetuned network beside the labels of chips that it did not learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from earthprior.chips.batch import LABEL, UNLABELLED, Batch
from earthprior.chips.catalog import ChipRow
from earthprior.chips.selection import some_crops
from earthprior.downstream.network import answer
from earthprior.downstream.saved import Finetuned
from earthprior.downstream.task import DownstreamTask
from earthprior.prediction.tiling import predict_chip
from earthprior.randomness import torch_generator
from earthprior.scoring import Score, SegmentationScores, image_scores
from earthprior.training.headline import Headline

AVERAGE_PRECISION = Headline(
    "average_precision", "average_precision_best", "average precision", "average precision {:.4f}"
)
R2 = Headline("r2", "r2_best", "R2", "R2 {:.4f}")
HEADLINES = {"segmentation": AVERAGE_PRECISION, "classification": AVERAGE_PRECISION, "regression": R2}

WholeChips = Callable[[], Iterator[tuple[Batch, Sequence[ChipRow]]]]
"""Makes an iterator over batches of whole chips with their labels, and their rows."""

VALIDATION_CROPS = 128
"""Crops that each validation looks at, at least, where maps are made; one of each chip, or more where these are few."""


class LabelledValidation:
    """Judges a task on labelled chips after each epoch: the loss, and scores without intervals.

    Maps on crops, the same ones each time; chips that have one label each are judged whole.

    Args:
        kind: segmentation, classification or regression.
        classes: How many; 0 for numbers.
        chips: The validation chips.
        count: How many these are.
        crop_px: What the network is trained on.
        at_once: Crops in a forward pass.
    """

    def __init__(self, kind: str, classes: int, chips: WholeChips, count: int, crop_px: int, at_once: int) -> None:
        self.headline = HEADLINES[kind]
        self._kind, self._classes, self._chips = kind, classes, chips
        self._crop_px, self._at_once = crop_px, at_once
        self._per_chip = -(-VALIDATION_CROPS // count)

    @torch.no_grad()
    def judge(self, task: DownstreamTask) -> dict[str, float]:
        """See `training.validate.Judge`."""
        scores, total, count = Scores(self._kind, self._classes), 0.0, 0
        for chips, rows in self._chips():
            maps = self._kind == "segmentation"
            crops = some_crops(chips, rows, self._crop_px, self._per_chip)[0] if maps else chips
            outputs = []
            for first in range(0, len(crops), self._at_once):
                part = crops[slice(first, first + self._at_once)]
                counted = int(part.counted().sum())
                total += float(task.loss(part, torch_generator("validation loss")).total) * counted
                count += counted
                outputs.append(predicted(task, part))
            found, each = torch.cat(outputs), len(crops) // len(chips)
            # All crops of a chip are one chip's pixels.
            for place in range(0, len(crops), each):
                own = slice(place, place + each)
                scores.add(found[own], crops[own])
        return {"loss": total / max(count, 1), **scores.values()}


class Scores:
    """Scores of predictions, a batch at a time.

    Args:
        kind: segmentation, classification or regression.
        classes: How many; 0 for numbers.
    """

    def __init__(self, kind: str, classes: int) -> None:
        self._kind = kind
        self._maps = SegmentationScores(range(classes)) if kind == "segmentation" else None
        self._truths: list[NDArray[Any]] = []
        self._predictions: list[NDArray[Any]] = []

    def add(self, predictions: Tensor, batch: Batch) -> None:
        """Judge a chip, whole or all crops of it; or chips that have one label each.

        Args:
            predictions: (N, K, H, W), or (B, K).
            batch: With its labels.
        """
        label = batch.extra[LABEL].cpu().numpy()
        found = predictions.float().cpu().numpy()
        if self._maps is not None:
            by_pixel = np.moveaxis(found, 1, -1).reshape(-1, found.shape[1])
            self._maps.add(by_pixel, label.reshape(-1), batch.valid[:, 0].cpu().numpy().reshape(-1))
            return
        known = np.ones(len(label), bool) if self._kind == "regression" else label != UNLABELLED
        self._truths.append(label[known])
        self._predictions.append(found[known])

    def scores(self) -> dict[str, Score]:
        """All scores by name, with intervals."""
        if self._maps is not None:
            return self._maps.scores()
        return image_scores(self._kind, np.concatenate(self._truths), np.concatenate(self._predictions))

    def values(self) -> dict[str, float]:
        """All scores by name, without intervals; a headline that does not exist is 0."""
        found = self._maps.values() if self._maps is not None else {n: s.value for n, s in self.scores().items()}
        headline = HEADLINES[self._kind].name
        return {headline: 0.0, **{name: value for name, value in found.items() if np.isfinite(value)}}


def predicted(task: DownstreamTask, batch: Batch) -> Tensor:
    """Probabilities or numbers of the task's present network."""
    return answer(task.network(batch.x0, batch.valid), task.kind, *task.scale)


@torch.no_grad()
def judge(model: Finetuned, chips: Iterator[Batch]) -> dict[str, Score]:
    """Scores with intervals on whole chips; maps are blended from overlapping tiles."""
    scores = Scores(model.kind, len(model.classes))
    for batch in chips:
        if model.kind != "segmentation":
            scores.add(model.predict(batch.x0, batch.valid), batch)
            continue
        for place in range(len(batch)):
            chip = batch[slice(place, place + 1)]
            scores.add(map_of(model, chip.x0), chip)
    return scores.scores()


def map_of(model: Finetuned, x0: Tensor) -> Tensor:
    """Probabilities (B, K, H, W) of whole chips."""
    return predict_chip(model.predict, x0, model.crop_px)
