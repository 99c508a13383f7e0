"""A backbone for other bands than it was pretrained on, by rules that are told."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from earthprior.backbone import Backbone
from earthprior.chips.normalize import kept_statistics
from earthprior.errors import EarthPriorError
from earthprior.networks import NETWORKS

logger = logging.getLogger(__name__)


def adapted(backbone: Backbone, bands: Sequence[str], statistics: Mapping[str, Any] | None = None) -> Backbone:
    """The backbone for these bands, in this order; itself where they are its own.

    Bands are matched by name, without case. Of the first convolution, a known band keeps its slice, another one gets
    the mean of all pretrained bands' slices, and where the counts differ all are multiplied by C_old / C_new, so that
    activations keep their scale. The linear filter of the preconditions is that of the known bands, exactly; other
    bands are taken to be unrelated to them, of the mean of their spectra. What was done is in `adapted`, and logged.

    Args:
        backbone: Pretrained.
        bands: Names, at least one of them known.
        statistics: Per band {"min", "max", "mean", "std"} in physical units ("clipped" too under clip_percent), or a
            stats.json's content; those of known bands replace the pretraining's.

    Raises:
        EarthPriorError: No band is known, one is named twice, or one that needs statistics has none.
    """
    names = [bands] if isinstance(bands, str) else [str(name) for name in bands]
    if tuple(names) == backbone.bands and not statistics:
        return backbone
    known = {name.casefold(): place for place, name in enumerate(backbone.bands)}
    places = [known.get(name.casefold()) for name in names]
    if len({name.casefold() for name in names}) != len(names) or not names:
        raise EarthPriorError(f"bands {names}: give each band once, and at least one")
    if all(place is None for place in places):
        raise EarthPriorError(
            f"none of the bands {', '.join(names)} is one of the backbone's ({', '.join(backbone.bands)}), so nothing "
            "of its first convolution could be kept; call what is alike by the same name"
        )
    description, tensors = dict(backbone.description), backbone.tensors()
    given = _by_band(statistics or {})
    normalization = dict(description["normalization"])
    normalization["statistics"] = _statistics(normalization, backbone.bands, names, places, given)
    description |= {
        "bands": names,
        "normalization": normalization,
    }
    told = _told(backbone.bands, names, places, given, normalization, backbone.linear is not None)
    description["adapted"] = [*backbone.adapted, *told]
    stem = f"network.{NETWORKS[description['network']['name']].STEM}"
    tensors[stem] = _stem(tensors[stem], len(backbone.bands), places)
    if backbone.linear is not None:
        tensors |= _linear(tensors, places, _means(normalization, names))
    for sentence in told:
        logger.warning("backbone: %s", sentence)
    return Backbone(description, tensors)


def _by_band(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """The statistics by band, names without case."""
    if "per_band" in statistics:
        statistics = kept_statistics(statistics)["per_band"]
    return {str(name).casefold(): entry for name, entry in statistics.items()}


def _statistics(
    normalization: Mapping[str, Any],
    old: Sequence[str],
    names: Sequence[str],
    places: Sequence[int | None],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """What the Normalizer uses, for the new bands."""
    kept = normalization["statistics"]
    per_band = {}
    for name, place in zip(names, places, strict=True):
        entry = given.get(name.casefold()) or (None if place is None else kept["per_band"][old[place]])
        if entry is None and normalization["stat_procedure"] == "gpb":
            raise EarthPriorError(
                f"band {name} was not among those of the pretraining ({', '.join(old)}), so how to normalize it must "
                f'be given: statistics={{"{name}": {{"min": ..., "max": ..., "mean": ..., "std": ...}}}}, in physical '
                "units, or the content of a stats.json"
            )
        # Other procedures take the chip's own statistics, or those of all bands together.
        entry = entry or kept["all_bands"]
        if wrong := _wrong(entry):
            raise EarthPriorError(f"statistics of band {name}: {wrong}")
        percent = f"{normalization['clip_percent']:g}"
        if normalization["stat_procedure"] == "gpb" and percent != "0" and percent not in entry.get("clipped", {}):
            raise EarthPriorError(
                f"statistics of band {name}: clipped.{percent} is missing, the moments of the values cut to their "
                f"percentiles {percent} and {100 - float(percent):g}, which this backbone's normalization uses"
            )
        per_band[name] = dict(entry)
    return {"bands": list(names), "per_band": per_band, "all_bands": kept["all_bands"]}


def _wrong(entry: Any) -> str | None:
    """Why these are no statistics of a band; None where they are."""
    if not isinstance(entry, Mapping):
        return 'give {"min": ..., "max": ..., "mean": ..., "std": ...}'
    for key in ("min", "max", "mean", "std"):
        if not isinstance(entry.get(key), int | float) or not math.isfinite(entry[key]):
            return f"{key} is missing, or no number"
    return "std is negative, or min above max" if entry["std"] < 0 or entry["min"] > entry["max"] else None


def _told(
    old: Sequence[str],
    names: Sequence[str],
    places: Sequence[int | None],
    given: Mapping[str, Any],
    normalization: Mapping[str, Any],
    filtered: bool,
) -> list[str]:
    """What was done, a sentence each."""
    new = [name for name, place in zip(names, places, strict=True) if place is None]
    kept = [name for name, place in zip(names, places, strict=True) if place is not None]
    left = [name for name in old if name.casefold() not in {other.casefold() for other in names}]
    told = [f"kept the slices of the first convolution for {', '.join(kept)}"]
    if new:
        told.append(f"gave {', '.join(new)} the mean of the slices of {', '.join(old)}")
        if filtered:
            told.append(f"took {', '.join(new)} as unrelated to all other bands in the linear filter")
    if left:
        told.append(f"left out {', '.join(left)}")
    if len(names) != len(old):
        told.append(f"multiplied the first convolution's weights by {len(old)} / {len(names)}")
    replaced = [name for name in kept if name.casefold() in given]
    if replaced and normalization["stat_procedure"] == "gpb":
        told.append(f"normalizes {', '.join(replaced)} by the statistics given, not by the pretraining's")
    return told


def _stem(weight: Tensor, old: int, places: Sequence[int | None]) -> Tensor:
    """The first convolution's weights (D, groups C_new, k, k); with a Wiener estimate there are two groups of bands."""
    groups = weight.reshape(weight.shape[0], -1, old, *weight.shape[2:])
    slices = [groups.mean(2) if place is None else groups[:, :, place] for place in places]
    return (torch.stack(slices, 2) * (old / len(places))).flatten(1, 2).contiguous()


def _linear(tensors: Mapping[str, Tensor], places: Sequence[int | None], means: Sequence[float]) -> dict[str, Tensor]:
    """The linear filter's tensors for the new bands."""
    vectors = torch.view_as_complex(tensors["linear.eigenvectors"]).to(torch.complex128)
    matrices = (vectors * tensors["linear.eigenvalues"].double()[..., None, :]) @ vectors.mH
    count = len(places)
    chosen = matrices.new_zeros((*matrices.shape[:2], count, count))
    of_all = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
    for row, one in enumerate(places):
        for column, other in enumerate(places):
            if one is not None and other is not None:
                chosen[..., row, column] = matrices[..., one, other]
            elif row == column:
                chosen[..., row, column] = of_all
    values, columns = torch.linalg.eigh(chosen)
    floor = float(tensors["linear.eigenvalues"].min())
    old_mean = tensors["linear.mean"]
    mean = [means[row] if place is None else float(old_mean[place]) for row, place in enumerate(places)]
    return {
        "linear.mean": torch.tensor(mean),
        "linear.eigenvalues": values.clamp(min=floor).float(),
        "linear.eigenvectors": torch.view_as_real(columns.to(torch.complex64)).contiguous(),
    }


def _means(normalization: Mapping[str, Any], names: Sequence[str]) -> list[float]:
    """Of x0 per band, as the statistics say."""
    if not normalization["apply_normalization"]:
        return [float(normalization["statistics"]["per_band"][name]["mean"]) for name in names]
    if normalization["normal_strategy"] == "z_value":
        return [0.0] * len(names)
    means = []
    for name in names:
        entry = normalization["statistics"]["per_band"][name]
        spread = entry["max"] - entry["min"]
        means.append((entry["mean"] - entry["min"]) / spread if spread > 0 else 0.0)
    return means
