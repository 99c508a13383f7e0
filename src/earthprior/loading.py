"""`earthprior.load_backbone`: a pretrained backbone from wherever it lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from earthprior import backbone, build, handover
from earthprior.backbone import FORMAT, NORMALIZATION, Backbone
from earthprior.chips.normalize import kept_statistics
from earthprior.diffusion.gain import nearest_timestep
from earthprior.diffusion.linear import LinearDenoiser
from earthprior.errors import DataError, EarthPriorError
from earthprior.files import read_json
from earthprior.params import Params, parse

RESULTS = "results/pretrain"


def load_backbone(path_or_run: str | Path) -> Backbone:
    """A pretrained backbone: features, normalization, band names, and the noise level that serves features best.

    Args:
        path_or_run: A results folder (`results/pretrain`), a project's root, or a folder that `earthprior export`
            wrote, or its .safetensors file.

    Raises:
        EarthPriorError: Nothing is found there, or files are damaged or do not belong together.
    """
    path = Path(path_or_run)
    if path.suffix == ".safetensors" and path.is_file() and path.name != "network.safetensors":
        return backbone.read(path)
    folder = path.parent if path.is_file() else path
    if (folder / backbone.WEIGHTS).is_file():
        return backbone.read(folder)
    for place in (folder, folder / RESULTS):
        if (place / "network.safetensors").is_file():
            return _of_results(place)
    raise EarthPriorError(
        f"{path_or_run} holds no pretrained backbone: neither network.safetensors, nor {RESULTS}/, nor "
        f"{backbone.WEIGHTS}; run: dvc repro pretrain"
    )


def _of_results(folder: Path) -> Backbone:
    """From the outs of a finished pretraining."""
    try:
        config = handover.read_config(folder / "config.json")
        linear = LinearDenoiser.load(folder / "linear.safetensors")
        weights = load_file(folder / "network.safetensors")
    except (SafetensorError, OSError, DataError) as error:
        raise EarthPriorError(
            f"{folder.name}/ is incomplete or damaged ({error}); run: dvc repro -f pretrain"
        ) from None
    params = parse(config["params"], "config.json")
    statistics = config.get("statistics") or _statistics_beside(folder)
    serving = _serving(folder.parent / "evaluate/serving.json", config["fingerprint"])
    return assemble(params, linear, weights, statistics, serving, {"fingerprint": config["fingerprint"]})


def assemble(
    params: Params,
    linear: LinearDenoiser,
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, Any],
    serving: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
) -> Backbone:
    """A backbone from the parts of a training.

    Args:
        params: That it was trained with.
        linear: The linear filter of the training.
        weights: Of the network.
        statistics: Those of stats.json that normalization uses, see `normalize.kept_statistics`.
        serving: What evaluate found to serve features best; without it `evaluate.probe_rho` and the decoder.
        facts: Further entries of the description.

    Raises:
        EarthPriorError: The parts do not belong together.
    """
    if (linear.bands, linear.height, linear.width) != (len(params.data.bands), *[params.data.train_px] * 2):
        raise EarthPriorError(
            f"the linear filter is for {linear.bands} bands of {linear.height} x {linear.width} px, the params for "
            f"{len(params.data.bands)} bands of {params.data.train_px} px; they are not of one training"
        )
    schedule = build.schedule(params)
    if serving is None:
        t = nearest_timestep(schedule, params.evaluate.probe_rho, float(linear.std))
        rho = math.exp(-0.5 * float(schedule.log_snr[t])) / float(linear.std)
        serving = {"t": t, "rho": rho, "side": "decoder"}
    needs_filter = params.diffusion.precondition != "none"
    normalization = params.normalization.model_dump(mode="json") | {"statistics": dict(statistics)}
    description = {
        "format": FORMAT,
        "network": {"name": params.network, "options": getattr(params, params.network).model_dump(mode="json")},
        "bands": list(params.data.bands),
        "crop_px": params.data.train_px,
        "precondition": params.diffusion.precondition,
        "linear_width": linear.width if needs_filter else None,
        "normalization": {name: normalization[name] for name in NORMALIZATION},
        "serving": dict(serving),
        "adapted": [],
        **facts,
    }
    tensors = {f"network.{name}": tensor for name, tensor in weights.items()}
    tensors |= {"alpha": schedule.alpha, "sigma": schedule.sigma}
    if needs_filter:
        tensors |= {f"linear.{name}": tensor for name, tensor in linear.parts().items()}
    return Backbone(description, tensors)


def _statistics_beside(folder: Path) -> dict[str, Any]:
    """For results that were made before config.json kept them."""
    path = folder.parent / "stats/stats.json"
    if not path.is_file():
        raise EarthPriorError(
            f"{folder.name}/config.json has no statistics to normalize with (it was made by an earlier version), and "
            f"{path} is missing; put it there, or run: dvc repro pretrain"
        )
    return kept_statistics(handover.read_stats(path))


def _serving(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What evaluate found to serve features of these weights best; None where it was not asked."""
    try:
        found = read_json(path)
        known = found["fingerprint"] == fingerprint
        return {**found, "t": int(found["t"]), "rho": float(found["rho"])} if known else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
