"""metrics.py: closed forms, agreement with scikit-image, and no influence of what lies under nodata."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from earthprior import metrics
from earthprior.chips.batch import Batch
from earthprior.chips.normalize import Affine

RANGE = torch.tensor([2.0, 4.0])


def chips(seed: int = 0, batch: int = 3, size: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(batch, 2, size, size, generator=generator)
    pred = target + 0.3 * torch.randn(batch, 2, size, size, generator=generator)
    return pred, target, torch.ones(batch, 1, size, size, dtype=torch.bool)


def every(pred: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {name: metric(pred, target, valid, RANGE) for name, metric in metrics.METRICS.items()}
    return {"mse": metrics.mse(pred, target, valid), **found}


def test_mse_of_a_constant_offset_is_its_square() -> None:
    _, target, valid = chips()
    offset = torch.tensor([0.5, -2.0]).reshape(1, 2, 1, 1)
    assert torch.allclose(metrics.mse(target + offset, target, valid), torch.tensor([[0.25, 4.0]]).expand(3, 2))


def test_psnr_and_ssim_are_scikit_images_on_whole_chips() -> None:
    pred, target, valid = chips()
    psnr, ssim = metrics.psnr(pred, target, valid, RANGE), metrics.ssim(pred, target, valid, RANGE)
    for chip in range(3):
        for band in range(2):
            a, b, span = target[chip, band].numpy(), pred[chip, band].numpy(), float(RANGE[band])
            assert psnr[chip, band] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=span), abs=1e-4)
            assert ssim[chip, band] == pytest.approx(
                structural_similarity(a.astype(np.float64), b.astype(np.float64), data_range=span), abs=1e-5
            )


def test_a_pixel_under_nodata_changes_no_metric() -> None:
    pred, target, valid = chips()
    valid[:, :, 5:8, 11:14] = False
    before = every(pred, target, valid)
    for value in (1e9, -3.0, math.inf, math.nan):
        changed_pred, changed_target = pred.clone(), target.clone()
        changed_pred[:, :, 6, 12] = value
        changed_target[:, :, 7, 11] = -value
        after = every(changed_pred, changed_target, valid)
        for name in before:
            assert torch.equal(before[name], after[name]), name


def test_a_valid_pixel_changes_every_metric() -> None:
    pred, target, valid = chips()
    before = every(pred, target, valid)
    pred[:, :, 6, 12] += 1.0
    after = every(pred, target, valid)
    for name in before:
        assert (before[name] != after[name]).all(), name


def test_ssim_leaves_out_windows_that_touch_nodata() -> None:
    pred, target, valid = chips(size=21)
    valid[:, :, :, 10] = False
    left = metrics.ssim(pred[..., :10], target[..., :10], valid[..., :10], RANGE)
    right = metrics.ssim(pred[..., 11:], target[..., 11:], valid[..., 11:], RANGE)
    assert torch.allclose(metrics.ssim(pred, target, valid, RANGE), (left + right) / 2, atol=1e-6)


def test_chips_without_a_usable_pixel_are_nan_and_the_others_are_not() -> None:
    pred, target, valid = chips()
    valid[1] = False
    for name, values in every(pred, target, valid).items():
        assert values[1].isnan().all(), name
        assert values[[0, 2]].isfinite().all(), name


def test_an_exact_copy_stays_finite() -> None:
    _, target, valid = chips()
    assert (metrics.psnr(target, target, valid, RANGE) == metrics.PSNR_CEILING_DB).all()
    assert torch.allclose(metrics.ssim(target, target, valid, RANGE), torch.ones(3, 2))


def test_eps_mse_is_the_error_of_the_implied_noise() -> None:
    pred, target, valid = chips()
    alpha, sigma = 0.8, 0.6
    eps = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    xt = alpha * target + sigma * eps
    eps_hat = (xt - alpha * pred) / sigma
    expected = metrics.mse(eps_hat, eps, valid)
    x0_mse = metrics.mse(pred, target, valid)
    for got, want in zip(x0_mse.flatten().tolist(), expected.flatten().tolist(), strict=True):
        assert metrics.eps_mse(got, alpha, sigma) == pytest.approx(want, rel=1e-4)


def test_physical_metrics_undo_the_normalization_and_mse_does_not() -> None:
    pred, target, valid = chips()
    scale = torch.full((3, 2, 1, 1), 10.0)
    batch = Batch(target, valid, Affine(torch.full((3, 2, 1, 1), 100.0), scale))
    found = metrics.of_batches(RANGE * 10)
    assert torch.equal(found["mse"](pred, batch), metrics.mse(pred, target, valid))
    assert torch.allclose(found["psnr"](pred, batch), metrics.psnr(pred, target, valid, RANGE), atol=1e-3)


def test_data_range_is_from_low_to_high_percentile_and_never_zero() -> None:
    stats = {
        "bands": ["a", "b"],
        "per_band": {
            "a": {"percentiles": {"0.1": 10, "99.9": 250}, "min": 0, "max": 255},
            "b": {"percentiles": {"0.1": 7, "99.9": 7}, "min": 7, "max": 7},
        },
    }
    assert metrics.data_ranges(stats).tolist() == [240.0, 1.0]
