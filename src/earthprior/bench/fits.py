"""One fit of a bench: from labelled chips to scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from earthprior.bench import pixels
from earthprior.bench.ground import Ground, Mapper
from earthprior.bench.plan import TUNING, Fit
from earthprior.bench.table import Row
from earthprior.chips.batch import Batch
from earthprior.chips.catalog import ChipRow
from earthprior.chips.normalize import Affine
from earthprior.chips.selection import chip_key
from earthprior.downstream.budget import choose
from earthprior.errors import DivergedError
from earthprior.params.bench import BenchParams
from earthprior.representations import FrozenFeatures, Representation, context_maps, raw_context
from earthprior.scoring import Score

Train = Callable[[str, Sequence[ChipRow], float, int], Mapper]
"""How a network is trained: method, labelled chips, learning rate, seed."""

CROPS_AT_ONCE = 16


@dataclass(frozen=True)
class Fitter:
    """Does fits.

    Args:
        ground: What they share.
        bench: The section.
        train: How a network is trained.
        code: Digest of the code.
        metrics: Names of the scores.
    """

    ground: Ground
    bench: BenchParams
    train: Train
    code: str
    metrics: Sequence[str]

    def run(self, fit: Fit, value: float) -> Row:
        """Fit and judge.

        Args:
            fit: Which.
            value: Of its dial.
        """
        began, busy, ground = time.monotonic(), time.process_time(), self.ground
        labelled = choose(ground.labelled, fit.budget, fit.seed, ground.strata)
        judged = ground.holdout if fit.purpose == TUNING else ground.judged
        network = fit.method in ("finetune", "scratch")
        try:
            make = self.train if network else self._pixels
            mapper = make(fit.method, labelled, value, fit.seed)
            scores = ground.judge(mapper, judged)
        except DivergedError:
            # What diverges is a result, too: that this rate does not work.
            scores = dict.fromkeys(self.metrics, Score(float("nan"), float("nan"), float("nan")))
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - busy
        steps = self.bench.steps if network else None
        return Row(fit, value, len(labelled), steps, len(judged), scores, seconds, cpu_seconds, self.code)

    def _pixels(self, method: str, labelled: Sequence[ChipRow], l2: float, seed: int) -> Mapper:
        """A classifier of single pixels."""
        ground, count = self.ground, len(self.ground.classes)
        if method in ("probe", "untrained"):
            network = ground.backbone if method == "probe" else ground.untrained(seed)
            # At the level and side that serve.
            frozen = FrozenFeatures(lambda batch: network(batch.x0), network.crop_px, CROPS_AT_ONCE)
            fitted = pixels.linear(*self._sample(frozen, labelled, normalized=True), count, l2, seed)
            return Mapper(lambda x0: fitted.of_pyramid(network(x0)), network.crop_px, normalized=True)
        fit = pixels.perceptron if method == "context_mlp" else pixels.linear
        classify = fit(*self._sample(raw_context, labelled, normalized=False), count, l2, seed)

        def fn(chips: Tensor) -> Tensor:
            valid = chips.isfinite().all(1, keepdim=True)
            known = context_maps(chips.where(valid, 0), valid).permute(0, 2, 3, 1)
            answers = classify(known.reshape(-1, known.shape[-1]).numpy())
            return torch.from_numpy(answers).view(*known.shape[:3], count).permute(0, 3, 1, 2)

        return Mapper(fn, None, normalized=False)

    def _sample(
        self, represent: Representation, labelled: Sequence[ChipRow], normalized: bool
    ) -> tuple[pixels.Array, pixels.Array]:
        """Values (N, D) and classes (N,) of labelled pixels."""
        ground, values, classes = self.ground, [], []
        per_chip = max(1, min(self.bench.pixels, pixels.MAX_PIXELS // len(labelled)))
        for row, raw, valid, label in ground.chips(labelled):
            at = pixels.draw(chip_key(row), label, per_chip)
            x = ground.normalized(raw, valid) if normalized else raw.float()
            as_it_is = Affine(torch.zeros(1, x.shape[1], 1, 1), torch.ones(1, x.shape[1], 1, 1))
            values += [found.numpy() for found in represent(Batch(x, valid[:, None], as_it_is), [torch.from_numpy(at)])]
            classes.append(label[at[:, 0], at[:, 1]])
        return np.concatenate(values).astype(np.float32), np.concatenate(classes).astype(np.int64)
