"""From physical values to x0 and back, for a whole batch on the device.

Every procedure is affine per chip and band, x0 = (physical - offset) / scale, so the inverse is exact and stands
beside. Statistics ignore invalid pixels; after normalization those hold the neutral value, so what lay under nodata
cannot reach a loss, a statistic or a metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earthprior.params import NormalizationParams


@dataclass(frozen=True)
class Affine:
    """x0 = (physical - offset) / scale; both broadcast to (B, C, H, W), float32, scale > 0."""

    offset: Tensor
    scale: Tensor

    def __getitem__(self, chips: slice | Tensor) -> Affine:
        """The same for some chips of the batch."""
        return Affine(self.offset[chips], self.scale[chips])


def denormalize(x: Tensor, affine: Affine) -> Tensor:
    """Physical values (B, C, H, W) from normalized ones; the inverse of `Normalizer.normalize` on valid pixels."""
    return x * affine.scale + affine.offset


class Normalizer:
    """Turns raw chips into x0 as `normalization:` says.

    Args:
        params: The section `normalization`.
        stats: The content of stats.json; its global statistics serve gab and gpb, and the neutral value.

    Source: the procedures are the eofm-tutorial's; gab uses the statistics over all bands' pixels, where the
        tutorial's code averages the bands' minima, maxima and means.
    """

    def __init__(self, params: NormalizationParams, stats: Mapping[str, Any]) -> None:
        self._params = params
        self._per_band = [stats["per_band"][band] for band in stats["bands"]]
        self._all_bands = stats["all_bands"]

    def normalize(self, raw: Tensor, valid: Tensor) -> tuple[Tensor, Affine]:
        """Normalized chips and the map that undoes them.

        Args:
            raw: (B, C, H, W), any numeric dtype, physical values as in the files.
            valid: (B, H, W) bool, true where there is data.

        Returns:
            x0 (B, C, H, W) float32, invalid pixels at the neutral value (the band's mean after normalization for
            global procedures, the chip's own mean for local ones); and the affine map, tensors (B, C, 1, 1).
        """
        mask = valid[:, None]
        # On a CPU each pass over a batch costs as much as reading it, so whole chips are spared the masking; a GPU
        # would have to wait for the answer.
        masked = raw.device.type != "cpu" or not bool(valid.all())
        inside = mask if masked else None
        # uint16 lacks most operations in torch, so the cast comes first; NaN under nodata must not survive it.
        x0 = raw.to(torch.float32, copy=True)
        if masked:
            x0.masked_fill_(~mask, 0.0)
        offset, scale, mean = self._affine(x0, inside)
        shape = (raw.shape[0], raw.shape[1], 1, 1)
        affine = Affine(offset.expand(shape).contiguous(), scale.expand(shape).contiguous())
        x0.sub_(affine.offset).div_(affine.scale)
        if masked:
            x0 = torch.where(mask, x0, (mean - affine.offset) / affine.scale)
        return x0, affine

    def _affine(self, physical: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Offset, scale and mean, each broadcastable to the batch."""
        if not self._params.apply_normalization:
            return physical.new_zeros(1, 1, 1, 1), physical.new_ones(1, 1, 1, 1), self._global("mean", physical)
        local = self._params.stat_procedure in ("lab", "lpb")
        low, high, mean, std = self._local(physical, inside) if local else self._all_global(physical)
        if self._params.normal_strategy == "min_max":
            return low, _positive(high - low), mean
        return mean, _positive(std), mean

    def _global(self, name: str, like: Tensor) -> Tensor:
        if self._params.stat_procedure == "gab":
            return like.new_full((1, 1, 1, 1), float(self._all_bands[name]))
        return like.new_tensor([float(band[name]) for band in self._per_band]).reshape(1, -1, 1, 1)

    def _all_global(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low, high, mean, std = (self._global(name, like) for name in ("min", "max", "mean", "std"))
        return low, high, mean, std

    def _local(self, physical: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Min, max, mean, population std over valid pixels, per chip (lab) or per chip and band (lpb).

        `inside` is the valid mask, or None where all pixels are valid.
        """
        dims = (1, 2, 3) if self._params.stat_procedure == "lab" else (2, 3)
        if inside is None:
            low, high = physical.amin(dims, keepdim=True), physical.amax(dims, keepdim=True)
            std, mean = torch.std_mean(physical, dims, correction=0, keepdim=True)
            constant = low == high
            return low, high, torch.where(constant, low, mean), std.masked_fill(constant, 0)
        inside = inside.expand_as(physical)
        count = inside.sum(dims, keepdim=True)
        safe = count.clamp(min=1)
        low = torch.where(inside, physical, torch.inf).amin(dims, keepdim=True)
        high = torch.where(inside, physical, -torch.inf).amax(dims, keepdim=True)
        mean = physical.sum(dims, keepdim=True) / safe
        variance = torch.where(inside, (physical - mean) ** 2, 0.0).sum(dims, keepdim=True) / safe
        # A float32 mean of equal values is off in its last bits, which a spread of their size would blow up to 1.
        constant = low == high
        mean, std = torch.where(constant, low, mean), variance.sqrt().masked_fill(constant, 0)
        # A chip without a single valid pixel has no statistics; zeros keep it finite, its mask keeps it out.
        empty = count == 0
        return low.masked_fill(empty, 0), high.masked_fill(empty, 0), mean, std


def _positive(scale: Tensor) -> Tensor:
    """A constant chip has no spread; scale 1 maps it to exactly 0 and back."""
    return torch.where(scale > 0, scale, 1.0)
