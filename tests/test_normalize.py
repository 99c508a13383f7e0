from __future__ import annotations

import pytest
import torch

from earthprior.chips.normalize import Affine, Normalizer, denormalize
from earthprior.params import NormalizationParams
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


def make(strategy, procedure, stats=STATS, apply=True):
    section = NormalizationParams(apply_normalization=apply, normal_strategy=strategy, stat_procedure=procedure)
    return Normalizer(section, stats)


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
