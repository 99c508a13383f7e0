from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earthprior.chips.catalog import ChipRow
from earthprior.chips.loader import load_batches
from earthprior.chips.normalize import Affine, Normalizer, denormalize
from earthprior.chips.read import ChipSpec
from earthprior.errors import EarthPriorError
from earthprior.params import CLIP_PERCENTS, NormalizationParams
from support import stats_of

STRATEGIES = ("min_max", "z_value")
PROCEDURES = ("lab", "lpb", "gab", "gpb")
EVERY = [(strategy, procedure) for strategy in STRATEGIES for procedure in PROCEDURES]

# The tutorial's example: one chip of two bands, and global statistics.
CHIP = torch.tensor([[[[0, 100], [200, 400]], [[50, 150], [250, 1000]]]], dtype=torch.uint16)
EVERYWHERE = torch.ones(1, 2, 2, dtype=torch.bool)
STATS = {
    "bands": ["red", "nir"],
    "per_band": {
        "red": {"min": 0, "max": 500, "mean": 200, "std": 100},
        "nir": {"min": 50, "max": 1000, "mean": 400, "std": 300},
    },
    "all_bands": {"min": 0, "max": 1000, "mean": 300, "std": 250},
}


def make(strategy, procedure, stats=STATS, apply=True, clip_percent=0.0, clip_val=None):
    section = NormalizationParams(
        apply_normalization=apply,
        normal_strategy=strategy,
        stat_procedure=procedure,
        clip_percent=clip_percent,
        clip_val=clip_val,
    )
    return Normalizer(section, stats)


def some_chips(count=3, size=9, scale=900.0, seed=0):
    """Chips (count, 2, size, size) of unequal spread per band, masks with gaps; the last has one valid pixel."""
    generator = torch.Generator().manual_seed(seed)
    raw = scale * (1 + torch.randn(count, 2, size, size, generator=generator) * torch.tensor([0.2, 0.6]).view(2, 1, 1))
    valid = torch.rand(count, size, size, generator=generator) > 0.3
    valid[-1] = False
    valid[-1, 2, 3] = True
    return raw, valid


def by_numpy(raw, valid, strategy, procedure, clip_percent, clip_val):
    """The same by plain NumPy, in float64, chip by chip; NaN where invalid."""
    pixels = np.where(valid.numpy()[:, None], raw.numpy().astype(np.float64), np.nan)
    groups = {"lab": (1, 2, 3), "lpb": (2, 3), "gab": (0, 1, 2, 3), "gpb": (0, 2, 3)}[procedure]
    if clip_percent:
        pixels = pixels.clip(*np.nanpercentile(pixels, [clip_percent, 100 - clip_percent], axis=groups, keepdims=True))
    low, high = np.nanmin(pixels, groups, keepdims=True), np.nanmax(pixels, groups, keepdims=True)
    mean, std = np.nanmean(pixels, groups, keepdims=True), np.nanstd(pixels, groups, keepdims=True)
    offset, scale = (low, high - low) if strategy == "min_max" else (mean, std)
    x0 = (pixels - offset) / np.where(scale > 0, scale, 1.0)
    return x0 if clip_val is None else x0.clip(-clip_val, clip_val)


def stats_of_valid(raw, valid):
    """Statistics of the valid pixels of all chips."""
    return stats_of(raw.transpose(0, 1)[:, valid].T[:, :, None, None], ["red", "nir"])


@pytest.mark.parametrize(
    ("strategy", "procedure", "expected"),
    [
        ("min_max", "lab", [0, 0.1, 0.2, 0.4, 0.05, 0.15, 0.25, 1]),
        ("min_max", "lpb", [0, 0.25, 0.5, 1, 0, 0.105263, 0.210526, 1]),
        ("min_max", "gpb", [0, 0.2, 0.4, 0.8, 0, 0.105263, 0.210526, 1]),
        ("z_value", "lab", [-0.896028, -0.562622, -0.229216, 0.437595, -0.729325, -0.395919, -0.062514, 2.438029]),
        ("z_value", "gpb", [-2, -1, 0, 2, -1.166667, -0.833333, -0.5, 2]),
    ],
)
def test_values_of_the_tutorial(strategy, procedure, expected):
    x0, _ = make(strategy, procedure).normalize(CHIP, EVERYWHERE)
    torch.testing.assert_close(x0.flatten(), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gab_means_the_statistics_over_all_bands_pixels(strategy):
    # Deliberately not the tutorial's, which averages the bands' minima, maxima and means (0, .103, .241, ...).
    x0, _ = make(strategy, "gab").normalize(CHIP, EVERYWHERE)
    offset, scale = (0, 1000) if strategy == "min_max" else (300, 250)
    torch.testing.assert_close(x0, (CHIP.float() - offset) / scale)


@pytest.mark.parametrize(("strategy", "procedure"), EVERY)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32])
def test_the_inverse_gives_the_file_back(strategy, procedure, dtype):
    generator = torch.Generator().manual_seed(0)
    low, high = (-30_000, 30_000) if dtype == torch.int16 else (0, 255 if dtype == torch.uint8 else 65_000)
    raw = torch.randint(low, high, (3, 2, 8, 8), generator=generator).to(dtype)
    valid = torch.ones(3, 8, 8, dtype=torch.bool)
    normalizer = make(strategy, procedure, stats_of(raw.float(), ["red", "nir"]))
    x0, affine = normalizer.normalize(raw, valid)
    assert x0.dtype == torch.float32
    assert affine.offset.shape == affine.scale.shape == (3, 2, 1, 1)
    torch.testing.assert_close(denormalize(x0, affine), raw.float(), rtol=1e-5, atol=0.05)
    torch.testing.assert_close(denormalize(x0[1:2], affine[1:2]), raw[1:2].float(), rtol=1e-5, atol=0.05)


@pytest.mark.parametrize(("strategy", "procedure"), EVERY)
def test_normalized_chips_have_the_promised_statistics(strategy, procedure):
    generator = torch.Generator().manual_seed(0)
    raw = 500 + 100 * torch.randn(6, 2, 16, 16, generator=generator) * torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    x0, _ = make(strategy, procedure, stats_of(raw, ["red", "nir"])).normalize(raw, torch.ones(6, 16, 16).bool())
    groups = {"lab": x0.flatten(1), "lpb": x0.flatten(2).flatten(0, 1), "gab": x0.flatten()[None]}
    values = groups.get(procedure, x0.transpose(0, 1).flatten(1))
    if strategy == "min_max":
        torch.testing.assert_close(values.amin(1), torch.zeros(len(values)), rtol=0, atol=1e-5)
        torch.testing.assert_close(values.amax(1), torch.ones(len(values)), rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(values.mean(1), torch.zeros(len(values)), rtol=0, atol=1e-4)
        torch.testing.assert_close(values.std(1, correction=0), torch.ones(len(values)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize(("strategy", "procedure"), EVERY)
def test_what_lies_under_nodata_changes_nothing(strategy, procedure, apply):
    raw = (torch.rand(2, 2, 6, 6, generator=torch.Generator().manual_seed(0)) * 900).float()
    valid = torch.ones(2, 6, 6, dtype=torch.bool)
    valid[0, :2] = False
    normalizer = make(strategy, procedure, apply=apply)
    expected, affine = normalizer.normalize(raw, valid)
    for junk in (-1e30, 65_535.0, float("nan"), float("inf")):
        changed = raw.clone()
        changed[0, :, :2] = junk
        x0, other = normalizer.normalize(changed, valid)
        assert torch.equal(x0, expected)
        assert torch.equal(other.offset, affine.offset)
        assert torch.equal(other.scale, affine.scale)


@pytest.mark.parametrize(("strategy", "procedure"), EVERY)
def test_statistics_of_a_chip_are_those_of_its_valid_pixels(strategy, procedure):
    raw = (torch.rand(1, 2, 4, 8, generator=torch.Generator().manual_seed(0)) * 900).float()
    valid = torch.ones(1, 4, 8, dtype=torch.bool)
    valid[..., 4:] = False
    normalizer = make(strategy, procedure)
    half, _ = normalizer.normalize(raw[..., :4], valid[..., :4])
    whole, _ = normalizer.normalize(raw, valid)
    torch.testing.assert_close(whole[..., :4], half)


@pytest.mark.parametrize(("strategy", "procedure"), EVERY)
def test_invalid_pixels_hold_the_mean(strategy, procedure):
    raw = (torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 900).float()
    valid = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.3
    x0, affine = make(strategy, procedure).normalize(raw, valid)
    inside = valid[0]
    local = {"lab": raw[0][:, inside].mean().expand(2), "lpb": raw[0][:, inside].mean(1)}
    known = {"gab": torch.tensor([300.0, 300.0]), "gpb": torch.tensor([200.0, 400.0])}
    expected = {**local, **known}[procedure]
    filled = denormalize(x0, affine)[0][:, ~inside]
    torch.testing.assert_close(filled, expected[:, None].expand_as(filled))


@pytest.mark.parametrize(("strategy", "procedure"), EVERY)
@pytest.mark.parametrize("value", [0, 1, 3001, 65_535, 0.1234, 0.3])
def test_a_constant_chip_is_zero_where_its_own_statistics_rule(strategy, procedure, value):
    # 100,352 equal values: their float32 mean may be off in the last bit, by more than their spread, which is none.
    raw = torch.full((2, 2, 224, 224), value, dtype=torch.float64).to(torch.float32 if value % 1 else torch.uint16)
    x0, affine = make(strategy, procedure).normalize(raw, torch.ones(2, 224, 224, dtype=torch.bool))
    assert x0.isfinite().all()
    torch.testing.assert_close(denormalize(x0, affine), raw.float(), rtol=1e-5, atol=1e-4)
    if procedure in ("lab", "lpb"):
        assert torch.equal(x0, torch.zeros_like(x0))
        assert torch.equal(affine.scale, torch.ones_like(affine.scale))


@pytest.mark.parametrize(("strategy", "procedure"), EVERY)
def test_a_chip_without_a_valid_pixel_is_finite_and_harms_no_other(strategy, procedure):
    raw = (torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 900).float()
    raw[0] = float("nan")
    valid = torch.tensor([False, True]).view(2, 1, 1).expand(2, 4, 4)
    normalizer = make(strategy, procedure)
    x0, affine = normalizer.normalize(raw, valid)
    assert x0.isfinite().all()
    assert affine.scale.min() > 0
    torch.testing.assert_close(x0[1:], normalizer.normalize(raw[1:], valid[1:])[0])


def test_without_normalization_x0_is_physical():
    x0, affine = make("z_value", "gpb", apply=False).normalize(CHIP, EVERYWHERE)
    assert torch.equal(x0, CHIP.float())
    assert torch.equal(affine.offset, torch.zeros(1, 2, 1, 1))
    assert torch.equal(affine.scale, torch.ones(1, 2, 1, 1))


def test_bands_take_their_statistics_by_name_not_by_place():
    stats = {**STATS, "per_band": dict(reversed(STATS["per_band"].items()))}
    expected, _ = make("z_value", "gpb").normalize(CHIP, EVERYWHERE)
    assert torch.equal(make("z_value", "gpb", stats).normalize(CHIP, EVERYWHERE)[0], expected)


def test_a_chip_does_not_depend_on_its_batch():
    raw = (torch.rand(4, 2, 5, 5, generator=torch.Generator().manual_seed(0)) * 900).float()
    valid = torch.ones(4, 5, 5, dtype=torch.bool)
    for strategy, procedure in EVERY:
        normalizer = make(strategy, procedure)
        together, _ = normalizer.normalize(raw, valid)
        for index in range(4):
            alone, _ = normalizer.normalize(raw[index : index + 1], valid[index : index + 1])
            torch.testing.assert_close(together[index : index + 1], alone)


def test_an_affine_gives_out_some_chips():
    affine = Affine(torch.arange(3.0).view(3, 1, 1, 1), torch.arange(1.0, 4.0).view(3, 1, 1, 1))
    some = affine[torch.tensor([2, 0, 2])]
    assert some.offset.flatten().tolist() == [2, 0, 2]
    assert some.scale.flatten().tolist() == [3, 1, 3]


@pytest.mark.parametrize("clip_val", [None, 0.7])
@pytest.mark.parametrize("clip_percent", CLIP_PERCENTS)
@pytest.mark.parametrize(("strategy", "procedure"), EVERY)
def test_numpy_says_the_same_of_valid_pixels(strategy, procedure, clip_percent, clip_val):
    raw, valid = some_chips()
    normalizer = make(strategy, procedure, stats_of_valid(raw, valid), clip_percent=clip_percent, clip_val=clip_val)
    x0, affine = normalizer.normalize(raw.masked_fill(~valid[:, None], torch.nan), valid)
    expected = by_numpy(raw, valid, strategy, procedure, clip_percent, clip_val)
    inside = valid[:, None].expand_as(x0)
    np.testing.assert_allclose(x0[inside], expected[inside.numpy()], rtol=0, atol=2e-5)
    assert x0.isfinite().all()
    assert affine.scale.min() > 0


@pytest.mark.parametrize("clip_percent", [0.3, 5.0, 30.0])
@pytest.mark.parametrize("procedure", ["lab", "lpb"])
def test_a_whole_chip_is_cut_as_one_with_a_mask(procedure, clip_percent):
    # Chips without a gap take the way without masks.
    raw, _ = some_chips(size=17)
    everywhere = torch.ones(len(raw), 17, 17, dtype=torch.bool)
    x0, _ = make("min_max", procedure, clip_percent=clip_percent).normalize(raw, everywhere)
    expected = by_numpy(raw, everywhere, "min_max", procedure, clip_percent, None)
    np.testing.assert_allclose(x0, expected, rtol=0, atol=1e-5)
    assert (x0.min(), x0.max()) == (0, 1)
    padded = torch.nn.functional.pad(everywhere, (0, 3), value=False)
    again, _ = make("min_max", procedure, clip_percent=clip_percent).normalize(
        torch.nn.functional.pad(raw, (0, 3), value=-5e4), padded
    )
    assert torch.equal(again[..., :17], x0)


@pytest.mark.parametrize("clip_percent", [0.0, 2.0])
@pytest.mark.parametrize(("strategy", "procedure"), EVERY)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32, torch.float64])
def test_what_was_cut_comes_back_as_the_limit(strategy, procedure, dtype, clip_percent):
    raw, valid = some_chips(scale=90.0)
    raw = raw.clamp(0, 255).to(dtype)
    stats = stats_of_valid(raw.double(), valid)
    x0, affine = make(strategy, procedure, stats, clip_percent=clip_percent).normalize(raw, valid)
    found, physical = denormalize(x0, affine), raw.float()
    groups = {"lab": (1, 2, 3), "lpb": (2, 3), "gab": (0, 1, 2, 3), "gpb": (0, 2, 3)}[procedure]
    pixels = np.where(valid[:, None], physical, np.nan)
    limits = np.nanpercentile(pixels, [clip_percent, 100 - clip_percent], axis=groups, keepdims=True)
    expected = torch.from_numpy(physical.numpy().clip(*limits)).float()
    inside = valid[:, None].expand_as(found)
    torch.testing.assert_close(found[inside], expected[inside], rtol=1e-5, atol=1e-3)
    assert bool((expected != physical)[inside].any()) == (clip_percent > 0)


RANGES = [
    ("min_max", "lab", 0.0, None, (0, 1)),
    ("min_max", "lpb", 1.0, None, (0, 1)),
    ("min_max", "lpb", 0.0, 0.4, (0, 0.4)),
    ("min_max", "gpb", 0.0, None, None),
    ("min_max", "gab", 0.5, None, (0, 1)),
    ("min_max", "gpb", 0.0, 3.0, (-3, 3)),
    ("min_max", "gpb", 5.0, 3.0, (0, 1)),
    ("z_value", "lab", 0.0, None, None),
    ("z_value", "gpb", 2.0, None, None),
    ("z_value", "gab", 2.0, 1.5, (-1.5, 1.5)),
]


@pytest.mark.parametrize(("strategy", "procedure", "clip_percent", "clip_val", "expected"), RANGES)
def test_no_chip_leaves_the_range(strategy, procedure, clip_percent, clip_val, expected):
    raw, valid = some_chips()
    stats = stats_of_valid(raw, valid)
    normalizer = make(strategy, procedure, stats, clip_percent=clip_percent, clip_val=clip_val)
    assert normalizer.range == expected
    # Chips that the statistics never saw.
    x0, _ = normalizer.normalize(some_chips(count=20, scale=1300.0, seed=1)[0], torch.ones(20, 9, 9).bool())
    low, high = expected or (-torch.inf, torch.inf)
    assert low <= x0.min() < x0.max() <= high
    if procedure == "gpb" and expected is None:
        assert x0.max() > 1


def test_without_normalization_nothing_is_cut():
    normalizer = make("min_max", "lab", apply=False, clip_percent=5.0, clip_val=0.1)
    assert normalizer.range is None
    assert torch.equal(normalizer.normalize(CHIP, EVERYWHERE)[0], CHIP.float())
    # stats.json may lack the limits that nothing asks for.
    assert make("min_max", "gpb", apply=False, clip_percent=5.0).range is None


@pytest.mark.parametrize("procedure", ["gab", "gpb"])
def test_statistics_without_limits_are_refused_only_where_limits_are_needed(procedure):
    with pytest.raises(EarthPriorError, match=r"no limits for normalization\.clip_percent 2.*dvc repro stats"):
        make("z_value", procedure, clip_percent=2.0)
    make("z_value", procedure)
    make("z_value", "lpb", clip_percent=2.0)


NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, 65_535.0, -9999.0]), st.floats(-1e6, 1e6, width=32))


@settings(max_examples=60, deadline=None)
@given(
    pixels=st.lists(NUMBERS, min_size=8, max_size=8),
    holes=st.lists(st.booleans(), min_size=4, max_size=4),
    which=st.sampled_from(EVERY),
    clip_percent=st.sampled_from(CLIP_PERCENTS),
    clip_val=st.sampled_from([None, 0.5]),
)
def test_every_chip_is_finite_in_range_and_comes_back(pixels, holes, which, clip_percent, clip_val):
    raw = torch.tensor(pixels).view(1, 2, 2, 2)
    valid = torch.tensor(holes).view(1, 2, 2)
    normalizer = make(*which, stats_of(raw, ["red", "nir"]), clip_percent=clip_percent, clip_val=clip_val)
    x0, affine = normalizer.normalize(torch.where(valid[:, None], raw, torch.nan), valid)
    assert x0.isfinite().all()
    low, high = normalizer.range or (-torch.inf, torch.inf)
    assert low <= x0.min() <= x0.max() <= high
    if clip_val is None and not clip_percent:
        inside = valid[:, None].expand_as(x0)
        torch.testing.assert_close(denormalize(x0, affine)[inside], raw[inside], rtol=1e-4, atol=1.0)


def real_chips(folder, names):
    """Chips, masks and statistics of some real files."""
    rows = [ChipRow(place, "train", (name,), {}) for place, name in enumerate(names)]
    bands = 10 if "hls" in names[0] else 4
    spec = ChipSpec(tuple(f"b{band}" for band in range(bands)), 224, 0, None)
    (raw,) = load_batches(folder, rows, [range(len(rows))], spec, readers=1)
    pixels, valid = raw.pixels.clone(), raw.valid.clone()
    joined = pixels.float().transpose(0, 1)[:, valid].T[:, :, None, None]
    return pixels, valid, stats_of(joined, spec.bands)


@pytest.mark.parametrize("clip_percent", [0.0, 1.0])
@pytest.mark.parametrize(("strategy", "procedure"), EVERY)
@pytest.mark.parametrize("kind", ["hls", "prairie"])
def test_real_chips(real_data, kind, strategy, procedure, clip_percent):
    folder = real_data / {"hls": "quirks", "prairie": "naip_prairie_5m_224"}[kind]
    names = ["hls_10band_float32_nodata-9999_224.tif"]
    if kind == "prairie":
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tif"))[:3]
    pixels, valid, stats = real_chips(folder, names)
    normalizer = make(strategy, procedure, stats, clip_percent=clip_percent)
    x0, affine = normalizer.normalize(pixels, valid)
    assert x0.isfinite().all()
    inside = valid[:, None].expand_as(x0)
    if strategy == "min_max":
        assert (x0.min(), x0.max()) == pytest.approx((0, 1), abs=1e-6)
    else:
        assert abs(float(x0[inside].mean())) < 1e-3
    back, physical = denormalize(x0, affine), pixels.float()
    kept = (back - physical).abs() <= 1e-5 * affine.scale
    if clip_percent:
        assert 0.95 < float(kept[inside].float().mean()) < 1
    else:
        assert bool(kept[inside].all())
