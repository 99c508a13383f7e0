"""`earthprior import-weights best_model.pth`: a tutorial's checkpoint as the outs of the stage pretrain.

What the network looks like is read off the tensors and compared with params.yaml; nothing is written before every key
and shape was checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from safetensors.torch import save
from torch import Tensor

from earthprior import build, identity
from earthprior.chips.selection import linear_crops, read_stats, select
from earthprior.diffusion import linear
from earthprior.diffusion.linear import LinearDenoiser
from earthprior.errors import EarthPriorError
from earthprior.files import sha256_file, write_atomic, write_csv, write_json
from earthprior.params import Params, active, load
from earthprior.params.editing import overlay, plain, write
from earthprior.tools.tutorial_weights import architecture, channels_of, check_keys, read_weights
from earthprior.tracking_store import RunRef, locate

TimeConditioning = Literal["none", "bottleneck"]


def run(
    checkpoint: Path,
    params: Params,
    root: Path,
    time_conditioning: TimeConditioning = "bottleneck",
    write_params: bool = False,
) -> None:
    """Write results/pretrain/ from a tutorial's checkpoint, for evaluate and everything after it.

    Args:
        checkpoint: `.pth` or `.safetensors`.
        params: The whole of params.yaml.
        root: The project's root, holding results/stats/stats.json.
        time_conditioning: `none` for weights from before the tutorial's time embedding had an effect.
        write_params: Write what the checkpoint says of its network into params.yaml instead of asking for it.

    Raises:
        EarthPriorError: The file is no such checkpoint, params.yaml describes another network, or there are no
            statistics.
    """
    torch.set_num_threads(params.threads)
    stats, stats_sha256 = read_stats(root)
    weights = read_weights(checkpoint)
    found = architecture(weights, checkpoint.name)
    check_keys(weights, found, checkpoint.name)
    params = _agreed(params, root, found, time_conditioning, weights, checkpoint.name, write_params)
    selection = select(params, root, stats)
    filtered = linear.fit(*linear_crops(params, selection, build.normalizer(params, stats)))

    config = {
        **build.config(params, identity.fingerprint(active(params), stats_sha256), {}, None, filtered, stats),
        "imported": {"file": checkpoint.name, "sha256": sha256_file(checkpoint)},
    }
    _write(weights, filtered, config, root)
    print(
        f"{checkpoint.name}: {sum(tensor.numel() for tensor in weights.values()):,} values in {len(weights)} tensors, "
        "written to results/pretrain/"
    )
    if time_conditioning != "none" and _time_is_untrained(weights):
        print(
            "note: time_mlp may still hold its initial values, as in checkpoints from before the tutorial's b7b84cb, "
            "when it had no effect; for those give --time-conditioning none"
        )
    print("next: dvc commit -f pretrain && dvc repro evaluate")


def _write(weights: dict[str, Tensor], filtered: LinearDenoiser, config: Mapping[str, Any], root: Path) -> None:
    """All outs of the stage pretrain."""
    results = root / "results/pretrain"
    # config.json says what the others are: gone first and back last, it never stands beside those of another network.
    (results / "config.json").unlink(missing_ok=True)
    write_atomic(results / "network.safetensors", save(weights))
    filtered.save(results / "linear.safetensors")
    # A table without rows: nothing was trained here.
    write_csv(results / "history.csv", pd.DataFrame(columns=["epoch", "train_loss", "loss", "gain_db/mean"]))
    store = locate(root)
    write_json(results / "mlflow_run.json", RunRef(store.shown, store.experiment, None).to_json())
    write_json(results / "config.json", config)


def _time_is_untrained(weights: Mapping[str, Tensor]) -> bool:
    """Whether all of time_mlp lies where torch starts a linear layer: within 1 / sqrt(inputs)."""
    weight = weights["time_mlp.0.weight"]
    bound = weight.shape[1] ** -0.5 * 1.000001
    return all(bool((weights[f"time_mlp.0.{name}"].abs() <= bound).all()) for name in ("weight", "bias"))


def _agreed(
    params: Params,
    root: Path,
    found: Mapping[str, Any],
    time_conditioning: TimeConditioning,
    weights: Mapping[str, Tensor],
    name: str,
    write_params: bool,
) -> Params:
    """Params that describe the checkpoint's network, written to params.yaml if asked.

    Raises:
        EarthPriorError: They describe another one.
    """
    channels, bands = channels_of(weights), list(params.data.bands)
    if channels != len(bands):
        raise EarthPriorError(
            f"{name} takes {channels} channels, data.bands names {len(bands)} ({', '.join(bands)}); name the "
            f"checkpoint's {channels} bands there, in the files' order, and run: dvc repro stats"
        )
    wanted = {
        "network": "unet_att_d",
        # A tutorial's network predicts the noise from the noisy chip itself.
        "objective": "eps",
        "diffusion.precondition": "none",
        **{f"unet_att_d.{key}": value for key, value in found.items()},
        "unet_att_d.time_injection": time_conditioning,
    }
    differences = list(_differences(params, wanted))
    if not differences:
        return params
    if not write_params:
        raise EarthPriorError(
            "\n".join(
                [
                    f"params.yaml describes another network than {name} holds; set these keys, or give --write-params:",
                    *differences,
                    "  (unet_att_d.dropout_rate leaves no trace in the weights: set it as it was, if you train on)",
                ]
            )
        )
    path = root / "params.yaml"
    text, changes = overlay(path, wanted, f"params.yaml with the network of {name}")
    write(text, path)
    print("\n".join(["written to params.yaml:", *(f"  {change}" for change in changes)]))
    return load(path)


def _differences(params: Params, wanted: Mapping[str, Any]) -> Iterator[str]:
    for key, value in wanted.items():
        have: Any = params
        for part in key.split("."):
            have = getattr(have, part)
        have = list(have) if isinstance(have, tuple) else have
        if have != value:
            yield f"  {key}: {plain(have)} -> {plain(value)}"
