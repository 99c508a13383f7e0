"""Toy chips, filters and schedules that several tests share; all of them seeded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from earthprior.chips.batch import Batch
from earthprior.chips.normalize import Affine
from earthprior.diffusion import linear
from earthprior.diffusion.linear import LinearDenoiser
from earthprior.diffusion.schedule import NoiseSchedule
from earthprior.params import CLIP_PERCENTS


def linear_schedule(timesteps: int = 1000, first: float = 1e-6, last: float = 0.02) -> NoiseSchedule:
    """The tutorial's forward process."""
    return NoiseSchedule(torch.linspace(first, last, timesteps, dtype=torch.float64))


def make_batch(x0: Tensor, valid: Tensor | None = None, extra: Mapping[str, Tensor] | None = None) -> Batch:
    """A batch of chips (B, C, H, W), all valid unless said, with the identity as its affine map."""
    count, bands, height, width = x0.shape
    if valid is None:
        valid = torch.ones(count, 1, height, width, dtype=torch.bool)
    affine = Affine(torch.zeros(count, bands, 1, 1), torch.ones(count, bands, 1, 1))
    return Batch(x0, valid, affine, extra or {})


def radial_power(height: int, width: int) -> Tensor:
    """A red power spectrum (H, W // 2 + 1), isotropic, its mean over all frequencies 1."""
    rows, columns = torch.fft.fftfreq(height).abs(), torch.fft.fftfreq(width).abs()
    full = 1 / (0.01 + rows[:, None] ** 2 + columns[None] ** 2)
    return (full / full.mean())[:, : width // 2 + 1]


def gaussian_chips(
    count: int, mixing: Tensor, height: int, width: int, mean: float | Tensor = 0.0, seed: int = 0
) -> Tensor:
    """Stationary Gaussian chips (count, C, H, W): radial_power in every band, mixed across bands by (C, C)."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(count, mixing.shape[0], height, width, generator=generator)
    spectrum = torch.fft.rfft2(white, norm="ortho") * radial_power(height, width).sqrt()
    coloured = torch.fft.irfft2(spectrum, s=(height, width), norm="ortho")
    return torch.einsum("ij,bjhw->bihw", mixing, coloured) + torch.as_tensor(mean).reshape(1, -1, 1, 1)


def some_mixing(bands: int) -> Tensor:
    """A well-conditioned mixing of bands: correlated, of different variances."""
    generator = torch.Generator().manual_seed(bands)
    return 0.5 * torch.eye(bands) + 0.3 * torch.rand(bands, bands, generator=generator)


def toy_linear(bands: int = 4, size: int = 16, count: int = 64, mean: float | Tensor = 0.1) -> LinearDenoiser:
    """A linear denoiser fitted on Gaussian chips."""
    chips = gaussian_chips(count, some_mixing(bands), size, size, mean)
    return linear.fit([make_batch(chips)], average_d4=True)


def stats_of(raw: Tensor, bands: Sequence[str]) -> dict[str, Any]:
    """What stats.json says of raw chips (B, C, H, W), as far as normalization reads it."""

    def moments(values: Tensor) -> dict[str, float]:
        mean = float(values.mean())
        std = math.sqrt(float(((values - mean) ** 2).mean()))
        return {"min": float(values.min()), "max": float(values.max()), "mean": mean, "std": std}

    def summary(values: Tensor) -> dict[str, Any]:
        values = values.double().flatten()
        clipped = {}
        for percent in filter(None, CLIP_PERCENTS):
            low, high = np.percentile(values.numpy(), [percent, 100 - percent])
            clipped[f"{percent:g}"] = moments(values.clamp(low, high))
        return {**moments(values), "clipped": clipped}

    per_band = {band: summary(raw[:, index]) for index, band in enumerate(bands)}
    return {"bands": list(bands), "per_band": per_band, "all_bands": summary(raw)}
