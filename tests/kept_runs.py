"""Runs as `earthprior.recorded.find` gives them, made without a training, for the tests of comparing."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file

from earthprior import build
from earthprior.files import read_json, write_json
from earthprior.recorded import RecordedRun
from tiny_training import Tiny

RHOS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def history(*gains: float, rhos: tuple[float, ...] = RHOS, steps: int = 4) -> pd.DataFrame:
    """One row an epoch; at each noise level the gain is the mean's."""
    rows = [
        {
            "epoch": epoch,
            "step": epoch * steps,
            "lr": 0.1 / epoch,
            **{f"gain_db/rho_{rho:g}": gain for rho in rhos},
            "gain_db/mean": gain,
        }
        for epoch, gain in enumerate(gains, 1)
    ]
    return pd.DataFrame(rows)


def recorded(name: str, folder: Path, content: Mapping[str, Any], **changes: Any) -> RecordedRun:
    """A run of two epochs without weights."""
    told: dict[str, Any] = {
        "commit": None, "data_md5": "a" * 32, "history": history(0.1, 0.3), "metrics": {}, **changes,
    }  # fmt: skip
    return RecordedRun(asked=name, title=name, content=content, folder=folder, **told)


def with_weights(tiny: Tiny, folder: Path) -> Path:
    """What a pretraining leaves, with a network of random weights, in a new folder."""
    folder.mkdir(parents=True)
    shutil.copy(tiny.root / "results/stats/stats.json", folder)
    task = build.task(tiny.params, tiny.linear)
    generator = torch.Generator().manual_seed(tiny.params.seed)
    # As it is made, a network answers nothing but 0.
    weights = {
        name: value + 0.02 * torch.randn(value.shape, generator=generator)
        for name, value in task.network.state_dict().items()
    }
    tiny.linear.save(folder / "linear.safetensors")
    save_file(weights, folder / "network.safetensors")
    stats = read_json(folder / "stats.json")
    write_json(folder / "config.json", build.config(tiny.params, "f" * 12, {}, 1, tiny.linear, stats))
    return folder
