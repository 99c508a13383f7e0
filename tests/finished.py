"""What a pretraining leaves, its weights drawn instead of trained: the beginning of every test of backbones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from earthprior import build
from earthprior.files import write_json
from earthprior.params import Params
from earthprior.tasks.diffusion import DiffusionTask
from support import gaussian_chips, some_mixing, stats_of, toy_linear

BANDS = ("red", "green", "blue", "nir")
SMALL = {
    "unet_att_d.filter_config": [4, 8], "unet_att_d.block_num": [1, 1], "unet_att_d.time_embedding_dim": 16,
    "unet_film.attention": False, "unet_film.time_embedding_dim": 16,
}  # fmt: skip


def raw_chips() -> Tensor:
    """Chips (8, 4, 16, 16) as in files."""
    return 2000 + 400 * gaussian_chips(8, some_mixing(4), 16, 16)


@dataclass
class Finished:
    """A finished pretraining: its results folder, params, task, and stats.json."""

    folder: Path
    params: Params
    task: DiffusionTask
    stats: dict[str, Any]


def finish(params: Params, root: Path) -> Finished:
    """Leave results/pretrain/ in root."""
    task = build.task(params, toy_linear()).eval()
    with torch.no_grad():
        for index, parameter in enumerate(task.network.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    folder = root / "results/pretrain"
    folder.mkdir(parents=True, exist_ok=True)
    task.linear.save(folder / "linear.safetensors")
    save_file(task.network.state_dict(), folder / "network.safetensors")
    stats = stats_of(raw_chips(), BANDS) | {"data": {"md5": "0" * 32 + ".dir", "catalog_sha256": "c" * 64}}
    write_json(folder / "config.json", build.config(params, "f" * 12, {}, 1, task.linear, stats))
    return Finished(folder, params, task, stats)
