"""The one record that travels from the chips to the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from earthprior.chips.loader import RawBatch
from earthprior.chips.normalize import Affine, Normalizing

LABEL = "label"
"""The name of the labels among a batch's extra tensors: (B, H, W) class numbers, or one (B,) for each chip."""

UNLABELLED = -1
"""In place of a pixel's class."""


@dataclass(frozen=True)
class Batch:
    """Normalized chips on the device.

    Attributes:
        x0: (B, C, H, W) float32, normalized; invalid pixels at the neutral value.
        valid: (B, 1, H, W) bool, true where there is data.
        affine: The map back to physical values.
        extra: Further tensors that a task asked for, by name, each with B entries; those of three dimensions are
            rasters (B, H, W), which share the chips' geometry.
    """

    x0: Tensor
    valid: Tensor
    affine: Affine
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, chips: slice | Tensor) -> Batch:
        """The batch of some of its chips."""
        extra = {name: tensor[chips] for name, tensor in self.extra.items()}
        return Batch(self.x0[chips], self.valid[chips], self.affine[chips], extra)

    def __len__(self) -> int:
        return self.x0.shape[0]

    def counts(self) -> Tensor:
        """Where there is something to learn from, (B, H, W) bool: valid pixels, if there are labels, labelled."""
        label = self.extra.get(LABEL)
        return self.valid[:, 0] if label is None or label.ndim != 3 else self.valid[:, 0] & (label != UNLABELLED)

    def counted(self) -> Tensor:
        """The chips that have such a pixel, (B,) bool: what a batch's mean loss is taken over."""
        return self.counts().flatten(1).any(1)


def prepare(raw: RawBatch, normalizer: Normalizing, device: torch.device) -> Batch:
    """Move a raw batch to the device in its files' dtype, and normalize it there.

    Args:
        raw: Pixels (B, C, H, W) in the files' dtype and valid (B, H, W) bool, on the CPU.
        normalizer: Of the run.
        device: Where the batch is wanted.
    """
    # Blocking on purpose: when this returns, the loader's buffer is free, and the next read may overwrite it.
    pixels = raw.pixels.to(device, copy=True)
    valid = raw.valid.to(device, copy=True)
    x0, affine = normalizer.normalize(pixels, valid)
    return Batch(x0, valid[:, None], affine, {name: tensor.to(device) for name, tensor in raw.extra.items()})
