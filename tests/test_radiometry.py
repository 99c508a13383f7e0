"""Random brightness: the stated amounts, on valid pixels only."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from earthprior.chips.radiometry import PATCH_SIDES, random_radiometry
from earthprior.chips.selection import AS_THEY_ARE
from earthprior.params import AugmentationParams

KEYS = {
    "contrast_range": (1.5, 2.0),
    "br_range": (0.3, 0.4),
    "bshift_gamma_range": (0.3, 0.6),
    "patch_gamma_range": (0.3, 0.6),
    "sigma_range": (0.1, 0.2),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def changed(x0, valid=None, seed=0, **changes):
    valid = torch.ones(len(x0), 1, *x0.shape[-2:], dtype=torch.bool) if valid is None else valid
    return random_radiometry(x0, valid, AugmentationParams(**{**AS_THEY_ARE.model_dump(), **changes}), seeded(seed))


def views(count=64, bands=3, size=6):
    return torch.rand(count, bands, size, size, generator=seeded(7)) * 3 - 1


def ks_distance(draws, bounds):
    """How far the draws are from uniform between the bounds (Kolmogorov and Smirnov), in its 1 % quantile."""
    uniform = (draws.sort().values - bounds[0]) / (bounds[1] - bounds[0])
    return float((uniform - torch.arange(len(draws)) / len(draws)).abs().max()) * math.sqrt(len(draws)) / 1.63


@pytest.mark.parametrize("key", KEYS)
def test_every_change_sees_and_changes_valid_pixels_only(key):
    x0, valid = views(), torch.rand(64, 1, 6, 6, generator=seeded(5)) > 0.3
    inside = valid.expand_as(x0)
    view = changed(x0, valid, **{key: KEYS[key]})
    assert torch.equal(view[~inside], x0[~inside])
    assert not torch.equal(view[inside], x0[inside])
    junk = torch.where(valid, x0, 1e4)
    assert torch.equal(changed(junk, valid, **{key: KEYS[key]})[inside], view[inside])


@pytest.mark.parametrize("key", KEYS)
def test_constant_and_empty_views_stay_finite(key):
    constant = torch.full((2, 2, 6, 6), 0.7)
    view = changed(constant, **{key: KEYS[key]})
    assert view.isfinite().all()
    if "gamma" in key or key == "contrast_range":
        torch.testing.assert_close(view, constant)
    nothing = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    assert torch.equal(changed(constant, nothing, **KEYS), constant)
    one = nothing.clone()
    one[:, :, 2, 3] = True
    assert changed(views(2, 2), one, **KEYS).isfinite().all()


def test_brightness_is_added_to_all_bands_alike():
    x0 = views(800)
    added = changed(x0, br_range=(-0.1, 0.3)) - x0
    assert added.flatten(1).std(1).max() < 1e-6, "one brightness per view"
    assert ks_distance(added[:, 0, 0, 0], (-0.1, 0.3)) < 1


def test_contrast_is_about_the_views_own_mean_per_band():
    x0 = views(800)
    view = changed(x0, contrast_range=(0.5, 2.0))
    torch.testing.assert_close(view.mean((2, 3)), x0.mean((2, 3)), atol=1e-5, rtol=0)
    factors = view.std((2, 3)) / x0.std((2, 3))
    assert (factors - factors[:, :1]).abs().max() < 1e-4, "one contrast per view"
    assert ks_distance(factors[:, 0], (0.5, 2.0)) < 1


def test_gamma_keeps_the_extremes_and_is_uniform_in_the_logarithm():
    x0 = views(800)
    view = changed(x0, bshift_gamma_range=(0.25, 4.0))
    for extreme in (torch.amin, torch.amax):
        torch.testing.assert_close(extreme(view, (2, 3)), extreme(x0, (2, 3)), atol=1e-5, rtol=0)
    low, high = x0.amin((2, 3), keepdim=True), x0.amax((2, 3), keepdim=True)
    before, after = (x0 - low) / (high - low), (view - low) / (high - low)
    middle = (before > 0.2) & (before < 0.8)
    gammas = torch.where(middle, after.log() / before.log(), torch.nan)
    per_view = gammas.flatten(1).nanmedian(1).values
    assert (gammas - per_view[:, None, None, None])[middle].abs().max() < 0.02, "one gamma per view"
    assert ks_distance(per_view.log(), (math.log(0.25), math.log(4.0))) < 1


def test_gamma_above_1_darkens_and_below_1_brightens():
    x0 = views()
    assert (changed(x0, bshift_gamma_range=(2.0, 2.0)) <= x0 + 1e-6).all()
    assert (changed(x0, bshift_gamma_range=(0.5, 0.5)) >= x0 - 1e-6).all()


def test_the_patch_is_one_turned_rectangle():
    size = 64
    # Halves of black and white would not show it: gamma leaves the extremes.
    x0 = torch.full((200, 1, size, size), 0.5)
    x0[..., 0, 0], x0[..., -1, -1] = 0.0, 1.0
    view = changed(x0, patch_gamma_range=(2.0, 2.0))
    patch = ((view - 0.25).abs() < 1e-5)[:, 0]
    assert ((view == x0) | ((view - 0.25).abs() < 1e-5))[:, 0].all()
    shares = patch.float().mean((1, 2))
    assert shares.min() > 0
    assert shares.max() <= PATCH_SIDES[1] ** 2 + 0.01
    assert shares.std() > 0.03
    middles, slopes, spans = [], [], []
    for rows, columns in (np.nonzero(one) for one in patch.numpy()):
        middles.append((columns.mean(), rows.mean()))
        covariance = np.cov(np.stack([columns, rows]))
        values, vectors = np.linalg.eigh(covariance)
        slopes.append(math.degrees(math.atan2(*vectors[::-1, 1])) % 180)
        spans.append(math.sqrt(12 * values[1]))
        # A rectangle's pixels fill its own bounds; cut by the view's edge, at most that many.
        along = np.stack([columns, rows]).T @ vectors
        assert len(rows) <= np.prod(np.ptp(along, axis=0) + 1.5)
    assert np.allclose(np.mean(middles, axis=0), (size - 1) / 2, atol=4)
    askew = np.minimum(np.mod(slopes, 90), 90 - np.mod(slopes, 90))
    assert np.mean(askew > 15) > 0.5
    assert np.histogram(slopes, 4, (0, 180))[0].min() > 25
    assert max(spans) < 1.1 * PATCH_SIDES[1] * size


def test_the_patch_of_a_view_is_solid():
    x0 = views(50, 1, 32)
    touched = (changed(x0, patch_gamma_range=(3.0, 3.0)) - x0).abs()[:, 0] > 1e-4
    for one in touched.numpy():
        rows, columns = np.nonzero(one)
        inner = one[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert inner.mean() > 0.35


def test_noise_is_white_and_its_sigma_uniform():
    x0 = torch.zeros(500, 2, 32, 32)
    noise = changed(x0, sigma_range=(0.1, 0.5))
    sigmas = noise.flatten(1).std(1)
    assert ks_distance(sigmas, (0.1, 0.5)) < 1.05
    assert abs(float((noise / sigmas[:, None, None, None]).mean())) < 0.01
    neighbours = (noise[..., 1:] * noise[..., :-1]).flatten(1).mean(1) / sigmas**2
    assert abs(float(neighbours.mean())) < 0.01
    bands = (noise[:, 0] * noise[:, 1]).flatten(1).mean(1) / sigmas**2
    assert abs(float(bands.mean())) < 0.01


def test_contrast_comes_before_brightness_gamma_and_noise():
    x0 = views()
    fixed = {"contrast_range": (2.0, 2.0), "br_range": (0.5, 0.5), "bshift_gamma_range": (2.0, 2.0)}
    mean = x0.mean((2, 3), keepdim=True)
    stretched = mean + (x0 - mean) * 2 + 0.5
    low, high = stretched.amin((2, 3), keepdim=True), stretched.amax((2, 3), keepdim=True)
    expected = low + (high - low) * ((stretched - low) / (high - low)) ** 2
    torch.testing.assert_close(changed(x0, **fixed), expected, atol=1e-5, rtol=1e-5)
    noise = changed(x0, sigma_range=(0.1, 0.1)) - x0
    torch.testing.assert_close(changed(x0, **fixed, sigma_range=(0.1, 0.1)), expected + noise, atol=1e-5, rtol=1e-5)
