"""The trained network, the linear filter and the training mean as denoisers of the same noisy chips."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from earthprior import metrics
from earthprior.chips.batch import Batch
from earthprior.chips.normalize import denormalize
from earthprior.diffusion.gain import (
    NoiseLevel,
    denoising_table,
    fixed_noise,
    gain_db,
    level_means,
    linear_denoiser,
    mean_denoiser,
    noise_levels,
)
from earthprior.diffusion.schedule import NoiseSchedule, q_sample
from earthprior.figures import Panel
from earthprior.figures.imagery import Array
from earthprior.tasks.diffusion import DiffusionTask

DENOISERS = ("network", "linear", "mean")

PANEL_RHOS = (0.1, 0.5, 2.0)


def judge(
    task: DiffusionTask, batches: Iterable[tuple[Batch, Sequence[str]]], bands: Sequence[str], data_range: Tensor
) -> pd.DataFrame:
    """The long table of `denoising_table` for all three denoisers and all metrics.

    Args:
        task: The trained task, in evaluation mode.
        batches: Clean crops with a key each.
        bands: Names in band order.
        data_range: Peak per band for PSNR and SSIM (C,), physical units.
    """
    linear, mean = linear_denoiser(task.linear, task.schedule), mean_denoiser(task.linear)
    makers = {"network": task.denoiser, "linear": lambda batch: linear, "mean": lambda batch: mean}
    levels = noise_levels(task.schedule, float(task.linear.std))
    return denoising_table(makers, batches, task.schedule, levels, bands, metrics.of_batches(data_range))


def levels_table(table: pd.DataFrame, schedule: NoiseSchedule, bands: Sequence[str]) -> pd.DataFrame:
    """One row per noise level: rho, t, gain_db, and `<metric>_<denoiser>`, then the same per band with `_<band>`.

    Metrics are eps_mse, psnr and ssim, averaged over crops; crops without a usable pixel are left out.
    """
    timesteps = table.groupby("rho")["t"].first()
    rows = pd.DataFrame({"rho": timesteps.index, "t": timesteps.to_numpy()})
    gains = gain_db(level_means(table, "mse"))
    rows["gain_db"] = [gains[f"rho_{rho:g}"] for rho in rows["rho"]]
    return pd.concat([rows, *(_columns(table, schedule, rows, band) for band in [None, *bands])], axis=1)


def _columns(table: pd.DataFrame, schedule: NoiseSchedule, rows: pd.DataFrame, band: str | None) -> pd.DataFrame:
    """The metrics' columns, averaged over bands (band None) or of one band."""
    found: dict[str, Any] = {}
    for metric in ("mse", *metrics.METRICS):
        means = level_means(table if band is None else _only(table, band), metric).reindex(rows["rho"])
        for denoiser in DENOISERS:
            name = f"{'eps_mse' if metric == 'mse' else metric}_{denoiser}" + (f"_{band}" if band else "")
            values = means[denoiser].to_list() if denoiser in means else [math.nan] * len(rows)
            if metric == "mse":
                values = [
                    metrics.eps_mse(value, float(schedule.alpha[t]), float(schedule.sigma[t]))
                    for value, t in zip(values, rows["t"], strict=True)
                ]
            found[name] = values
    return pd.DataFrame(found)


def _only(table: pd.DataFrame, band: str) -> pd.DataFrame:
    """The table with the columns of one band."""
    keys = ["chip", "rho", "t", "denoiser"]
    return table[keys + [f"{metric}/{band}" for metric in ("mse", *metrics.METRICS)]]


def summary(levels: pd.DataFrame, bands: Sequence[str]) -> dict[str, Any]:
    """The numbers of metrics.json: gain per level and mean, and PSNR and SSIM averaged over levels.

    eps-MSE is not averaged: the lowest noise level would drown all others. Values that are not finite are left out,
    since JSON has no word for them.
    """
    gains = {f"rho_{rho:g}": float(gain) for rho, gain in zip(levels["rho"], levels["gain_db"], strict=True)}
    found: dict[str, Any] = {"gain_db": {**gains, "mean": sum(gains.values()) / len(gains)}}
    for metric in metrics.METRICS:
        found[metric] = {name: float(levels[f"{metric}_{name}"].mean()) for name in DENOISERS}
    found["per_band"] = {
        band: {
            "gain_db": float(_decibel(levels[f"eps_mse_linear_{band}"] / levels[f"eps_mse_network_{band}"]).mean()),
            **{metric: float(levels[f"{metric}_network_{band}"].mean()) for metric in metrics.METRICS},
        }
        for band in bands
    }
    return finite(found)


def finite(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without NaN and infinite numbers, and without branches that this leaves empty."""
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            value = finite(value)
            if value:
                kept[name] = value
        elif not isinstance(value, float) or math.isfinite(value):
            kept[name] = value
    return kept


def _decibel(ratio: pd.Series) -> pd.Series:
    return ratio.map(lambda value: 10 * math.log10(value) if value > 0 else math.nan)


@torch.no_grad()
def panels(task: DiffusionTask, batch: Batch, chips: Sequence[str], rhos: Sequence[float] = PANEL_RHOS) -> list[Panel]:
    """Each chip of the batch at a low, a middle and a high noise level (or at others), in physical units."""
    levels = [level for level in noise_levels(task.schedule, float(task.linear.std)) if level.rho in rhos]
    return [panel for index, chip in enumerate(chips) for panel in _panels_of(task, batch, index, chip, levels)]


def _panels_of(task: DiffusionTask, batch: Batch, index: int, chip: str, levels: Sequence[NoiseLevel]) -> list[Panel]:
    one = batch[index : index + 1]
    clean, valid = denormalize(one.x0, one.affine)[0].cpu().numpy(), one.valid[0, 0].cpu().numpy()
    found = []
    for level in levels:
        noisy, linear, network = denoised(task, one, level, fixed_noise(chip, level.rho, one.x0.shape[1:]))
        found.append(Panel(panel_title(level.rho, chip), clean, noisy, {"linear": linear, "network": network}, valid))
    return found


def panel_title(rho: float, chip: str) -> str:
    """A noise level and a chip's name, as a panel shows them."""
    return f"rho {rho:g}\n{PurePosixPath(chip).stem[-24:]}"


@torch.no_grad()
def denoised(task: DiffusionTask, one: Batch, level: NoiseLevel, eps: Tensor) -> tuple[Array, Array, Array]:
    """A chip with noise, the linear filter's estimate of it and the network's, each (C, H, W) in physical units.

    Args:
        task: The trained task, in evaluation mode.
        one: A batch of one chip.
        level: The noise level, of this task's schedule.
        eps: Standard normal noise (C, H, W).
    """
    t = torch.full((1,), level.t, device=one.x0.device)
    xt = q_sample(one.x0, eps[None].to(one.x0.device), t, task.schedule)

    def physical(x: Tensor) -> Array:
        array: Array = denormalize(x.float(), one.affine)[0].cpu().numpy()
        return array

    # Over alpha, so that the chip under the noise keeps its own brightness.
    return (
        physical(xt / task.schedule.at("alpha", t)),
        physical(linear_denoiser(task.linear, task.schedule)(xt, t)),
        physical(task.denoiser(one)(xt, t)),
    )
