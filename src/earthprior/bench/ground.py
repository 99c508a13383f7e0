"""What all fits of a bench share: the backbone, the chips of each part, their labels, and how a map is judged."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from earthprior.backbone import Backbone
from earthprior.bench.holdout import hold_out, places
from earthprior.chips.catalog import ChipRow
from earthprior.chips.read import ChipSpec, read_chip
from earthprior.chips.selection import JUDGED_CHIPS, spread
from earthprior.errors import DataError
from earthprior.params.bench import BenchParams
from earthprior.prediction.tiling import predict_chip
from earthprior.scoring import Score, SegmentationScores

Array: TypeAlias = NDArray[Any]
ReadLabel: TypeAlias = Callable[[ChipRow], Array]
"""Places of classes (H, W) int64, below 0 where a pixel is unlabelled."""

OVERLAP = 8
"""Tiles overlap by this part of their width: enough to blend, at a third of what the half of a map for use costs."""


@dataclass(frozen=True)
class Mapper:
    """A fitted method.

    Args:
        fn: Raw (NaN where invalid) or normalized tiles (N, C, px, px) -> probabilities (N, K, px, px).
        px: Width of its tiles; None for whole chips.
        normalized: Whether it takes x0.
    """

    fn: Callable[[Tensor], Tensor]
    px: int | None
    normalized: bool


@dataclass(frozen=True)
class Ground:
    """What all fits share.

    Args:
        backbone: The pretrained one.
        untrained: The same network with fresh weights, by seed.
        folder: Of the chips.
        spec: What each chip must be.
        classes: Label values, in the order of probabilities.
        read_label: Of one chip.
        labelled: Train chips that budgets are drawn from.
        strata: Of each of them.
        holdout: Train chips that dials are chosen on.
        judged: Chips that count in the end.
        device: Where networks are.
    """

    backbone: Backbone
    untrained: Callable[[int], Backbone]
    folder: Path
    spec: ChipSpec
    classes: Sequence[object]
    read_label: ReadLabel
    labelled: Sequence[ChipRow]
    strata: Sequence[Hashable]
    holdout: Sequence[ChipRow]
    judged: Sequence[ChipRow]
    device: torch.device

    def chips(self, rows: Sequence[ChipRow]) -> Iterator[tuple[ChipRow, Tensor, Tensor, Array]]:
        """Row, raw pixels (1, C, H, W), valid (1, H, W), and classes (H, W), below 0 where nothing is known."""
        for row in rows:
            pixels, valid = read_chip(self.folder, row, self.spec)
            label = np.where(valid, self.read_label(row), -1)
            yield row, torch.from_numpy(_plain(pixels))[None], torch.from_numpy(valid)[None], label

    def normalized(self, raw: Tensor, valid: Tensor) -> Tensor:
        """x0, on the device."""
        return self.backbone.normalize(raw.to(self.device), valid.to(self.device))

    def judge(self, mapper: Mapper, rows: Sequence[ChipRow]) -> dict[str, Score]:
        """Scores of whole chips, all their labelled valid pixels."""
        scores = SegmentationScores(range(len(self.classes)))
        for _, raw, valid, label in self.chips(rows):
            x = self.normalized(raw, valid) if mapper.normalized else raw.float().masked_fill(~valid[:, None], np.nan)
            px = mapper.px or max(x.shape[-2:])
            found = predict_chip(mapper.fn, x, px, px // OVERLAP)[0]
            scores.add(found.cpu().numpy(), label)
        return scores.scores()


def divide(
    bench: BenchParams, folder: Path, train: Sequence[ChipRow], validate: Sequence[ChipRow], test: Sequence[ChipRow]
) -> tuple[list[ChipRow], list[ChipRow], list[ChipRow]]:
    """Labelled chips of the three parts: those that budgets are drawn from, the held out, and the judged ones.

    Args:
        bench: The section.
        folder: Of the chips.
        train: Labelled rows of the train split.
        validate: Of the validate split; judged where there is no labelled test row.
        test: Of the test split.

    Raises:
        DataError: There are too few.
    """
    judged = spread(test or validate, JUDGED_CHIPS)
    if not judged:
        raise DataError("no validate or test chip has a label, so nothing could be judged; label some")
    needed = min((budget for budget in bench.budgets if isinstance(budget, int)), default=1)
    held, rest = hold_out(train, places(folder, train), bench.holdout, needed)
    return rest, held, judged


def _plain(pixels: Array) -> Array:
    """A dtype that torch can count with."""
    return pixels.astype(np.float32) if pixels.dtype.name in ("uint16", "float64") else pixels
