"""Where frozen features are taken: at which noise level, from which side of the network and which levels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from earthprior.chips.batch import Batch
from earthprior.diffusion.gain import nearest_timestep
from earthprior.networks.sides import SIDES
from earthprior.params import Params
from earthprior.tasks.diffusion import DiffusionTask


@dataclass(frozen=True)
class Serving:
    """Where features are taken.

    Args:
        rho: Noise-to-signal ratio.
        t: The timestep nearest to it.
        side: decoder or encoder.
        levels: Of the pyramid, finest first; all of them where it serves.
        chosen_by: What made the choice, a phrase.
        score: The validation chips' score, if any.
    """

    rho: float
    t: int
    side: str
    levels: tuple[int, ...]
    chosen_by: str
    score: float | None = None

    def features(self, task: DiffusionTask) -> Callable[[Batch], list[Tensor]]:
        """batch -> the levels' features of a network."""

        def found(batch: Batch) -> list[Tensor]:
            pyramid = task.features(batch, self.rho, self.side)
            return [pyramid[level] for level in self.levels]

        return found

    @property
    def words(self) -> str:
        """For a text: rho 0.1, decoder, all levels."""
        return f"rho {self.rho:g}, {self.block}"

    @property
    def block(self) -> str:
        """For a row of a figure: decoder level 0; decoder levels 0 to 2."""
        if len(self.levels) == 1:
            return f"{self.side} level {self.levels[0]}"
        return f"{self.side} levels {self.levels[0]} to {self.levels[-1]}"

    def to_json(self, fingerprint: str) -> dict[str, Any]:
        """The content of serving.json.

        Args:
            fingerprint: Of the training, so that nobody takes the choice for other weights.
        """
        return {"fingerprint": fingerprint, **dataclasses.asdict(self), "levels": list(self.levels)}


def default(params: Params, task: DiffusionTask, why: str = "evaluate.probe_rho") -> Serving:
    """All levels of the decoder at `evaluate.probe_rho`: where nothing chooses."""
    rho = params.evaluate.probe_rho
    return Serving(rho, _timestep(task, rho), "decoder", tuple(range(len(task.widths))), why)


def chosen(tried: Sequence[Serving], by: str) -> Serving | None:
    """The one with the best score, the first of equals; None where no score is a number.

    Only sides as a whole can serve, as a backbone gives all levels of one; single levels are tried for information.
    """
    whole = max((len(one.levels) for one in tried), default=0)
    scored = [one for one in tried if len(one.levels) == whole and one.score is not None and np.isfinite(one.score)]
    return replace(max(scored, key=lambda one: one.score or 0.0), chosen_by=by) if scored else None


def candidates(params: Params, task: DiffusionTask) -> Iterator[list[Serving]]:
    """For each noise level of `evaluate.probe_rhos` and each side: each level on its own, and all of them.

    The bottom level is the same on both sides. Noise levels that share a timestep are one.
    """
    seen, every = set(), tuple(range(len(task.widths)))
    for rho in params.evaluate.probe_rhos:
        t = _timestep(task, rho)
        if t in seen:
            continue
        seen.add(t)
        for side in SIDES:
            alone = every if side == "decoder" else every[:-1]
            blocks = [(level,) for level in alone] + ([every] if len(every) > 1 else [])
            yield [Serving(rho, t, side, block, "") for block in blocks]


def _timestep(task: DiffusionTask, rho: float) -> int:
    return nearest_timestep(task.schedule, rho, float(task.linear.std))
