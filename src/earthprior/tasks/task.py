"""The seam between pretext tasks and the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from earthprior.chips.batch import Batch
from earthprior.diffusion.gain import Denoiser


@dataclass(frozen=True)
class Loss:
    """The loss of one batch.

    Attributes:
        total: (), what is differentiated.
        per_chip: (B,), detached, for diagnosis and timestep histories: without the factor by which `total` makes up
            for timesteps that are drawn more often than others.
        t: (B,) timesteps, or None for a task without them.
        terms: Named parts of the total, detached, for the log.
    """

    total: Tensor
    per_chip: Tensor
    t: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)


class Task(Protocol):
    """A pretext task: owns its network, its corruption, its target and where that counts.

    It knows no optimizer and no tracking. Its own state (teachers, centres, histories) is in its state_dict.
    """

    network: nn.Module

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """The loss of a batch; all randomness comes from the generator, so that the same call repeats exactly."""
        ...

    def after_step(self, loss: Loss) -> None:
        """Called after each optimizer step, for what follows the network (teachers, centres, histories).

        The loss is of the whole batch, joined over parts and processes, so that all processes keep the same state.
        """
        ...

    def denoiser(self, batch: Batch) -> Denoiser:
        """denoise(xt, t) -> x0_hat for the chips of this batch."""
        ...

    def features(self, batch: Batch, rho: float) -> list[Tensor]:
        """A pyramid of features (B, D, H / 2^i, W / 2^i), finest first, of chips at noise-to-signal ratio rho."""
        ...
