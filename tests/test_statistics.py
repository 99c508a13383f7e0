"""Streaming statistics equal those of all pixels at once."""

from __future__ import annotations

import numpy as np
import pytest

from earthprior.chips.statistics import PERCENTILES, BandStatistics, merged, summarize
from earthprior.params import CLIP_PERCENTS

RANDOM = np.random.default_rng(0)


def statistics_of(chips, dtype) -> BandStatistics:
    band = BandStatistics(dtype)
    for chip in chips:
        band.add(summarize(chip))
    return band


@pytest.mark.parametrize(("dtype", "low", "high"), [("uint8", 0, 255), ("uint16", 0, 65535), ("int16", -32768, 32767)])
def test_integers_are_exact(dtype, low, high):
    chips = [RANDOM.integers(low, high, size, endpoint=True).astype(dtype) for size in (1, 7, 5000, 333)]
    whole = np.concatenate(chips).astype(np.float64)
    found = statistics_of(chips, dtype).to_json()
    assert found["count"] == whole.size
    assert (found["min"], found["max"]) == (whole.min(), whole.max())
    assert found["mean"] == pytest.approx(whole.mean(), rel=1e-14)
    assert found["std"] == pytest.approx(whole.std(), rel=1e-13)
    for percent in PERCENTILES:
        assert found["percentiles"][f"{percent:g}"] == pytest.approx(np.percentile(whole, percent), rel=1e-12)


@pytest.mark.parametrize(("dtype", "low", "high"), [("uint8", 0, 9), ("uint16", 0, 65535), ("int16", -32768, 32767)])
@pytest.mark.parametrize("sizes", [(1,), (7, 2), (5000, 333)])
def test_clipped_integers_are_exact(dtype, low, high, sizes):
    chips = [RANDOM.integers(low, high, size, endpoint=True).astype(dtype) for size in sizes]
    whole = np.concatenate(chips).astype(np.float64)
    found = statistics_of(chips, dtype).to_json()
    assert set(found["clipped"]) == {f"{percent:g}" for percent in CLIP_PERCENTS if percent}
    for key, clipped in found["clipped"].items():
        limits = np.percentile(whole, [float(key), 100 - float(key)])
        expected = whole.clip(*limits)
        assert [clipped["min"], clipped["max"]] == pytest.approx(limits, rel=1e-12)
        assert (clipped["mean"], clipped["std"]) == pytest.approx((expected.mean(), expected.std()), rel=1e-12)
        assert clipped["min"] == found["percentiles"][key]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4, 1e30])
def test_clipped_floats_are_as_near_as_their_bins(scale):
    chips = [(scale * RANDOM.normal(0.2, 0.1, size)).astype(np.float32) for size in (1, 5000, 8000)]
    # What clipping is for.
    chips.append(np.array([1e6 * scale, -1e6 * scale], np.float32))
    whole = np.concatenate(chips).astype(np.float64)
    for key, clipped in statistics_of(chips, "float32").to_json()["clipped"].items():
        expected = whole.clip(*np.percentile(whole, [float(key), 100 - float(key)]))
        nearness = 1e-3 * scale
        assert clipped["min"] == pytest.approx(expected.min(), abs=nearness)
        assert clipped["max"] == pytest.approx(expected.max(), abs=nearness)
        assert clipped["mean"] == pytest.approx(expected.mean(), abs=nearness)
        assert clipped["std"] == pytest.approx(expected.std(), abs=nearness)


@pytest.mark.parametrize(("dtype", "value"), [("uint8", 3), ("float32", 0.1), ("float32", -1e30)])
def test_a_clipped_constant_has_no_spread(dtype, value):
    chip = np.full(1000, value, dtype)
    for clipped in statistics_of([chip] * 3, dtype).to_json()["clipped"].values():
        assert clipped == {"min": chip[0], "max": chip[0], "mean": chip[0], "std": 0.0}


def test_a_small_spread_on_a_large_mean_survives():
    chips = [np.full(10_000, 65_000, np.uint16), np.full(10_000, 65_001, np.uint16)]
    assert statistics_of(chips, "uint16").to_json()["std"] == 0.5
    constant = statistics_of(chips[:1], "uint16").to_json()
    assert (constant["std"], constant["mean"]) == (0.0, 65_000.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4, 1e30])
def test_floats(dtype, scale):
    chips = [(scale * RANDOM.normal(0.2, 1.0, size)).astype(dtype) for size in (1, 5000, 8000)]
    whole = np.concatenate(chips).astype(np.float64)
    found = statistics_of(chips, dtype).to_json()
    assert found["count"] == whole.size
    assert found["mean"] == pytest.approx(whole.mean(), rel=1e-6)
    assert found["std"] == pytest.approx(whole.std(), rel=1e-6)
    assert found["min"] == pytest.approx(whole.min(), rel=1e-7)
    for percent in PERCENTILES:
        # A rank lies between two pixels, each within a bin of 1/2048 of its value.
        allowed = abs(np.percentile(whole, percent)) / 1000 + scale * 1e-3
        assert found["percentiles"][f"{percent:g}"] == pytest.approx(np.percentile(whole, percent), abs=allowed)


def test_float_percentiles_ascend_and_stay_inside():
    values = np.array([-3.0, -0.0, 0.0, 1e-38, 2.5, 2.5, 1e20], np.float32)
    found = statistics_of([values], "float32").to_json()
    levels = list(found["percentiles"].values())
    assert levels == sorted(levels)
    assert levels[0] >= -3.0
    assert levels[-1] <= found["max"]


def test_all_bands_is_the_union():
    first, second = RANDOM.integers(0, 100, 500).astype(np.uint8), RANDOM.integers(50, 255, 900).astype(np.uint8)
    whole = merged([statistics_of([first], "uint8"), statistics_of([second], "uint8")]).to_json()
    both = np.concatenate([first, second])
    assert whole["count"] == 1400
    assert whole["mean"] == pytest.approx(both.mean())
    assert whole["std"] == pytest.approx(both.std())
    clipped = both.clip(*np.percentile(both, [5, 95]))
    assert whole["clipped"]["5"]["mean"] == pytest.approx(clipped.mean())


def test_merged_floats_equal_the_union():
    first, second = RANDOM.normal(1, 2, 500).astype(np.float32), RANDOM.normal(9, 1, 900).astype(np.float32)
    whole = merged([statistics_of([first], "float32"), statistics_of([second], "float32")]).to_json()
    assert whole["std"] == pytest.approx(np.concatenate([first, second]).std(), rel=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_histogram_is_a_density(dtype):
    values = RANDOM.normal(120, 20, 100_000).clip(0, 255).astype(dtype)
    points = statistics_of([values], dtype).histogram(128)
    centres = np.array([centre for centre, _ in points])
    densities = np.array([density for _, density in points])
    assert len(points) <= 130
    width = np.diff(centres)
    assert width.max() == pytest.approx(width.min())
    # All but the tails beyond the percentiles 0.1 and 99.9.
    assert 0.995 < densities.sum() * width[0] <= 1.0 + 1e-9
    assert centres[densities.argmax()] == pytest.approx(120, abs=10)


def test_histogram_of_a_constant_band():
    for dtype in ("uint8", "float32"):
        points = statistics_of([np.full(10, 5, dtype)], dtype).histogram(128)
        assert all(np.isfinite(point).all() for point in points)
        assert sum(density > 0 for _, density in points) == 1
