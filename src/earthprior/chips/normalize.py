"""From physical values to x0 and back, for a whole batch on the device.

Every procedure is affine per chip and band, x0 = (physical - offset) / scale, so the inverse is exact and stands
beside; what `clip_percent` or `clip_val` cut off comes back as the limit. Statistics ignore invalid pixels; after
normalization those hold the neutral value, so what lay under nodata cannot reach a loss, a statistic or a metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from earthprior.errors import EarthPriorError

if TYPE_CHECKING:
    from earthprior.params import NormalizationParams

MOMENTS = ("min", "max", "mean", "std")


@dataclass(frozen=True)
class Affine:
    """x0 = (physical - offset) / scale; both broadcast to (B, C, H, W), float32, scale > 0."""

    offset: Tensor
    scale: Tensor

    def __getitem__(self, chips: slice | Tensor) -> Affine:
        """The same for some chips of the batch."""
        return Affine(self.offset[chips], self.scale[chips])


def denormalize(x: Tensor, affine: Affine) -> Tensor:
    """Physical values (B, C, H, W) from normalized ones: the inverse of `Normalizer.normalize` on valid pixels.

    A generated chip has no map of its own where the procedure is local; it takes that of a real chip.
    """
    return x * affine.scale + affine.offset


class Normalizing(Protocol):
    """What turns raw chips into x0: a run's own `Normalizer`, or what a backbone brought along."""

    def normalize(self, raw: Tensor, valid: Tensor) -> tuple[Tensor, Affine]:
        """See `Normalizer.normalize`."""
        ...


class Normalizer:
    """Turns raw chips into x0 as `normalization:` says.

    With `clip_percent` p, raw values are first cut to their percentiles p and 100 - p (of the training pixels for gab
    and gpb, of the chip's own for lab and lpb); limits and moments are those of the cut values, so that min_max spans
    exactly [0, 1]. With `clip_val`, x0 is cut to [-clip_val, clip_val] at the end.

    Args:
        params: The section `normalization`, or any record with its keys.
        stats: The content of stats.json; its global statistics serve gab and gpb, and the neutral value.

    Attributes:
        range: (low, high), which no valid pixel of x0 leaves, whatever the chip; None where there is no such bound, as
            for z_value, or for global min_max without clipping, whose limits know the training chips only.

    Raises:
        EarthPriorError: `clip_percent` needs limits that stats.json lacks.

    Source: the procedures are the eofm-tutorial's; gab uses the statistics over all bands' pixels, where the
        tutorial's code averages the bands' minima, maxima and means.
    """

    def __init__(self, params: NormalizationParams, stats: Mapping[str, Any]) -> None:
        self._local = params.apply_normalization and params.stat_procedure in ("lab", "lpb")
        self._clip_percent = params.clip_percent if params.apply_normalization else 0.0
        self._clip_val = params.clip_val if params.apply_normalization else None
        self._params = params
        self._global = None if self._local else _global_statistics(params, self._clip_percent, stats)
        self.range = self._range()

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
        if self._clip_percent:
            x0.clamp_(*self._cuts(x0, inside))
        if masked:
            x0.masked_fill_(~mask, 0.0)
        offset, scale, mean = self._affine(x0, inside)
        shape = (raw.shape[0], raw.shape[1], 1, 1)
        affine = Affine(offset.expand(shape).contiguous(), scale.expand(shape).contiguous())
        x0.sub_(affine.offset).div_(affine.scale)
        if self._clip_val is not None:
            x0.clamp_(-self._clip_val, self._clip_val)
        if masked:
            neutral = (mean - affine.offset) / affine.scale
            x0 = torch.where(mask, x0, neutral if self.range is None else neutral.clamp(*self.range))
        return x0, affine

    def _range(self) -> tuple[float, float] | None:
        limited = self._local or self._clip_percent > 0
        unit = self._params.apply_normalization and self._params.normal_strategy == "min_max" and limited
        if self._clip_val is None:
            return (0.0, 1.0) if unit else None
        return (0.0, min(1.0, self._clip_val)) if unit else (-self._clip_val, self._clip_val)

    def _affine(self, physical: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Offset, scale and mean, each broadcastable to the batch."""
        low, high, mean, std = self._statistics(physical, inside)
        if not self._params.apply_normalization:
            return torch.zeros_like(mean), torch.ones_like(mean), mean
        if self._params.normal_strategy == "min_max":
            return low, _positive(high - low), mean
        return mean, _positive(std), mean

    def _statistics(self, physical: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Min, max, mean and std of what is left after `clip_percent`."""
        if self._global is None:
            return _local_statistics(physical, inside, self._dims)
        low, high, mean, std = self._global.to(physical.device)
        return low, high, mean, std

    def _cuts(self, physical: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor]:
        """What raw values are cut to, each broadcastable to the batch."""
        if self._global is None:
            return _percentiles(physical, inside, self._dims, self._clip_percent)
        low, high, _, _ = self._global.to(physical.device)
        return low, high

    @property
    def _dims(self) -> tuple[int, ...]:
        """What local statistics are taken over."""
        return (1, 2, 3) if self._params.stat_procedure == "lab" else (2, 3)


def kept_statistics(stats: Mapping[str, Any]) -> dict[str, Any]:
    """What a Normalizer reads of stats.json, to be kept beside weights.

    Args:
        stats: The content of stats.json.
    """

    def kept(band: Mapping[str, Any]) -> dict[str, Any]:
        cuts = {key: {name: cut[name] for name in MOMENTS} for key, cut in band.get("clipped", {}).items()}
        return {**{name: band[name] for name in MOMENTS}, "clipped": cuts}

    return {
        "bands": list(stats["bands"]),
        "per_band": {name: kept(stats["per_band"][name]) for name in stats["bands"]},
        "all_bands": kept(stats["all_bands"]),
    }


def _global_statistics(params: NormalizationParams, clip_percent: float, stats: Mapping[str, Any]) -> Tensor:
    """Min, max, mean and std of the training pixels, (4, 1, 1 or C, 1, 1)."""
    bands = [stats["all_bands"]] if params.stat_procedure == "gab" else [stats["per_band"][b] for b in stats["bands"]]
    if clip_percent:
        key = f"{clip_percent:g}"
        if any(key not in band.get("clipped", {}) for band in bands):
            raise EarthPriorError(
                f"results/stats/stats.json has no limits for normalization.clip_percent {key}: it was made by an "
                "earlier version; run: dvc repro stats"
            )
        bands = [band["clipped"][key] for band in bands]
    rows = [[float(band[name]) for band in bands] for name in MOMENTS]
    return torch.tensor(rows).reshape(4, 1, -1, 1, 1)


def _local_statistics(
    physical: Tensor, inside: Tensor | None, dims: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Min, max, mean, population std over the valid pixels of `dims`, which are kept with size 1.

    `inside` is the valid mask, or None where all pixels are valid.
    """
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


def _percentiles(
    physical: Tensor, inside: Tensor | None, dims: tuple[int, ...], percent: float
) -> tuple[Tensor, Tensor]:
    """The percentiles `percent` and 100 - `percent` of the valid pixels of `dims`, which are kept with size 1.

    As `numpy.percentile` (linear). Only the tails are sorted, a fourth of the work, and no limit on their length holds
    as in torch.quantile.
    """
    rows = physical.flatten(dims[0])
    size = rows.shape[-1]
    if inside is None:
        count = torch.full(rows.shape[:-1], size, device=rows.device)
    else:
        inside = inside.expand_as(physical).flatten(dims[0])
        count = inside.sum(-1)
    # float32 cannot tell the ranks of large chips apart.
    rank = (count - 1).clamp(min=0).double()[..., None] * (percent / 100)
    longest = math.ceil((size - 1) * (percent / 100)) + 1

    def tail(largest: bool) -> Tensor:
        ends = rows if inside is None else torch.where(inside, rows, -torch.inf if largest else torch.inf)
        tails = ends.topk(longest, largest=largest).values
        outer, inner = (tails.gather(-1, place.long()).double() for place in (rank.floor(), rank.ceil()))
        limit = (outer + (inner - outer) * (rank - rank.floor())).to(physical.dtype)
        # A chip without a valid pixel has no percentiles; zeros keep it finite.
        limit = torch.where(count[..., None] > 0, limit, 0.0)
        return limit.reshape([1 if place in dims else length for place, length in enumerate(physical.shape)])

    return tail(largest=False), tail(largest=True)


def _positive(scale: Tensor) -> Tensor:
    """A constant chip has no spread; scale 1 maps it to exactly 0 and back."""
    return torch.where(scale > 0, scale, 1.0)
