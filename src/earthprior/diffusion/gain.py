"""How good a denoiser is: its error at fixed noise levels on fixed noise, and its gain over the linear denoiser.

Raw errors depend on the noise schedule, the normalization and the loss weights, which are what is tuned. The levels are
therefore noise-to-signal ratios, the noise is a function of chip and level alone, and the headline number compares
with the linear denoiser measured by the same code: 10 log10(mse_linear / mse), 0 dB is a linear filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from earthprior import metrics as judges
from earthprior.chips.batch import Batch
from earthprior.diffusion.linear import LinearDenoiser
from earthprior.diffusion.schedule import NoiseSchedule, q_sample
from earthprior.errors import DivergedError, ParamsError
from earthprior.randomness import torch_generator

RHOS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""The judged noise-to-signal ratios sigma / (alpha std(x0)). Far outside this range the linear error is so small that
one level would drown all others."""

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""denoise(xt (B, C, H, W), t (B,)) -> x0_hat (B, C, H, W); it hides parameterization and condition."""

Metric = Callable[[Tensor, Batch], Tensor]
"""metric(x0_hat (B, C, H, W), batch) -> (B, C), NaN for a chip without valid pixels."""


@dataclass(frozen=True)
class NoiseLevel:
    """A judged noise level: its ratio and the timestep nearest to it under the run's schedule."""

    rho: float
    t: int

    @property
    def name(self) -> str:
        """As in metric names: rho_0.5."""
        return f"rho_{self.rho:g}"


def nearest_timestep(schedule: NoiseSchedule, rho: float, std: float) -> int:
    """The timestep whose noise-to-signal ratio is nearest (in log) to rho, for chips of standard deviation std."""
    return int(schedule.nearest(torch.tensor([-2 * math.log(rho * std)], device=schedule.betas.device))[0])


def noise_levels(schedule: NoiseSchedule, std: float, rhos: Sequence[float] = RHOS) -> list[NoiseLevel]:
    """The levels that the schedule reaches; one whose nearest timestep is more than 10 % off is left out.

    Raises:
        ParamsError: The schedule reaches none.
    """
    levels = []
    for rho in rhos:
        t = nearest_timestep(schedule, rho, std)
        reached = math.exp(-0.5 * float(schedule.log_snr[t])) / std
        if abs(reached / rho - 1) <= 0.1:
            levels.append(NoiseLevel(rho, t))
    if not levels:
        raise ParamsError(
            "the noise schedule of section diffusion has no timestep near any of the noise-to-signal ratios "
            f"{list(rhos)} that networks are judged at; use more diffusion.timesteps, or another noise_schedule"
        )
    return levels


def fixed_noise(chip: str, rho: float, shape: Sequence[int]) -> Tensor:
    """Standard normal noise that depends on chip and level alone, so that every epoch and run meets the same."""
    return torch.randn(tuple(shape), generator=torch_generator("validation", chip, repr(float(rho))))


def mse(x0_hat: Tensor, batch: Batch) -> Tensor:
    """Mean squared error over valid pixels, normalized units, (B, C); the error that the gain is made of."""
    return judges.mse(x0_hat, batch.x0, batch.valid)


@torch.no_grad()
def denoising_table(
    denoisers: Mapping[str, Callable[[Batch], Denoiser]],
    batches: Iterable[tuple[Batch, Sequence[str]]],
    schedule: NoiseSchedule,
    levels: Sequence[NoiseLevel],
    bands: Sequence[str],
    metrics: Mapping[str, Metric],
) -> pd.DataFrame:
    """Every denoiser on the same noisy chips.

    Args:
        denoisers: Makers of denoisers for a batch, by name; "network" and "linear" are what `gain_db` compares.
        batches: Clean chips, and a key per chip that addresses its noise.
        schedule: The forward process.
        levels: Where to judge.
        bands: Band names, C of them.
        metrics: By name.

    Returns:
        One row per chip, level and denoiser: columns chip, rho, t, denoiser and `<metric>/<band>`.

    Raises:
        DivergedError: A denoiser's answer is not finite. In a metric NaN means no data and is left out of means, so a
            diverged network would be judged on those chips only that it still answers.
    """
    columns = [f"{metric}/{band}" for metric in metrics for band in bands]
    rows: list[list[object]] = []
    for batch, chips in batches:
        makers = {name: make(batch) for name, make in denoisers.items()}
        for level in levels:
            eps = torch.stack([fixed_noise(chip, level.rho, batch.x0.shape[1:]) for chip in chips]).to(batch.x0.device)
            t = torch.full((len(batch),), level.t, device=batch.x0.device)
            xt = q_sample(batch.x0, eps, t, schedule)
            for name, denoise in makers.items():
                x0_hat = denoise(xt, t).float()
                finite = x0_hat.isfinite().flatten(1).all(1)
                if not finite.all():
                    chip = chips[int(finite.int().argmin())]
                    raise DivergedError(f"{name} answers chip {chip} at {level.name} with NaN or infinity; lower lr")
                values = torch.cat([metric(x0_hat, batch).cpu() for metric in metrics.values()], dim=1).tolist()
                rows += [[chip, level.rho, level.t, name, *row] for chip, row in zip(chips, values, strict=True)]
    return pd.DataFrame(rows, columns=["chip", "rho", "t", "denoiser", *columns])


def level_means(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The mean of a metric over bands and chips: index rho, one column per denoiser."""
    columns = [column for column in table.columns if column.startswith(f"{metric}/")]
    values = table[["rho", "denoiser"]].assign(value=table[columns].mean(axis=1))
    return values.pivot_table(index="rho", columns="denoiser", values="value", aggfunc="mean")


def missing_levels(reached: Iterable[float]) -> list[str]:
    """The judged levels that are not among the ones reached: a mean over others compares with such means only."""
    found = set(reached)
    return [f"{rho:g}" for rho in RHOS if rho not in found]


def gain_db(errors: pd.DataFrame) -> dict[str, float]:
    """The denoising gain of the network over the linear denoiser in dB, by level name, and its mean over levels.

    Args:
        errors: Mean squared errors with columns "network" and "linear", index rho; see `level_means`.

    Returns:
        {"rho_0.05": ..., ..., "mean": ...}; above 0 the network beats the linear filter, NaN where its error is no
        finite number.
    """
    gains = {
        f"rho_{rho:g}": 10 * math.log10(row["linear"] / row["network"]) if math.isfinite(row["network"]) else math.nan
        for rho, row in errors.iterrows()
    }
    return {**gains, "mean": sum(gains.values()) / len(gains)}


def linear_denoiser(linear: LinearDenoiser, schedule: NoiseSchedule) -> Denoiser:
    """The linear denoiser behind the seam that networks are judged through."""
    return lambda xt, t: linear.denoise(xt, schedule.at("alpha", t), schedule.at("sigma", t))


def mean_denoiser(linear: LinearDenoiser) -> Denoiser:
    """Answers every noisy chip with the training chips' mean: what knowing nothing of the chip costs."""
    return lambda xt, t: linear.mean.expand_as(xt)
