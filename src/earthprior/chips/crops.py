"""Fixed crops of clean chips, for judging and fitting: the middle, or a grid that covers everything."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from earthprior.chips.batch import Batch
from earthprior.chips.geometry import is_raster


def centre_crop(batch: Batch, px: int) -> Batch:
    """The middle (B, C, px, px) of every chip."""
    top = (batch.x0.shape[-2] - px) // 2
    left = (batch.x0.shape[-1] - px) // 2
    window = (..., slice(top, top + px), slice(left, left + px))
    extra = {name: tensor[window] if is_raster(tensor) else tensor for name, tensor in batch.extra.items()}
    return replace(batch, x0=batch.x0[window].contiguous(), valid=batch.valid[window].contiguous(), extra=extra)


def grid_origins(size_px: int, px: int, overlap_px: int = 0) -> list[int]:
    """First pixels of the fewest windows of `px` that cover `size_px`, evenly spread.

    Neighbours overlap by at least `overlap_px` (below px), and by more where they must to end with the size.
    """
    count = -(-(size_px - overlap_px) // (px - overlap_px))
    if count <= 1:
        return [0]
    return [round(index * (size_px - px) / (count - 1)) for index in range(count)]


def grid_windows(batch: Batch, px: int) -> list[tuple[int, int]]:
    """The corners (top, left) of a chip's crops, in the order of `grid_crops`."""
    rows, columns = grid_origins(batch.x0.shape[-2], px), grid_origins(batch.x0.shape[-1], px)
    return [(top, left) for top in rows for left in columns]


def grid_crops(batch: Batch, px: int) -> Batch:
    """Every chip cut into a grid of crops that covers it.

    Returns:
        (B * n * n, C, px, px): all crops of the first chip (row by row), then of the second, and so on.
    """
    windows = [(..., slice(top, top + px), slice(left, left + px)) for top, left in grid_windows(batch, px)]

    def cut(chips: Tensor) -> Tensor:
        return torch.stack([chips[window] for window in windows], dim=1).flatten(0, 1)

    repeat = torch.arange(len(batch), device=batch.x0.device).repeat_interleave(len(windows))
    extra = {name: cut(tensor) if is_raster(tensor) else tensor[repeat] for name, tensor in batch.extra.items()}
    return Batch(cut(batch.x0), cut(batch.valid), batch.affine[repeat], extra)
