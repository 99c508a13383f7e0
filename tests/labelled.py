"""Labelled chips and small backbones, for the tests of finetuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from earthprior import build
from earthprior.assembling import assemble
from earthprior.backbone import Backbone
from earthprior.chips.catalog import ChipRow, load_catalog
from earthprior.downstream import labels
from earthprior.downstream.fitting import Setup
from earthprior.params import DownstreamParams, Params, load_downstream
from support import gaussian_chips, some_mixing, stats_of, toy_linear

ROOT = Path(__file__).parents[1]
SMALL: Mapping[str, Any] = {
    "threads": 1, "data.chip_size": 32, "data.crop_px": 16, "batch_size": 4, "val_batch_size": 8, "epochs": 2,
    "steps_per_epoch": 3, "warmup_epochs": 0, "operation.readers": 2, "head_channels": 8, "lr": 0.01, "ema_decay": 0.9,
    "operation.checkpoint_every_seconds": 1000, "operation.log_every_steps": 2,
}  # fmt: skip
CPU = torch.device("cpu")


def small(**overrides: Any) -> DownstreamParams:
    """The committed downstream/params.yaml, cut down to six steps on 32 px chips; double underscores stand for dots."""
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_downstream(ROOT / "downstream/params.yaml", {**SMALL, **changes})


def backbone_of(params: Params, shift: float = 0.05) -> Backbone:
    """A backbone whose weights nobody trained; they do not stand at the zeros of a start."""
    task = build.task(params, toy_linear())
    with torch.no_grad():
        for index, parameter in enumerate(task.network.parameters()):
            parameter.add_(shift * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    stats = stats_of(2000 + 400 * gaussian_chips(8, some_mixing(4), 16, 16), params.data.bands)
    statistics = {name: stats[name] for name in ("bands", "per_band", "all_bands")}
    return assemble(params, task.linear, task.network.state_dict(), statistics, None, {"fingerprint": "f" * 12})


def with_columns(folder: Path) -> Path:
    """A catalog of `make_chips` with a class and a number for each chip, which follow the chips' brightness."""
    from earthprior.chips.read import read_chip

    path = folder / "catalog.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    params = small()
    catalog = load_catalog(params.data, folder.parent)
    spec = labels.ChipSpec.from_params(params.data)
    means = [float(read_chip(catalog.dir, row, spec)[0].mean()) for row in catalog.rows]
    table["cover"] = ["bright" if mean > sorted(means)[len(means) // 2] else "dark" for mean in means]
    table["height"] = [f"{mean / 100:.2f}" for mean in means]
    table.to_csv(path, index=False)
    return folder


def setup_of(root: Path, backbone: Backbone, **overrides: Any) -> tuple[Setup, list[ChipRow], list[ChipRow]]:
    """What is finetuned on the chips of a root, with its labelled train and validate rows."""
    params = small(**overrides)
    catalog = load_catalog(params.data, root)
    found, rows, _ = labels.find(params, catalog.dir, catalog.split("train"))
    validate = labels.labelled(catalog.split("validate"), params.label_column)
    return Setup(params, backbone, found, CPU), rows, validate
