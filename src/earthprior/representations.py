"""What a probe may know about a pixel or a chip: a frozen network's features, or what is free without any training.

Of pixels, a representation is a function (batch, points) -> one tensor (N_i, D) per chip, on the CPU; points are
(N_i, 2) int64, row and column. Features are kept at the asked pixels alone: the full map of a chip would take
gigabytes. Of whole chips it is a function batch -> (B, D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from earthprior.chips.batch import Batch
from earthprior.chips.crops import grid_crops
from earthprior.chips.normalize import denormalize

Representation: TypeAlias = Callable[[Batch, Sequence[Tensor]], list[Tensor]]
ChipRepresentation: TypeAlias = Callable[[Batch], Tensor]

CONTEXT_WINDOWS_PX = (5, 11, 21)
PERCENTILES = (2.0, 25.0, 50.0, 75.0, 98.0)


def raw_pixels(batch: Batch, points: Sequence[Tensor]) -> list[Tensor]:
    """The C physical values of each pixel."""
    physical = denormalize(batch.x0, batch.affine).cpu()
    return [chip[:, at[:, 0], at[:, 1]].T.contiguous() for chip, at in zip(physical, points, strict=True)]


def raw_context(batch: Batch, points: Sequence[Tensor]) -> list[Tensor]:
    """`context_maps` at single pixels.

    This is what one gets for free, without any pretraining, and so the bar for frozen features.
    """
    maps = context_maps(denormalize(batch.x0, batch.affine), batch.valid).cpu()
    return [chip[:, at[:, 0], at[:, 1]].T.contiguous() for chip, at in zip(maps, points, strict=True)]


def context_maps(physical: Tensor, valid: Tensor) -> Tensor:
    """The pixel and, per band, mean and standard deviation of the valid pixels in 5, 11 and 21 px windows.

    Args:
        physical: (B, C, H, W) float, 0 where invalid.
        valid: (B, 1, H, W) bool.

    Returns:
        (B, 7 C, H, W).
    """
    weight = valid.to(physical.dtype)
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
    return torch.cat(maps, dim=1)


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
        # A chip without points has no row, and so tells no width; nobody asks for it.
        found = [torch.zeros(0, 0) for _ in points]
        for start in range(0, len(items), self._crops_at_once):
            part = items[start : start + self._crops_at_once]
            pyramid = self._features(self._cut(batch, [(chip, top, left) for chip, top, left, _ in part]))
            for place, (chip, top, left, served) in enumerate(part):
                inside = points[chip][served] - torch.tensor([top, left])
                values = at_pixels([level[place] for level in pyramid], inside, self._crop_px).cpu()
                if not found[chip].numel():
                    found[chip] = torch.zeros(len(points[chip]), values.shape[1])
                found[chip][served] = values
        return found

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


class PooledFeatures:
    """A network's features of whole chips: per level, the channels' means and standard deviations over valid pixels.

    The network sees crops of the width that it was trained on; of a large chip, some of a grid that covers it.

    Args:
        features: batch -> pyramid [(B, D_i, h_i, w_i), ...].
        crop_px: Width of the crops.
        crops_at_once: Bounds the memory.
        most_crops: Of each chip, evenly spread over its grid.
    """

    def __init__(
        self, features: Callable[[Batch], list[Tensor]], crop_px: int, crops_at_once: int, most_crops: int
    ) -> None:
        self._features = features
        self._crop_px = crop_px
        self._crops_at_once = crops_at_once
        self._most_crops = most_crops

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """(B, sum of 2 D_i): of the finest level first the means, then the deviations, and so on."""
        return torch.stack([self._pooled(batch[index : index + 1]) for index in range(len(batch))])

    def _pooled(self, chip: Batch) -> Tensor:
        crops = grid_crops(chip, self._crop_px)
        chosen = torch.linspace(0, len(crops) - 1, min(len(crops), self._most_crops)).round().long()
        crops = crops[chosen.to(crops.x0.device)]
        sums: list[Tensor] = []
        for start in range(0, len(crops), self._crops_at_once):
            part = crops[start : start + self._crops_at_once]
            found = [_sums(level, part.valid) for level in self._features(part)]
            sums = [one + other for one, other in zip(sums, found, strict=True)] if sums else found
        return torch.cat([_moments(total) for total in sums]).cpu()


def _sums(level: Tensor, valid: Tensor) -> Tensor:
    """(3, D) float64: weight, sum and sum of squares of a level (B, D, h, w), each pixel by its valid share."""
    height, width = level.shape[-2:]
    weight = F.adaptive_avg_pool2d(valid.float(), (height, width))
    weighted = weight * level.float()
    parts = (weight.sum().expand(level.shape[1]), weighted.sum((0, 2, 3)), (weighted * level).sum((0, 2, 3)))
    return torch.stack([part.double() for part in parts])


def _moments(sums: Tensor) -> Tensor:
    """(2 D,) float32: means, then standard deviations."""
    count = sums[0].clamp(min=1e-9)
    mean = sums[1] / count
    return torch.cat([mean, (sums[2] / count - mean**2).clamp(min=0).sqrt()]).float()


def image_statistics(batch: Batch) -> Tensor:
    """(B, 7 C): of each band's valid pixels the mean, the standard deviation and five percentiles, physical values.

    For whole chips this is what one gets for free; a chip without a valid pixel has zeros.
    """
    rows = []
    for chip, valid in zip(denormalize(batch.x0, batch.affine).cpu(), batch.valid[:, 0].cpu(), strict=True):
        pixels = chip[:, valid].double().numpy()
        if not pixels.shape[1]:
            rows.append(np.zeros(len(chip) * (2 + len(PERCENTILES))))
            continue
        rows.append(
            np.concatenate([pixels.mean(1), pixels.std(1), np.percentile(pixels, PERCENTILES, axis=1).flatten()])
        )
    return torch.from_numpy(np.stack(rows)).float()
