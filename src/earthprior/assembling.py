"""Backbones out of what trainings leave: finished results, or the checkpoints of one that goes on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from earthprior import build, handover, made_of
from earthprior.backbone import FORMAT, NORMALIZATION, Backbone
from earthprior.chips.normalize import kept_statistics
from earthprior.diffusion.gain import nearest_timestep
from earthprior.diffusion.linear import LinearDenoiser
from earthprior.errors import DataError, EarthPriorError
from earthprior.files import read_json, sha256_file
from earthprior.params import Params, parse, read_mapping
from earthprior.params.reading import put

FILES = ("config.json", "linear.safetensors", "network.safetensors")


def of_results(folder: Path, stats: Path, serving: Path) -> Backbone:
    """From the outs of a finished pretraining.

    Args:
        folder: With FILES.
        stats: The stats.json, asked only where config.json is older than the statistics in it.
        serving: What evaluate found to serve features best; it counts if it is of these weights.

    Raises:
        EarthPriorError: Files are missing, damaged, or do not belong together.
    """
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise EarthPriorError(f"{folder.name}/ lacks {', '.join(missing)}; run: dvc repro pretrain")
    config = handover.read_config(folder / "config.json")
    try:
        linear = LinearDenoiser.load(folder / "linear.safetensors")
        weights = load_file(folder / "network.safetensors")
    except (SafetensorError, OSError, DataError) as error:
        why = f"{folder.name}/ holds damaged weights ({error})"
        raise EarthPriorError(f"{why}; run: dvc repro -f pretrain") from None
    statistics = config.get("statistics")
    if statistics is None and not stats.is_file():
        raise EarthPriorError(
            f"{folder.name}/config.json has no statistics to normalize with (it was made by an earlier version), and "
            f"{stats} is missing; put it there, or run: dvc repro pretrain"
        )
    statistics = statistics or kept_statistics(handover.read_stats(stats))
    params, fingerprint = parse(config["params"], "config.json"), str(config["fingerprint"])
    facts = {"fingerprint": fingerprint, "best_epoch": config.get("best_epoch"), "data": config.get("data", {})}
    return assemble(params, linear, weights, statistics, _serving(serving, fingerprint), facts)


def of_checkpoint(path: Path) -> Backbone:
    """From a checkpoint of a training that is not finished: its best weights yet, or the averaged ones before a best.

    Its params are the ones beside it (made_of.json); keys that did not act are taken from the project's params.yaml.

    Args:
        path: `ckpt-<step>.pt`, in its folder under the project's work/.

    Raises:
        EarthPriorError: It is damaged, or something that belongs to it is missing.
    """
    folder, state = path.parent, _state(path)
    root = next((parent for parent in path.resolve().parents if (parent / "params.yaml").is_file()), None)
    if root is None:
        raise EarthPriorError(f"{path}: it lies in no project, so no params.yaml is found; leave it under work/")
    try:
        record = read_json(folder / made_of.RECORD)
        values, statistics = dict(record["params"]), kept_statistics(record["stats"])
        linear = LinearDenoiser.load(folder / "linear.safetensors")
    except (OSError, ValueError, LookupError, TypeError, DataError) as error:
        raise EarthPriorError(f"{path}: what belongs to it is missing or damaged ({error}) in {folder.name}/") from None
    if linear.digest() != state["linear"]:
        raise EarthPriorError(f"{path}: {folder.name}/linear.safetensors is not the one of this checkpoint")
    content = read_mapping(root / "params.yaml")
    put(content, values)
    params = parse(content, f"params.yaml with what {made_of.RECORD} says")
    average = {name.removeprefix("module."): value for name, value in state["average"].items() if "." in name}
    facts = {"fingerprint": folder.name, "best_epoch": state["best_epoch"] or None, "step": state["step"]}
    facts["data"] = record["stats"].get("data", {})
    return assemble(params, linear, state["best"] or average, statistics, None, facts)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a training's folder; None where there is none."""
    found = [path for path in folder.glob("ckpt-*.pt") if re.fullmatch(r"ckpt-\d+", path.stem)]
    return max((path for path in found if path.with_suffix(".json").is_file()), default=None)


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
        **facts,
        "format": FORMAT,
        "network": {
            "name": params.network,
            "options": getattr(params, params.network).model_dump(mode="json"),
            "out_channels": len(params.data.bands),
        },
        "bands": list(params.data.bands),
        "crop_px": params.data.train_px,
        "precondition": params.diffusion.precondition,
        "linear_width": linear.width if needs_filter else None,
        "normalization": {name: normalization[name] for name in NORMALIZATION},
        "serving": dict(serving),
        "adapted": [],
        "params": params.model_dump(mode="json", exclude={"tune", "operation"}),
    }
    tensors = {f"network.{name}": tensor for name, tensor in weights.items()}
    tensors |= {"alpha": schedule.alpha, "sigma": schedule.sigma}
    if needs_filter:
        tensors |= {f"linear.{name}": tensor for name, tensor in linear.parts().items()}
    return Backbone(description, tensors)


def _serving(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What evaluate found to serve features of these weights best; None where it was not asked."""
    try:
        found = read_json(path)
        known = found["fingerprint"] == fingerprint
        return {**found, "t": int(found["t"]), "rho": float(found["rho"])} if known else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, verified before it is opened, and opened without executing anything."""
    try:
        if read_json(path.with_suffix(".json"))["sha256"] != sha256_file(path):
            raise EarthPriorError(f"{path} is damaged (its SHA-256 is not its manifest's); take the one before")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"step", "best", "average", "best_epoch", "linear"} - set(state)
    except EarthPriorError:
        raise
    except FileNotFoundError as error:
        raise EarthPriorError(f"{error.filename} is missing; a checkpoint counts with its manifest (.json)") from None
    except Exception:  # noqa: BLE001 - a file of another kind makes torch raise whatever it likes
        raise EarthPriorError(f"{path} is no checkpoint of a training, and was not opened") from None
    if missing:
        raise EarthPriorError(f"{path} is no checkpoint of a training: it lacks {', '.join(sorted(missing))}")
    return state
