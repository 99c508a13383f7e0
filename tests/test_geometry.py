"""Random views, measured: ramps say where each pixel of a view looks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from earthprior.chips.geometry import random_view
from earthprior.chips.selection import AS_THEY_ARE
from earthprior.params import AugmentationParams

QUARTERS = (0.0, 90.0, 180.0, 270.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def view(x0, size=None, seed=0, valid=None, **changes):
    section = AugmentationParams(**{**AS_THEY_ARE.model_dump(), **changes})
    if valid is None:
        valid = torch.ones(len(x0), 1, *x0.shape[-2:], dtype=torch.bool)
    return random_view(x0, valid, size or x0.shape[-1], section, seeded(seed))[:2]


def ramps(count, size=48):
    """Chips (count, 2, size, size) whose bands are x and y; torch's cubic blend keeps them to 0.05."""
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    return torch.stack([x, y]).expand(count, -1, -1, -1).contiguous()


def looks(views, valid, inner=2.0, side=48):
    """Per view the matrix (2, 2) and centre (2,) of the affine map from its pixels to the chip, and its largest error.

    Fitted where the view looks `inner` px inside the chip, free of mirror images.
    """
    size = views.shape[-1]
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    down, across = torch.meshgrid(offsets, offsets, indexing="ij")
    design = torch.stack([across, down, torch.ones_like(down)], dim=-1).view(-1, 3)
    matrices, centres, errors = [], [], []
    for seen, sound in zip(views.double(), valid[:, 0], strict=True):
        good = (sound & ((seen >= inner) & (seen <= side - 1 - inner)).all(0)).flatten()
        target = seen.flatten(1).T[good]
        fit = torch.linalg.lstsq(design[good], target).solution
        matrices.append(fit[:2].T)
        centres.append(fit[2])
        errors.append((design[good] @ fit - target).abs().max())
    return torch.stack(matrices), torch.stack(centres), torch.stack(errors)


@pytest.mark.parametrize("turns", [-270, -180, -90, 0, 90, 180, 270, 360])
def test_quarter_turns_are_counter_clockwise_and_exact(turns):
    x0 = torch.rand(3, 2, 9, 9, generator=seeded())
    valid = torch.rand(3, 1, 9, 9, generator=seeded()) > 0.3
    views, mask = view(x0, valid=valid, rotation_degree=(float(turns),))
    assert torch.equal(views, torch.rot90(x0, turns // 90, (-2, -1)))
    assert torch.equal(mask, torch.rot90(valid, turns // 90, (-2, -1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int16, torch.uint8])
def test_moves_keep_the_dtype_and_the_bits(dtype):
    x0 = torch.arange(36).view(1, 1, 6, 6).to(dtype)
    views, _ = view(x0, 4, flip=True, rotation_degree=QUARTERS, crop_strategy="center")
    assert views.dtype == dtype
    assert sorted(views.flatten().tolist()) == sorted(x0[..., 1:5, 1:5].flatten().tolist())


def test_an_odd_angle_turns_counter_clockwise_too():
    views, valid = view(ramps(1), 20, rotation_degree={"low": 30.0, "high": 30.0})
    matrix, _, error = looks(views, valid)
    # What the view shows to its right lies in the chip 30 degrees below the right (y down): the content turned up.
    assert matrix[0, :, 0].tolist() == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)], abs=1e-3)
    assert error.max() < 0.06


def _views(chip):
    turned = [torch.rot90(chip, turns, (-2, -1)) for turns in range(4)]
    return turned + [view.flip(-1) for view in turned]


@pytest.mark.parametrize(
    ("flip", "turns", "group"),
    [
        (True, QUARTERS, range(8)),
        (True, (-180.0, -90.0, 90.0, 180.0), range(8)),
        (False, QUARTERS, range(4)),
        (True, None, (0, 2, 4, 6)),
        (False, (90.0, 270.0), (1, 3)),
    ],
)
def test_flips_and_turns_are_exact_and_equally_frequent(flip, turns, group):
    chip = torch.arange(2 * 9, dtype=torch.float32).view(2, 3, 3)
    views, _ = view(chip.expand(1600, -1, -1, -1).contiguous(), flip=flip, rotation_degree=turns)
    counts = [int((views == one).flatten(1).all(1).sum()) for one in _views(chip)]
    assert sum(counts) == 1600, "an exact copy of one of the eight, all bands alike"
    assert [index for index, count in enumerate(counts) if count] == list(group)
    expected = 1600 / len(group)
    assert all(abs(counts[index] - expected) < 5 * math.sqrt(expected) for index in group)


def test_crops_and_shifts_are_those_of_slicing():
    rng = np.random.default_rng(0)
    chip = rng.normal(size=(2, 20, 20)).astype(np.float32)
    x0 = torch.from_numpy(chip).expand(400, -1, -1, -1).contiguous()
    views, valid = view(x0, 8, patch_shift_px=3)
    # Shifted by at most 3 px over an edge: the mirror image there, and invalid.
    padded = np.pad(chip, ((0, 0), (3, 3), (3, 3)), mode="symmetric")
    inside = np.pad(np.ones((20, 20), bool), 3)
    _, centres, _ = looks(*view(ramps(400, 20), 8, patch_shift_px=3), inner=0, side=20)
    origins = (centres - 3.5).round().long()
    for seen, mask, (x, y) in zip(views, valid, origins.tolist(), strict=True):
        window = (slice(y + 3, y + 11), slice(x + 3, x + 11))
        assert np.array_equal(seen.numpy(), padded[:, *window])
        assert np.array_equal(mask[0].numpy(), inside[window])
    assert (int(origins.min()), int(origins.max())) == (-3, 15)


def test_random_crops_reach_every_place_equally():
    x0 = torch.arange(6.0).view(1, 1, 1, 6).expand(3000, 1, 6, 6).contiguous()
    for axis in (x0, x0.mT.contiguous()):
        counts = torch.bincount(view(axis, 4)[0][:, 0, 0, 0].long(), minlength=3)
        assert counts.tolist() == pytest.approx([1000] * 3, abs=120)


def test_shifts_are_whole_pixels_all_equally_likely_each_way():
    _, centres, _ = looks(*view(ramps(1500, 12), 4, crop_strategy="center", patch_shift_px=2), inner=0, side=12)
    steps = centres - 5.5
    assert (steps - steps.round()).abs().max() < 1e-4
    for direction in steps.round().long().T:
        assert torch.bincount(direction + 2, minlength=5).tolist() == pytest.approx([300] * 5, abs=80)
    assert abs(np.corrcoef(steps.T.numpy())[0, 1]) < 0.1


@pytest.mark.parametrize("shift", [1, 30, 500])
def test_a_shift_of_any_length_shows_finite_pixels_and_says_which_are_the_chips(shift):
    x0 = torch.rand(20, 1, 8, 8, generator=seeded())
    for changes in ({}, {"scale_factor": (1.0, 1.0)}):
        views, valid = view(x0, patch_shift_px=shift, **changes)
        assert views.isfinite().all()
        assert valid.float().mean() < 0.99


def test_angles_of_a_range_are_uniform():
    matrix, _, _ = looks(*view(ramps(600), 12, rotation_degree={"low": -15.0, "high": 45.0}))
    angles = torch.rad2deg(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0])).sort().values
    assert angles.min() > -15.01
    assert angles.max() < 45.01
    # Kolmogorov and Smirnov's distance; above 1.63 / sqrt(n) once in a hundred times.
    uniform = (angles + 15) / 60
    assert (uniform - torch.arange(600) / 600).abs().max() < 1.63 / math.sqrt(600)


def test_angles_of_a_list_are_equally_frequent():
    matrix, _, _ = looks(*view(ramps(600), 12, rotation_degree=(0.0, 45.0, -120.0)))
    angles = torch.rad2deg(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0])).round().long()
    assert dict(zip(*(part.tolist() for part in angles.unique(return_counts=True)), strict=True)) == {
        -120: pytest.approx(200, abs=60),
        0: pytest.approx(200, abs=60),
        45: pytest.approx(200, abs=60),
    }


def test_zooms_and_flips_are_uniform_and_independent():
    matrix, _, _ = looks(*view(ramps(800), 12, flip=True, scale_factor=(0.5, 2.0)))
    assert matrix[:, 0, 1].abs().max() < 1e-4
    zooms = 1 / matrix[:, 0, 0].abs()
    torch.testing.assert_close(zooms, 1 / matrix[:, 1, 1].abs(), rtol=0.01, atol=0)
    uniform = (zooms.sort().values - 0.5) / 1.5
    assert (uniform - torch.arange(800) / 800).abs().max() < 1.63 / math.sqrt(800)
    signs = (matrix[:, 0, 0] < 0).long() * 2 + (matrix[:, 1, 1] < 0).long()
    assert torch.bincount(signs, minlength=4).tolist() == pytest.approx([200] * 4, abs=65)


def test_places_spread_over_all_the_room_and_views_stay_inside():
    views, valid = view(ramps(800), 12, rotation_degree={"low": -180.0, "high": 180.0}, scale_factor=(0.8, 1.5))
    matrix, centres, _ = looks(views, valid)
    reach = 6 * matrix.abs().sum(2)
    assert (centres - reach).min() > -0.51
    assert (centres + reach).max() < 47.51
    # 0 where the view touches the chip's first row or column, 1 at the last; less than a pixel at either end is unused.
    share = (centres + 0.5 - reach) / (48 - 2 * reach)
    assert share.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.05)
    assert share.std(0).tolist() == pytest.approx([12**-0.5] * 2, abs=0.03)


def test_in_the_centre_a_turned_and_zoomed_view_looks_at_the_middle():
    everything = {"rotation_degree": {"low": -180.0, "high": 180.0}, "scale_factor": (0.5, 2.0)}
    _, centres, _ = looks(*view(ramps(100), 12, crop_strategy="center", **everything))
    assert (centres - 23.5).abs().max() < 0.51


def smooth(x, y):
    return torch.sin(0.35 * x) + torch.cos(0.3 * y + 1) + 0.5 * torch.sin(0.2 * (x + y))


def test_all_of_it_is_one_resampling():
    """What a view shows is the chip where the measured map says, blended of the 4 x 4 px around and of no more."""
    x0 = ramps(40, 64)
    dot = torch.zeros_like(x0[:, :1])
    dot[..., 32, 30] = 1.0
    chips = torch.cat([x0, smooth(x0[:, :1], x0[:, 1:]), dot], dim=1)
    everything = {"flip": True, "rotation_degree": {"low": -180.0, "high": 180.0}, "scale_factor": (0.9, 1.6)}
    views, valid = view(chips, 40, patch_shift_px=5, **everything)
    matrix, centres, errors = looks(views[:, :2], valid, side=64)
    assert errors.max() < 0.06
    offsets = torch.arange(40, dtype=torch.float64) - 19.5
    down, across = torch.meshgrid(offsets, offsets, indexing="ij")
    where = torch.einsum("bij,jhw->bihw", matrix, torch.stack([across, down])) + centres[:, :, None, None]

    inside = ((where >= 2) & (where <= 61)).all(1, keepdim=True)
    error = (views[:, 2:3] - smooth(where[:, :1], where[:, 1:])).abs()[inside]
    assert error.square().mean().sqrt() < 0.02
    away = (where - torch.tensor([30.0, 32.0])[:, None, None]).abs().amax(1, keepdim=True)
    assert (views[:, 3:][away > 2.02] == 0).all()
    assert (views[:, 3:][away < 0.9] > 0).all()
    assert views[:, 3:].min() < -0.05, "a cubic blend, which sharpens what a linear one would blur"
    edge = torch.minimum(where, 63 - where).amin(1, keepdim=True)
    assert 0.5 < valid.float().mean() < 1
    assert valid[edge > 0.02].all()
    assert not valid[edge < -0.02].any()


@pytest.mark.parametrize("strategy", ["random", "center"])
def test_resampling_what_could_be_moved_agrees_with_moving_it(strategy):
    x0 = torch.rand(32, 2, 21, 21, generator=seeded())
    options = {"flip": True, "rotation_degree": QUARTERS, "crop_strategy": strategy, "patch_shift_px": 4}
    moved, moved_valid = view(x0, 10, **options)
    blended, valid = view(x0, 10, scale_factor=(1.0, 1.0), **options)
    assert torch.equal(valid, moved_valid)
    torch.testing.assert_close(blended, moved, rtol=0, atol=1e-3)


def test_plain_views_of_a_mixed_list_are_not_blurred():
    x0 = torch.rand(64, 1, 24, 24, generator=seeded())
    mixed, _ = view(x0, 9, rotation_degree=(0.0, 45.0))
    # Draws are the same: the same half of the chips is turned, by 90 degrees here, and the others are not.
    plain, _ = view(x0, 9, rotation_degree=(0.0, 90.0))
    close = (mixed - plain).abs().amax((1, 2, 3)) < 1e-3
    assert 16 < int(close.sum()) < 48


@pytest.mark.parametrize("changes", [{"flip": True}, {"rotation_degree": QUARTERS}, {"patch_shift_px": 2}, {}])
def test_chip_and_mask_move_together(changes):
    valid = torch.rand(8, 1, 12, 12, generator=seeded(5)) > 0.3
    for seed in range(5):
        views, mask = view(valid.float(), 7, seed, valid, crop_strategy="random", **changes)
        assert torch.equal(mask, views == 1) or "patch_shift_px" in changes
        assert (views[mask] == 1).all()


@pytest.mark.parametrize(
    "changes",
    [{"scale_factor": (0.5, 0.9)}, {"scale_factor": (1.1, 2.0)}, {"rotation_degree": {"low": -180.0, "high": 180.0}}],
)
def test_a_blended_pixel_is_valid_only_where_all_that_it_is_made_of_is(changes):
    valid = torch.rand(64, 1, 24, 24, generator=seeded(5)) > 0.03
    views, mask = view(valid.float(), 8, valid=valid, **changes)
    # Valid pixels are blends of ones alone, up to 1e-3 of an invalid one, which counts as none.
    assert 0.2 < mask.float().mean() < 1
    assert (views[mask] - 1).abs().max() < 2e-3


def test_what_lies_under_an_invalid_pixel_reaches_no_valid_one():
    x0 = torch.rand(32, 1, 24, 24, generator=seeded(1))
    valid = torch.rand(32, 1, 24, 24, generator=seeded(5)) > 0.03
    options = {"scale_factor": (0.8, 1.5), "rotation_degree": {"low": -180.0, "high": 180.0}, "valid": valid}
    views, mask = view(x0, 10, **options)
    other, _ = view(torch.where(valid, x0, 1e3), 10, **options)
    assert (views - other)[mask].abs().max() < 1.5, "at most a thousandth of the junk"
    assert (views - other).abs().max() > 100


def test_a_zoom_out_of_the_chip_is_invalid_there_and_only_there():
    views, valid = view(torch.ones(4, 1, 16, 16), scale_factor=(0.5, 0.5))
    # The chip's 16 px take up 8 in the middle.
    assert valid.flatten(1).sum(1).tolist() == [64] * 4
    assert valid[..., 4:12, 4:12].all()
    assert views.isfinite().all()


@pytest.mark.parametrize("size", [8, 9])
def test_zoom_1_is_a_plain_crop(size):
    x0 = torch.rand(3, 2, size, size, generator=seeded())
    views, valid = view(x0, scale_factor=(1.0, 1.0))
    torch.testing.assert_close(views, x0, rtol=0, atol=1e-5)
    assert valid.all()


@pytest.mark.parametrize(
    "options", [{"flip": True, "rotation_degree": QUARTERS}, {"rotation_degree": (30.0,)}, {"scale_factor": (0.5, 2.0)}]
)
def test_a_raster_goes_where_its_chip_goes(options):
    classes = torch.arange(24).repeat_interleave(2).expand(8, 1, 48, 48).to(torch.int16).contiguous()
    valid = torch.ones(8, 1, 48, 48, dtype=torch.bool)
    section = AugmentationParams(**{**AS_THEY_ARE.model_dump(), "patch_shift_px": 20, **options})
    views, mask, seen = random_view(classes.float(), valid, 32, section, seeded(3), {"label": classes}, -1)
    label = seen["label"]
    assert label.dtype == torch.int16
    assert (label[~mask] == -1).any()
    # Values rise by one each two pixels, so that the nearest one is less than one off what was blended.
    inside = mask & (label >= 0)
    assert inside.sum() > 0.3 * mask.numel()
    assert (views[inside] - label[inside]).abs().max() <= 1
    assert ((label == -1) <= ~mask).all()
