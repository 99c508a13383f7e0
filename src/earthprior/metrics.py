"""How a denoised chip is judged: pure functions of prediction, target and valid mask, one number per chip and band.

Invalid pixels change nothing: they are left out of every mean, and a structural window that touches one is too. A chip
without a usable pixel is NaN, so that an average must leave it out instead of counting it as perfect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from scipy.ndimage import minimum_filter
from torch import Tensor

from earthprior.chips.normalize import denormalize

if TYPE_CHECKING:
    from earthprior.chips.batch import Batch

SSIM_WINDOW_PX = 7

PSNR_CEILING_DB = 120.0
"""An exact copy has an infinite PSNR, which no mean and no JSON can hold; this is far above what float32 can tell."""


def mse(pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean squared error over valid pixels.

    Args:
        pred: (B, C, H, W).
        target: (B, C, H, W), same units.
        valid: (B, 1, H, W) bool.

    Returns:
        (B, C) float32 in squared units, NaN for chips without a valid pixel.
    """
    count = valid.sum((2, 3)).to(torch.float32)
    squares = torch.where(valid, (pred.float() - target.float()) ** 2, 0.0).sum((2, 3))
    return torch.where(count > 0, squares / count, torch.nan)


def psnr(pred: Tensor, target: Tensor, valid: Tensor, data_range: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, 10 log10(data_range^2 / mse), over valid pixels.

    Args:
        pred: (B, C, H, W), physical units.
        target: (B, C, H, W), physical units.
        valid: (B, 1, H, W) bool.
        data_range: What counts as the peak per band (C,), physical units.

    Returns:
        (B, C) in dB, at most `PSNR_CEILING_DB`, NaN for chips without a valid pixel.
    """
    peak = data_range.to(pred.device).float()[None]
    return (20 * torch.log10(peak) - 10 * torch.log10(mse(pred, target, valid))).clamp(max=PSNR_CEILING_DB)


def ssim(pred: Tensor, target: Tensor, valid: Tensor, data_range: Tensor) -> Tensor:
    """Structural similarity: the mean of the SSIM map over pixels whose whole 7 x 7 window is valid.

    Args:
        pred: (B, C, H, W), physical units.
        target: (B, C, H, W), physical units.
        valid: (B, 1, H, W) bool.
        data_range: Per band (C,), physical units.

    Returns:
        (B, C) in [-1, 1], on the CPU; NaN for chips without a wholly valid window or smaller than 3 px.

    Source: Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861; scikit-image's implementation.
    """
    from skimage.metrics import structural_similarity

    batch, bands, height, width = pred.shape
    window = min(SSIM_WINDOW_PX, height - 1 + height % 2, width - 1 + width % 2)
    if window < 3:
        return torch.full((batch, bands), torch.nan)
    # All chips and bands as one tall image, in units of the data range: a call per chip and band takes five times as
    # long. Windows across seams are left out like those that touch nodata. Running sums inside the filters would carry
    # what lies under nodata down the image; zeros carry nothing.
    span = data_range.to(pred.device).double().reshape(1, -1, 1, 1)
    first, second = (
        torch.where(valid, x.double() / span, 0.0).reshape(-1, width).cpu().numpy() for x in (pred, target)
    )
    _, similarity = structural_similarity(first, second, win_size=window, data_range=1.0, full=True)
    usable = minimum_filter(valid[:, 0].cpu().numpy(), size=(1, window, window), mode="constant", cval=False)
    maps = torch.from_numpy(similarity).reshape(pred.shape)
    inside = torch.from_numpy(usable)[:, None]
    count = inside.sum((2, 3))
    return torch.where(count > 0, torch.where(inside, maps, 0.0).sum((2, 3)) / count, torch.nan).float()


def eps_mse(x0_mse: float, alpha: float, sigma: float) -> float:
    """The eps-MSE of a denoiser that is known by its x0-MSE.

    eps_hat = (xt - alpha x0_hat) / sigma, so eps_hat - eps = (alpha / sigma) (x0 - x0_hat).

    Args:
        x0_mse: Mean squared error of x0_hat, normalized units.
        alpha: sqrt(alpha_bar) of the noise level.
        sigma: sqrt(1 - alpha_bar) of the noise level.
    """
    return (alpha / sigma) ** 2 * x0_mse


def data_ranges(stats: Mapping[str, Any]) -> Tensor:
    """The peak per band for PSNR and SSIM: from percentile 0.1 to 99.9 of the training pixels, (C,), physical units.

    The file type's range would flatter reflectances that fill a tenth of it, and one hot pixel would stretch min-max.
    """
    spans = []
    for name in stats["bands"]:
        band = stats["per_band"][name]
        span = float(band["percentiles"]["99.9"]) - float(band["percentiles"]["0.1"])
        spans.append(span if span > 0 else max(float(band["max"]) - float(band["min"]), 1.0))
    return torch.tensor(spans)


def of_batches(data_range: Tensor) -> dict[str, Callable[[Tensor, Batch], Tensor]]:
    """Every metric as a function (x0_hat, batch) -> (B, C).

    mse stays in normalized units, those that the gain over the linear filter is defined in; the others are in physical
    ones, so that they compare between normalizations.
    """

    def physical(metric: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Batch], Tensor]:
        def judge(x0_hat: Tensor, batch: Batch) -> Tensor:
            pred, target = denormalize(x0_hat.float(), batch.affine), denormalize(batch.x0, batch.affine)
            return metric(pred, target, batch.valid, data_range)

        return judge

    judges = {name: physical(metric) for name, metric in METRICS.items()}
    return {"mse": lambda x0_hat, batch: mse(x0_hat, batch.x0, batch.valid), **judges}


METRICS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
"""Metrics (pred, target, valid, data_range) -> (B, C) in physical units; a row here is a column in levels.csv."""
