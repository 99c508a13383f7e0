"""The seam between pretext tasks and the training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from earthprior.chips.batch import Batch


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


class Task(nn.Module):
    """What a network is trained for: owns the network, its corruption, its target and where that counts.

    It knows no optimizer and no tracking. Its own state (teachers, centres, histories) is in its state_dict.
    """

    network: nn.Module

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """The loss of a batch; all randomness comes from the generator, so that the same call repeats exactly."""
        raise NotImplementedError

    def after_step(self, loss: Loss) -> None:
        """Called after each optimizer step, for what follows the network (teachers, centres, histories).

        The loss is of the whole batch, joined over parts and processes, so that all processes keep the same state.
        """

    def weights(self, lr: float) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
        """What is trained: the network's parameters, or groups of them with learning rates of their own.

        Args:
            lr: Of what has none of its own.
        """
        return self.network.parameters()

    def rests_on(self) -> str:
        """A digest of what was fitted before the training began and is needed to continue it; empty for nothing."""
        return ""
