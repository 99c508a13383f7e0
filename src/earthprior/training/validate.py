"""Validation on fixed triples (chip, noise level, noise): the same in every epoch and every run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import pandas as pd
import torch
from torch import nn

from earthprior.chips.batch import Batch
from earthprior.diffusion.gain import (
    Denoiser,
    NoiseLevel,
    denoising_table,
    gain_db,
    level_means,
    linear_denoiser,
    mse,
    noise_levels,
)
from earthprior.randomness import torch_generator
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.tasks.task import Task
from earthprior.training.headline import GAIN, Headline

Batches = Callable[[], Iterator[tuple[Batch, Sequence[str]]]]
"""Makes an iterator over validation batches with a key (path) per chip."""


class Judge(Protocol):
    """What judges a task on chips that it does not learn from."""

    headline: Headline

    def judge(self, task: Any) -> dict[str, float]:
        """The loss, under that name, the headline, and what else there is to tell, for the task's present network."""
        ...


class Validation:
    """Judges a task on the same noisy chips each time; the linear denoiser is measured once, by the same code.

    Args:
        batches: The validation chips.
        bands: Their names.
    """

    headline = GAIN

    def __init__(self, batches: Batches, bands: Sequence[str]) -> None:
        self._batches = batches
        self._bands = bands
        self._linear: pd.DataFrame | None = None

    @torch.no_grad()
    def judge(self, task: DiffusionTask) -> dict[str, float]:
        """loss, and gain_db/<level> and gain_db/mean over the linear denoiser, for the task's present network."""
        levels = noise_levels(task.schedule, float(task.linear.std))
        if self._linear is None:
            linear = linear_denoiser(task.linear, task.schedule)
            self._linear = self._errors("linear", lambda batch: linear, task, levels)
        errors = self._errors("network", task.denoiser, task, levels).join(self._linear)
        return {"loss": self._loss(task), **{f"gain_db/{name}": gain for name, gain in gain_db(errors).items()}}

    def _errors(
        self, name: str, maker: Callable[[Batch], Denoiser], task: DiffusionTask, levels: Sequence[NoiseLevel]
    ) -> pd.DataFrame:
        """Mean squared error per level of one denoiser."""
        table = denoising_table({name: maker}, self._batches(), task.schedule, levels, self._bands, {"mse": mse})
        return level_means(table, "mse")

    def _loss(self, task: DiffusionTask) -> float:
        """The training loss on the validation chips, with fixed timesteps and noise."""
        total, chips = 0.0, 0
        for index, (batch, _) in enumerate(self._batches()):
            generator = torch_generator("validation loss", index, device=batch.x0.device)
            total += float(task.loss(batch, generator).total) * len(batch)
            chips += len(batch)
        return total / chips


class evaluating(AbstractContextManager[None]):
    """Inside, the task runs `network` (the averaged weights) in evaluation mode; its own network comes back after."""

    def __init__(self, task: Task, network: nn.Module) -> None:
        self._task, self._network, self._own = task, network, task.network

    def __enter__(self) -> None:
        self._task.network = self._network
        self._task.eval()

    def __exit__(self, *exception: object) -> None:
        self._task.network = self._own
