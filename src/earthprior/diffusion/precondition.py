"""What a network is given of a noisy chip: the same in training, in denoising and where features are taken."""

from __future__ import annotations

import torch
from torch import Tensor

from earthprior.diffusion.linear import LinearDenoiser


def network_input(
    how: str, xt: Tensor, alpha: Tensor, sigma: Tensor, linear: LinearDenoiser | None
) -> tuple[Tensor, Tensor]:
    """The network's input and the skip that its output is added to.

    With m the band means and s the chips' standard deviation:
        none: xt, and no skip (xt stands in its place).
        scalar: c_in (xt - alpha m), and the best scalar filter's estimate of x0.
        wiener: [c_in (xt - alpha m), (W_t xt - m) / s], 2 C channels, and the best linear filter's estimate W_t xt.

    Args:
        how: `diffusion.precondition`.
        xt: Noisy chips (B, C, H, W); for wiener of any size, see `LinearDenoiser.sized`.
        alpha: (B, 1, 1, 1).
        sigma: (B, 1, 1, 1).
        linear: Fitted on the normalized training chips; none takes None, too.

    Returns:
        Input (B, C or 2 C, H, W) and skip (B, C, H, W).

    Source: Karras et al. 2022, arXiv:2206.00364, Section 5, written for alpha^2 + sigma^2 = 1.
    """
    if how == "none" or linear is None:
        return xt, xt
    mean, std = linear.mean, linear.std
    centred = xt - alpha * mean
    scaling = c_in(linear, alpha, sigma)
    if how == "scalar":
        return scaling * centred, mean + alpha * std**2 * scaling**2 * centred
    skip = linear.sized(xt.shape[-2], xt.shape[-1]).denoise(xt, alpha, sigma)
    return torch.cat([scaling * centred, (skip - mean) / std], dim=1), skip


def c_in(linear: LinearDenoiser, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What brings noisy chips to unit variance, (B, 1, 1, 1)."""
    return torch.rsqrt(alpha**2 * linear.std**2 + sigma**2)


def input_channels(how: str, bands: int) -> int:
    """How many channels the network is given: the bands, twice where the Wiener estimate comes along."""
    return 2 * bands if how == "wiener" else bands
