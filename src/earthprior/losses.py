"""How error is measured in training: element-wise errors, averaged over valid pixels only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def mse(error: Tensor) -> Tensor:
    """Squared error."""
    return error**2


def l1(error: Tensor) -> Tensor:
    """Absolute error."""
    return error.abs()


def charbonnier(error: Tensor) -> Tensor:
    """sqrt(error^2 + 0.001^2), a smooth absolute error. Source: Lai et al. 2017, arXiv:1704.03915, Section 3.2."""
    return torch.sqrt(error**2 + 1e-6)


def mean_over_valid(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of (B, C, H, W) over bands and valid (B, 1, H, W) pixels, (B,); 0 for a chip without valid pixels."""
    count = valid.sum((1, 2, 3)) * values.shape[1]
    return torch.where(valid, values, 0.0).sum((1, 2, 3)) / count.clamp(min=1)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"mse": mse, "l1": l1, "charbonnier": charbonnier}
