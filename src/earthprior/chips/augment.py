"""Random views of clean chips: drawn from the step's generator, applied to chip and valid mask together on the device.

Geometry first (zoom, crop, flips, quarter turns), then radiometry. Quarter turns and flips are exact index operations;
a zoom is one bicubic resampling that also cuts the crop. After it a pixel counts as valid only where all pixels that
it was blended from are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from earthprior.chips.batch import Batch
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
    size = crop_px or batch.x0.shape[-1]
    if params.scale_factor is not None:
        x0, valid = _zoom_and_crop(batch, size, params.scale_factor, params.crop_strategy, generator)
    else:
        x0, valid = _crop(batch, size, params.crop_strategy, generator)
    x0, valid = _turn(x0, valid, params, generator)
    x0 = _radiometry(x0, valid, params, generator)
    return replace(batch, x0=x0, valid=valid)


def centre_crop(batch: Batch, px: int) -> Batch:
    """The middle (B, C, px, px) of every chip."""
    top = (batch.x0.shape[-2] - px) // 2
    left = (batch.x0.shape[-1] - px) // 2
    window = (..., slice(top, top + px), slice(left, left + px))
    return replace(batch, x0=batch.x0[window].contiguous(), valid=batch.valid[window].contiguous())


def grid_origins(size_px: int, px: int) -> list[int]:
    """First pixels of the fewest windows of `px` that cover `size_px`, evenly spread (overlapping where they must)."""
    count = -(-size_px // px)
    if count == 1:
        return [0]
    return [round(index * (size_px - px) / (count - 1)) for index in range(count)]


def grid_crops(batch: Batch, px: int) -> Batch:
    """Every chip cut into a grid of crops that covers it.

    Returns:
        (B * n * n, C, px, px): all crops of the first chip (row by row), then of the second, and so on.
    """
    rows, columns = grid_origins(batch.x0.shape[-2], px), grid_origins(batch.x0.shape[-1], px)
    windows = [(..., slice(top, top + px), slice(left, left + px)) for top in rows for left in columns]

    def cut(chips: Tensor) -> Tensor:
        return torch.stack([chips[window] for window in windows], dim=1).flatten(0, 1)

    repeat = torch.arange(len(batch), device=batch.x0.device).repeat_interleave(len(windows))
    extra = {name: tensor[repeat] for name, tensor in batch.extra.items()}
    return Batch(cut(batch.x0), cut(batch.valid), batch.affine[repeat], extra)


def _uniform(count: int, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """(count, 1, 1, 1) draws from U(bounds)."""
    draws = torch.rand(count, 1, 1, 1, generator=generator, device=generator.device)
    return bounds[0] + (bounds[1] - bounds[0]) * draws


def _offsets(count: int, room: tuple[int, int], strategy: str, generator: torch.Generator) -> Tensor:
    """(count, 2) top and left of each crop, integers in [0, room]."""
    draws = torch.rand(count, 2, generator=generator, device=generator.device)
    span = torch.tensor(room, device=draws.device)
    if strategy == "center":
        return (span // 2).expand(count, 2)
    # rand is below 1, but float32 rounding of rand * (room + 1) may reach room + 1.
    return torch.minimum((draws * (span + 1)).floor(), span).long()


def _crop(batch: Batch, size: int, strategy: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    height, width = batch.x0.shape[-2:]
    offsets = _offsets(len(batch), (height - size, width - size), strategy, generator).tolist()

    def cut(chips: Tensor) -> Tensor:
        pairs = zip(chips, offsets, strict=True)
        return torch.stack([chip[:, top : top + size, left : left + size] for chip, (top, left) in pairs])

    return cut(batch.x0), cut(batch.valid)


def _zoom_and_crop(
    batch: Batch, size: int, bounds: tuple[float, float], strategy: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Zoom by U(bounds) and cut `size` px, in one bicubic resampling; what lies outside the chip is invalid.

    Not bilinear, which blurs so much that a denoiser learns a softer world than it is judged on: a linear filter fitted
    on such views of real chips loses 0.1 to 0.3 dB (0.3 to 0.8 at rho 0.05), on bicubic ones a quarter of that.
    """
    height, width = batch.x0.shape[-2:]
    zoom = _uniform(len(batch), bounds, generator).flatten()
    # The view spans size / zoom source pixels; its centre is drawn so that it stays inside where it fits.
    span = size / zoom
    place = torch.rand(len(batch), 2, generator=generator, device=zoom.device) - 0.5
    if strategy == "center":
        place = torch.zeros_like(place)
    theta = torch.zeros(len(batch), 2, 3, device=zoom.device)
    theta[:, 0, 0] = span / width
    theta[:, 1, 1] = span / height
    theta[:, 0, 2] = 2 * place[:, 0] * (width - span).clamp(min=0) / width
    theta[:, 1, 2] = 2 * place[:, 1] * (height - span).clamp(min=0) / height
    grid = F.affine_grid(theta, [len(batch), 1, size, size], align_corners=False).to(batch.x0.dtype)
    x0 = F.grid_sample(batch.x0, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    # Bicubic weights reach one pixel further than the bilinear ones that the mask is sampled with.
    sound = _all_around(batch.valid).to(x0.dtype)
    inside = F.grid_sample(sound, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return x0, inside > 0.999


def _all_around(valid: Tensor) -> Tensor:
    """Where a pixel and its eight neighbours inside the chip are valid."""
    padded = F.pad(valid, (1, 1, 1, 1), value=True)
    rows = padded[..., :-2, :] & padded[..., 1:-1, :] & padded[..., 2:, :]
    return rows[..., :-2] & rows[..., 1:-1] & rows[..., 2:]


def _turn(x0: Tensor, valid: Tensor, params: AugmentationParams, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flips and quarter turns, each chip its own; groups of equal draws are turned at once."""
    draws = torch.randint(0, 8, (x0.shape[0],), generator=generator, device=generator.device)
    flips = (draws // 4) * int(params.flip)
    turns = (draws % 4) * int(params.rotate_90)
    if params.flip and not params.rotate_90:
        # Without turns both axes' flips are needed for the same group of mirror images.
        vertical = draws % 2 == 1
        x0 = torch.where(vertical[:, None, None, None], x0.flip(-2), x0)
        valid = torch.where(vertical[:, None, None, None], valid.flip(-2), valid)
    x0, valid = x0.clone(), valid.clone()
    for flip in range(2):
        for turn in range(4):
            chosen = ((flips == flip) & (turns == turn)).nonzero().flatten()
            if len(chosen) == 0 or (flip, turn) == (0, 0):
                continue
            x0[chosen] = _d4(x0[chosen], flip, turn)
            valid[chosen] = _d4(valid[chosen], flip, turn)
    return x0, valid


def _d4(chips: Tensor, flip: int, turn: int) -> Tensor:
    return torch.rot90(chips.flip(-1) if flip else chips, turn, (-2, -1))


def _radiometry(x0: Tensor, valid: Tensor, params: AugmentationParams, generator: torch.Generator) -> Tensor:
    """Contrast about the view's own mean (valid pixels, per band), then brightness; invalid pixels stay neutral."""
    changed = x0
    if params.contrast_range is not None:
        count = valid.sum((2, 3), keepdim=True).clamp(min=1)
        mean = torch.where(valid, x0, 0.0).sum((2, 3), keepdim=True) / count
        changed = mean + (changed - mean) * _uniform(x0.shape[0], params.contrast_range, generator)
    if params.br_range is not None:
        changed = changed + _uniform(x0.shape[0], params.br_range, generator)
    return torch.where(valid, changed, x0)
