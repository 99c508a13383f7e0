"""The task of a finetuning: labels are the target, and nothing is random but the views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earthprior.chips.batch import LABEL, UNLABELLED, Batch
from earthprior.downstream.network import DownstreamNetwork
from earthprior.tasks.task import Loss, Task


class DownstreamTask(Task):
    """Cross-entropy of classes, per pixel or per chip; squared error of standardized numbers.

    Every chip counts the same: of a map, the mean over its labelled valid pixels.

    Args:
        network: Backbone and head.
        kind: segmentation, classification or regression.
        class_weights: Of each class; None for 1.
        scale: Mean and deviation of the numbers.
        lr_decay: Of each level's learning rate, see `DownstreamNetwork.groups`.
    """

    class_weights: Tensor
    scale: Tensor

    def __init__(
        self,
        network: DownstreamNetwork,
        kind: str,
        class_weights: Sequence[float] | None,
        scale: tuple[float, float],
        lr_decay: float,
    ) -> None:
        super().__init__()
        self.network = network
        self.kind, self._lr_decay = kind, lr_decay
        weights = torch.tensor(list(class_weights)) if class_weights else torch.ones(0)
        self.register_buffer("class_weights", weights, persistent=False)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """See `tasks.task.Task`."""
        output, label = self.network(batch.x0, batch.valid).float(), batch.extra[LABEL]
        counted = batch.counted()
        if self.kind == "regression":
            mean, std = self.scale
            per_chip = (output[:, 0] - (label - mean) / std).square()
        else:
            weights = self.class_weights if len(self.class_weights) else None
            errors = F.cross_entropy(output, label.long(), weights, ignore_index=UNLABELLED, reduction="none")
            per_chip = errors
            if self.kind == "segmentation":
                counts = batch.counts()
                per_chip = (errors * counts).sum((1, 2)) / counts.sum((1, 2)).clamp(min=1)
        total = (per_chip * counted).sum() / counted.sum().clamp(min=1)
        return Loss(total, per_chip.detach())

    def weights(self, lr: float) -> list[dict[str, Any]]:
        """See `tasks.task.Task`."""
        network = self.network
        assert isinstance(network, DownstreamNetwork)
        return network.groups(lr, self._lr_decay)
