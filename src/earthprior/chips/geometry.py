"""Where a random view looks: zoom, rotation, flips and place, composed into one sampling of chip and mask.

A view is a square of pixels. Its pixel at o (x to the right, y down, from the view's middle) shows the chip at
c + R F o / zoom: c is where the view's middle lies, F mirrors, R turns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from earthprior.params import AugmentationParams


def is_raster(tensor: Tensor) -> bool:
    """Whether one of a batch's extra tensors is of a value per pixel (B, H, W)."""
    return tensor.ndim == 3


def random_view(
    x0: Tensor,
    valid: Tensor,
    size: int,
    params: AugmentationParams,
    generator: torch.Generator,
    rasters: Mapping[str, Tensor] | None = None,
    outside: int = 0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One random square of every chip; what lies outside the chip is its mirror image, and invalid.

    Flips and quarter turns alone move pixels and change none; otherwise all is one bicubic resampling, after which a
    pixel is valid only where all pixels that it was blended from are.

    Args:
        x0: Chips (B, C, H, W).
        valid: Masks (B, 1, H, W), bool.
        size: Width and height of the view, px.
        params: The section `augmentation`.
        generator: On the chips' device.
        rasters: Further maps of the chips (B, 1, H, W), of values that cannot be blended, such as classes: of each
            pixel of a view, the nearest one.
        outside: What the rasters hold outside the chip.

    Returns:
        Views (B, C, size, size), their masks, and their rasters.
    """
    matrix, centre = _placement(x0.shape, size, params, generator)
    offsets = torch.arange(size, device=x0.device) - (size - 1) / 2
    turns = params.rotation_degree or ()
    askew = isinstance(turns, dict) or any(angle % 90 for angle in turns)
    sample = _resampled if askew or params.scale_factor is not None else _moved
    return sample(x0, valid, rasters or {}, outside, offsets, matrix, centre)


def _placement(
    shape: torch.Size, size: int, params: AugmentationParams, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """R F / zoom (B, 2, 2) and c (B, 2), x before y, px, 0 in the middle of the chip's first pixel.

    The view stays inside the chip where it fits, and lies in its middle where it does not; `patch_shift_px` then moves
    it by whole pixels of the chip.
    """
    draws = torch.rand(8, shape[0], generator=generator, device=generator.device)
    zoom, turn, mirrors, places, shifts = draws[0], draws[1], draws[2:4], draws[4:6], draws[6:8]
    low, high = params.scale_factor or (1.0, 1.0)
    angle = torch.deg2rad(_degrees(turn, params))
    scale = 1 / (low + (high - low) * zoom)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # Counter-clockwise, as torch.rot90 turns, with y down.
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    matrix = rotation * (1 - 2 * ((mirrors < 0.5) & params.flip).int()).T[:, None]

    sides = draws.new_tensor([shape[-1], shape[-2]])[:, None]
    # Places are whole pixels apart, so that what is neither zoomed nor askew hits the pixels. The thousandth forgives
    # the rounding of the sine.
    room = (sides - size * (cos.abs() + sin.abs()) + 1e-3).floor().clamp(min=0)
    place = _whole(places, room) if params.crop_strategy == "random" else (room / 2).floor()
    reach = params.patch_shift_px or 0
    shift = _whole(shifts, 2 * reach) - reach
    return matrix, ((sides - 1 - room) / 2 + place + shift).T


def _degrees(draw: Tensor, params: AugmentationParams) -> Tensor:
    turns = params.rotation_degree or (0.0,)
    if isinstance(turns, dict):
        return turns["low"] + (turns["high"] - turns["low"]) * draw
    return draw.new_tensor(turns)[_whole(draw, len(turns) - 1).long()]


def _whole(draw: Tensor, top: Tensor | int) -> Tensor:
    """From draws in [0, 1), whole numbers in [0, top], all equally likely."""
    # A draw is below 1, but float32 rounding of draw * (top + 1) may reach top + 1.
    return (draw * (top + 1)).floor().clamp(max=top)


def _moved(
    x0: Tensor,
    valid: Tensor,
    rasters: Mapping[str, Tensor],
    fill: int,
    offsets: Tensor,
    matrix: Tensor,
    centre: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Views of chips that are turned by quarters at most: the pixels as they are, in any dtype."""
    height, width = x0.shape[-2:]
    sides = torch.tensor([[width], [height]], device=x0.device)
    # One entry of each row of the matrix is 0: x changes along the view's columns, or, turned, along its rows.
    lines = (centre[:, :, None] + matrix.sum(2, keepdim=True) * offsets).round().long()
    inside = (lines >= 0) & (lines < sides)
    # Mirrored with the edge's pixel repeated, as grid_sample's reflection does.
    lines = lines % (2 * sides)
    lines = torch.minimum(lines, 2 * sides - 1 - lines)
    turned = (matrix[:, 0, 0].abs() < 0.5)[:, None, None]

    def crossed(columns: Tensor, rows: Tensor) -> Tensor:
        straight = columns[:, None, :] + rows[:, :, None]
        return torch.where(turned, straight.mT, straight).flatten(1)[:, None]

    place = crossed(lines[:, 0], lines[:, 1] * width)
    outside = crossed(~inside[:, 0], ~inside[:, 1])

    def picked(chips: Tensor) -> Tensor:
        return chips.flatten(2).gather(2, place.expand(-1, chips.shape[1], -1))

    form = (len(x0), -1, len(offsets), len(offsets))
    seen = {name: picked(raster).masked_fill(outside, fill).view(form) for name, raster in rasters.items()}
    return picked(x0).view(form), (picked(valid) & ~outside).view(form), seen


def _resampled(
    x0: Tensor,
    valid: Tensor,
    rasters: Mapping[str, Tensor],
    fill: int,
    offsets: Tensor,
    matrix: Tensor,
    centre: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Views of chips that are zoomed or turned askew: blended.

    Bicubic, not bilinear, which blurs so much that a denoiser learns a softer world than it is judged on: a linear
    filter fitted on such zooms of real chips loses 0.1 to 0.3 dB (0.3 to 0.8 at rho 0.05), on bicubic ones a quarter
    of that.
    """
    # Not affine_grid, whose matrix product a GPU may round to a tenth of a pixel.
    columns, rows = matrix[:, :, 0, None, None] * offsets, matrix[:, :, 1, None, None] * offsets[:, None]
    sides = offsets.new_tensor([x0.shape[-1], x0.shape[-2]])
    grid = (2 * (centre[:, :, None, None] + columns + rows).permute(0, 2, 3, 1) + 1) / sides - 1
    views = F.grid_sample(x0, grid.to(x0.dtype), mode="bicubic", padding_mode="reflection", align_corners=False)
    # Bicubic weights reach one pixel further than the bilinear ones that the mask is sampled with.
    sound = _all_around(valid).to(x0.dtype)
    inside = F.grid_sample(sound, grid.to(x0.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)

    def nearest(raster: Tensor) -> Tensor:
        # Sampled less `fill`, so that the zeros outside become it. Small whole numbers, which float32 holds exactly.
        shifted = (raster - fill).to(torch.float32)
        near = F.grid_sample(shifted, grid.float(), mode="nearest", padding_mode="zeros", align_corners=False)
        return (near + fill).to(raster.dtype)

    return views, inside > 0.999, {name: nearest(raster) for name, raster in rasters.items()}


def _all_around(valid: Tensor) -> Tensor:
    """Where a pixel and its eight neighbours inside the chip are valid."""
    padded = F.pad(valid, (1, 1, 1, 1), value=True)
    rows = padded[..., :-2, :] & padded[..., 1:-1, :] & padded[..., 2:, :]
    return rows[..., :-2] & rows[..., 1:-1] & rows[..., 2:]
