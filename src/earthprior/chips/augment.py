"""Random views of clean chips: drawn from the step's generator, applied to chip, valid mask and label together.

Geometry first (zoom, rotation, flips, the view's place), then radiometry (contrast, brightness, gamma, noise). Both
draw the same random numbers whatever is switched on, so one option's draws are not changed by another (the noise of
`sigma_range` is drawn last; what the task draws afterwards is then other noise).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from earthprior.chips.batch import UNLABELLED, Batch
from earthprior.chips.geometry import is_raster, random_view
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
    rasters = {name: tensor[:, None] for name, tensor in batch.extra.items() if is_raster(tensor)}
    size = crop_px or batch.x0.shape[-1]
    x0, valid, seen = random_view(batch.x0, batch.valid, size, params, generator, rasters, UNLABELLED)
    extra = {**batch.extra, **{name: raster[:, 0] for name, raster in seen.items()}}
    return replace(batch, x0=random_radiometry(x0, valid, params, generator), valid=valid, extra=extra)
