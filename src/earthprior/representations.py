"""What a probe may know about a pixel: a frozen network's features, the pixel itself, or its neighbourhood.

Each representation is a function (batch, points) -> one tensor (N_i, D) per chip, on the CPU; points are (N_i, 2)
int64, row and column. Features are computed at the asked pixels alone: the full map of a chip would take gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from earthprior.chips.batch import Batch
from earthprior.chips.normalize import denormalize

Representation: TypeAlias = Callable[[Batch, Sequence[Tensor]], list[Tensor]]

CONTEXT_WINDOWS_PX = (5, 11, 21)


def raw_pixels(batch: Batch, points: Sequence[Tensor]) -> list[Tensor]:
    """The C physical values of each pixel."""
    physical = denormalize(batch.x0, batch.affine).cpu()
    return [chip[:, at[:, 0], at[:, 1]].T.contiguous() for chip, at in zip(physical, points, strict=True)]


def raw_context(batch: Batch, points: Sequence[Tensor]) -> list[Tensor]:
    """The pixel and, per band, mean and standard deviation of the valid pixels in 5, 11 and 21 px windows: 7 C values.

    This is what one gets for free, without any pretraining, and so the bar for frozen features.
    """
    physical = denormalize(batch.x0, batch.affine)
    weight = batch.valid.to(physical.dtype)
    count = weight.sum((2, 3), keepdim=True).clamp(min=1)
    centre = (physical * weight).sum((2, 3), keepdim=True) / count
    # Centred first: E[x^2] - E[x]^2 of reflectances near 10,000 would leave no digits.
    centred = (physical - centre) * weight
    maps = [physical]
    for window in CONTEXT_WINDOWS_PX:
        share = _box(weight, window).clamp(min=1e-6)
        mean = _box(centred, window) / share
        variance = (_box(centred**2, window) / share - mean**2).clamp(min=0)
        maps += [mean + centre, variance.sqrt()]
    stacked = torch.cat(maps, dim=1).cpu()
    return [chip[:, at[:, 0], at[:, 1]].T.contiguous() for chip, at in zip(stacked, points, strict=True)]


def _box(x: Tensor, window: int) -> Tensor:
    """Mean over a window, zeros outside the chip, same size."""
    return F.avg_pool2d(x, window, stride=1, padding=window // 2)


class FrozenFeatures:
    """A network's feature pyramid at single pixels, all levels concatenated, finest first.

    The network sees crops of the width that it was trained on, overlapping by a quarter, and each pixel is read from
    the crop whose centre is nearest: at a crop's rim a network knows half of the surroundings only.

    Args:
        features: batch -> pyramid [(B, D_i, h_i, w_i), ...].
        crop_px: Width of the crops.
        crops_at_once: Bounds the memory.
    """

    def __init__(self, features: Callable[[Batch], list[Tensor]], crop_px: int, crops_at_once: int) -> None:
        self._features = features
        self._crop_px = crop_px
        self._crops_at_once = crops_at_once

    @torch.no_grad()
    def __call__(self, batch: Batch, points: Sequence[Tensor]) -> list[Tensor]:
        """See the module: one tensor (N_i, D) per chip."""
        # Work items: which chip, the crop's corner, which of the chip's points it serves.
        items = [
            (chip, top, left, served)
            for chip, at in enumerate(points)
            for (top, left), served in assign(at, batch.x0.shape[-2:], self._crop_px).items()
        ]
        found: list[dict[int, Tensor]] = [{} for _ in points]
        for start in range(0, len(items), self._crops_at_once):
            part = items[start : start + self._crops_at_once]
            pyramid = self._features(self._cut(batch, [(chip, top, left) for chip, top, left, _ in part]))
            for place, (chip, top, left, served) in enumerate(part):
                inside = points[chip][served] - torch.tensor([top, left])
                values = at_pixels([level[place] for level in pyramid], inside, self._crop_px).cpu()
                found[chip] |= dict(zip(served.tolist(), values, strict=True))
        # A chip without points has no row, and so tells no width; nobody asks for it.
        return [
            torch.stack([rows[index] for index in range(len(at))]) if len(at) else torch.zeros(0, 0)
            for rows, at in zip(found, points, strict=True)
        ]

    def _cut(self, batch: Batch, corners: Sequence[tuple[int, int, int]]) -> Batch:
        px = self._crop_px
        chips = torch.tensor([chip for chip, _, _ in corners], device=batch.x0.device)
        return Batch(
            torch.stack([batch.x0[c, :, top : top + px, left : left + px] for c, top, left in corners]),
            torch.stack([batch.valid[c, :, top : top + px, left : left + px] for c, top, left in corners]),
            batch.affine[chips],
            {name: tensor[chips] for name, tensor in batch.extra.items()},
        )


def assign(points: Tensor, size: Sequence[int], px: int) -> dict[tuple[int, int], Tensor]:
    """Which crop serves which points: corner (top, left) -> indices of points.

    Args:
        points: (N, 2) rows and columns.
        size: (H, W) of the chip, px.
        px: Width of the crops, at most H and W.
    """
    corners = torch.stack(
        [_nearest_origin(points[:, axis], _origins(int(size[axis]), px), px) for axis in range(2)], dim=1
    )
    served: dict[tuple[int, int], list[int]] = {}
    for index, (top, left) in enumerate(corners.tolist()):
        served.setdefault((top, left), []).append(index)
    return {corner: torch.tensor(indices) for corner, indices in sorted(served.items())}


def _origins(size: int, px: int) -> Tensor:
    """First pixels of crops that overlap by at least a quarter and cover the size, evenly spread."""
    steps = -(-(size - px) // max(1, 3 * px // 4))
    return torch.linspace(0, size - px, steps + 1).round().long()


def _nearest_origin(positions: Tensor, origins: Tensor, px: int) -> Tensor:
    distance = (positions[:, None] + 0.5 - (origins[None] + px / 2)).abs()
    return origins[distance.argmin(dim=1)]


def at_pixels(pyramid: Sequence[Tensor], points: Tensor, px: int) -> Tensor:
    """A pyramid, bilinearly upsampled to px and concatenated, at some pixels only.

    Args:
        pyramid: Levels (D_i, h_i, w_i), whose pixels stand for 1, 2, 4, 8, ... px each way; of a level that does not
            divide px, the last row and column reach beyond it.
        points: (N, 2) rows and columns in [0, px).
        px: Width and height of the pixel grid.

    Returns:
        (N, sum of D_i) float32.
    """
    # grid_sample wants (x, y) in [-1, 1], with pixel centres at half steps.
    places = 2 * (points.flip(1).float() + 0.5)
    sampled = []
    for level in pyramid:
        reach = level.shape[-1] * 2 ** math.ceil(math.log2(px / level.shape[-1]))
        grid = (places / reach - 1)[None, None].to(level.device)
        values = F.grid_sample(level[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        sampled.append(values[0, :, 0])
    return torch.cat(sampled).T
