"""Random views of clean chips: drawn from the step's generator, applied to chip and valid mask together on the device.

Geometry first (zoom, rotation, flips, the view's place), then radiometry (contrast, brightness, gamma, noise). Both
draw the same random numbers whatever is switched on, so one option's draws are not changed by another (the noise of
`sigma_range` is drawn last; what the task draws afterwards is then other noise).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from earthprior.chips.batch import Batch
from earthprior.chips.geometry import random_view
from earthprior.chips.radiometry import random_radiometry
from earthprior.params import AugmentationParams


def augment(batch: Batch, params: AugmentationParams, crop_px: int | None, generator: torch.Generator) -> Batch:
    """One random view of every chip.

    Args:
        batch: Whole chips, x0 (B, C, H, W).
        params: The section `augmentation`.
        crop_px: Width and height of the view, px, or None for the chips' own.
        generator: Addressed to (seed, step), on the batch's device.

    Returns:
        Views (B, C, crop_px, crop_px), same device and dtype.
    """
    x0, valid = random_view(batch.x0, batch.valid, crop_px or batch.x0.shape[-1], params, generator)
    return replace(batch, x0=random_radiometry(x0, valid, params, generator), valid=valid)
