"""Random brightness of a view: contrast, brightness, gamma of the whole and of a patch, noise; in this order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from earthprior.params import AugmentationParams

PATCH_SIDES = (0.25, 0.75)
"""Sides of the rectangle of `patch_gamma_range`, as a share of the view's."""


def random_radiometry(x0: Tensor, valid: Tensor, params: AugmentationParams, generator: torch.Generator) -> Tensor:
    """Views with other brightness; all bands of a view alike, invalid pixels as they were.

    Nothing is clipped, so views may leave the range that the normalization keeps.

    Args:
        x0: Views (B, C, H, W), normalized.
        valid: Masks (B, 1, H, W), bool; means and extremes are of valid pixels only.
        params: The section `augmentation`.
        generator: On the views' device.

    Returns:
        Views like x0.
    """
    contrast, brightness, gamma, patch_gamma, sigma, *patch = torch.rand(
        10, x0.shape[0], 1, 1, 1, generator=generator, device=generator.device
    )
    changed = x0
    if params.contrast_range is not None:
        mean = _mean(x0, valid)
        changed = mean + (changed - mean) * _uniform(contrast, params.contrast_range)
    if params.br_range is not None:
        changed = changed + _uniform(brightness, params.br_range)
    if params.bshift_gamma_range is not None:
        changed = _gamma(changed, valid, _log_uniform(gamma, params.bshift_gamma_range))
    if params.patch_gamma_range is not None:
        inside = _rectangle(patch, x0.shape[-2], x0.shape[-1])
        changed = torch.where(
            inside, _gamma(changed, valid, _log_uniform(patch_gamma, params.patch_gamma_range)), changed
        )
    if params.sigma_range is not None:
        noise = torch.randn(x0.shape, generator=generator, device=generator.device)
        changed = changed + _uniform(sigma, params.sigma_range) * noise
    return x0 if changed is x0 else torch.where(valid, changed, x0)


def _uniform(draw: Tensor, bounds: tuple[float, float]) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * draw


def _log_uniform(draw: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Between the bounds, uniform in the logarithm: gamma 1/2 is as likely as its inverse, gamma 2."""
    return torch.exp(_uniform(draw, (math.log(bounds[0]), math.log(bounds[1]))))


def _mean(x0: Tensor, valid: Tensor) -> Tensor:
    """Per view and band (B, C, 1, 1)."""
    count = valid.sum((2, 3), keepdim=True).clamp(min=1)
    return torch.where(valid, x0, 0.0).sum((2, 3), keepdim=True) / count


def _gamma(x0: Tensor, valid: Tensor, gamma: Tensor) -> Tensor:
    """low + (high - low) u^gamma, u = (x - low) / (high - low), with each view's own extremes per band.

    Of its own, because normalized values have no black of their own; so a view's darkest and brightest pixel stay.
    Where no pixel is valid the result is not finite, and unused.
    """
    low = torch.where(valid, x0, torch.inf).amin((2, 3), keepdim=True)
    high = torch.where(valid, x0, -torch.inf).amax((2, 3), keepdim=True)
    span = high - low
    # A constant view has u = 0 everywhere, and stays. The clamp keeps rounding and invalid pixels out of the power.
    u = ((x0 - low) / span.clamp(min=torch.finfo(x0.dtype).tiny)).clamp(0, 1)
    return low + span * u**gamma


def _rectangle(draws: list[Tensor], height: int, width: int) -> Tensor:
    """One rotated rectangle per view (B, 1, H, W), bool: its centre anywhere in the view, at any angle.

    The tutorial's code turns and magnifies the whole chip about a random point of it, which often leaves no pixel out;
    this patch is never the whole view.

    Args:
        draws: Five of U(0, 1), each (B, 1, 1, 1): centre x and y, angle, two sides.
        height: Of the views, px.
        width: Of the views, px.
    """
    centre_x, centre_y, turn, wide, tall = draws
    side = max(height, width)
    x = torch.arange(width, device=turn.device) + 0.5 - centre_x * width
    y = (torch.arange(height, device=turn.device) + 0.5)[:, None] - centre_y * height
    cos, sin = torch.cos(math.pi * turn), torch.sin(math.pi * turn)
    half_wide, half_tall = (side / 2 * _uniform(draw, PATCH_SIDES) for draw in (wide, tall))
    return ((cos * x + sin * y).abs() <= half_wide) & ((cos * y - sin * x).abs() <= half_tall)
