from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from earthprior.chips.augment import augment, centre_crop, grid_crops, grid_origins
from earthprior.params import AugmentationParams
from support import make_batch

NOTHING = {
    "flip": False, "rotate_90": False, "scale_factor": None, "br_range": None, "contrast_range": None,
    "crop_strategy": "random",
}  # fmt: skip


def params(**changes):
    return AugmentationParams(**{**NOTHING, **changes})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(count=4, bands=2, size=8):
    """Chips whose every pixel is unlike any other."""
    return make_batch(torch.arange(count * bands * size * size, dtype=torch.float32).view(count, bands, size, size))


def torn(count=8, size=12, share=0.3):
    """Chips that say at each pixel whether it is valid: 1 where it is, 0 where not."""
    valid = torch.rand(count, 1, size, size, generator=seeded(5)) > share
    return make_batch(valid.float().expand(-1, 3, -1, -1).contiguous(), valid)


def test_with_everything_off_chips_stay_as_they_are():
    batch = torn()
    view = augment(batch, params(), None, seeded())
    assert torch.equal(view.x0, batch.x0)
    assert torch.equal(view.valid, batch.valid)


CHANGES = {
    "flip": {"flip": True},
    "rotate_90": {"rotate_90": True},
    "scale_factor": {"scale_factor": (0.5, 2.0)},
    "br_range": {"br_range": (-0.5, 0.5)},
    "contrast_range": {"contrast_range": (0.5, 2.0)},
}


@pytest.mark.parametrize("key", CHANGES)
def test_every_key_acts_alone(key):
    batch = numbered()
    assert not torch.equal(augment(batch, params(**CHANGES[key]), None, seeded()).x0, batch.x0)


def test_crop_strategy_acts():
    batch = numbered(count=16)
    random = augment(batch, params(), 4, seeded()).x0
    centre = augment(batch, params(crop_strategy="center"), 4, seeded()).x0
    assert not torch.equal(random, centre)
    assert torch.equal(centre, batch.x0[..., 2:6, 2:6])


@pytest.mark.parametrize("px", [3, 4, 7, 8])
def test_the_centre_crop_of_training_is_that_of_validation(px):
    batch = numbered()
    view = augment(batch, params(crop_strategy="center"), px, seeded())
    middle = centre_crop(batch, px)
    assert torch.equal(view.x0, middle.x0)
    assert torch.equal(view.valid, middle.valid)


@pytest.mark.parametrize("key", ["flip", "rotate_90", "crop", "all"])
def test_chip_and_mask_move_together(key):
    batch = torn()
    changes = {"flip": True, "rotate_90": True} if key == "all" else {key: True} if key != "crop" else {}
    for seed in range(5):
        view = augment(batch, params(**changes), 12 if key in ("flip", "rotate_90") else 7, seeded(seed))
        assert torch.equal(view.valid.expand_as(view.x0), view.x0 == 1)


@pytest.mark.parametrize("bounds", [(0.5, 0.9), (1.0, 1.0), (1.1, 2.0)])
def test_after_a_zoom_a_pixel_is_valid_only_where_all_that_it_is_made_of_is(bounds):
    batch = torn(count=64, share=0.04)
    view = augment(batch, params(scale_factor=bounds), 8, seeded())
    # Valid pixels are blends of ones alone, up to 1e-3 of an invalid one, which counts as none.
    assert view.valid.any()
    seen = view.x0[view.valid.expand_as(view.x0)]
    assert (seen - 1).abs().max() < 2e-3
    assert not view.valid.all()


def test_a_zoom_out_of_the_chip_is_invalid_there_and_only_there():
    batch = make_batch(torch.ones(4, 1, 16, 16))
    view = augment(batch, params(scale_factor=(0.5, 0.5)), None, seeded())
    # The chip's 16 px take up 8 in the middle.
    assert view.valid.flatten(1).sum(1).tolist() == [64] * 4
    assert view.valid[..., 4:12, 4:12].all()
    assert view.x0.isfinite().all()


@pytest.mark.parametrize("size", [8, 9])
def test_zoom_1_is_a_plain_crop(size):
    batch = make_batch(torch.rand(3, 2, size, size, generator=seeded()))
    whole = augment(batch, params(scale_factor=(1.0, 1.0)), None, seeded())
    torch.testing.assert_close(whole.x0, batch.x0, rtol=0, atol=1e-5)
    assert whole.valid.all()
    centre = augment(batch, params(scale_factor=(1.0, 1.0), crop_strategy="center"), size - 4, seeded())
    torch.testing.assert_close(centre.x0, centre_crop(batch, size - 4).x0, rtol=0, atol=1e-5)


def test_zoom_2_shows_twice_the_detail_of_the_middle():
    # A ramp stays a ramp, with half the slope.
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    view = augment(make_batch(ramp.contiguous()), params(scale_factor=(2.0, 2.0), crop_strategy="center"), 8, seeded())
    torch.testing.assert_close(view.x0[0, 0, 0, ::2].diff(), torch.ones(3))
    assert (view.x0[0, 0, 0].diff() - 0.5).abs().max() < 0.1
    assert view.x0.mean().item() == pytest.approx(7.5)


def test_zooms_stay_inside_the_chip_where_they_fit():
    batch = make_batch(torch.rand(64, 1, 32, 32, generator=seeded()))
    view = augment(batch, params(scale_factor=(0.8, 0.99)), 16, seeded())
    assert view.valid.float().mean() > 0.999


def test_zooms_spread_over_the_whole_chip():
    rows = torch.arange(32.0).view(1, 1, 32, 1).expand(256, 1, 32, 32)
    view = augment(make_batch(rows.contiguous()), params(scale_factor=(1.0, 1.0)), 8, seeded())
    tops = view.x0[:, 0, 0, 0]
    assert tops.min() < 1.5
    assert tops.max() > 22.5
    assert tops.mean().item() == pytest.approx(12, abs=1.5)


def test_the_same_generator_address_gives_the_same_view():
    batch = torn()
    everything = params(**{key: value for change in CHANGES.values() for key, value in change.items()})
    first, again = (augment(batch, everything, 7, seeded(3)) for _ in range(2))
    assert torch.equal(first.x0, again.x0)
    assert torch.equal(first.valid, again.valid)
    assert not torch.equal(first.x0, augment(batch, everything, 7, seeded(4)).x0)


def test_the_global_generator_plays_no_part():
    batch = numbered()
    everything = params(**{key: value for change in CHANGES.values() for key, value in change.items()})
    torch.manual_seed(1)
    first = augment(batch, everything, 4, seeded())
    torch.manual_seed(2)
    assert torch.equal(first.x0, augment(batch, everything, 4, seeded()).x0)


def _views(chip):
    turned = [torch.rot90(chip, turns, (-2, -1)) for turns in range(4)]
    return turned + [view.flip(-1) for view in turned]


@pytest.mark.parametrize(
    ("flip", "rotate", "group"), [(True, True, range(8)), (False, True, range(4)), (True, False, (0, 2, 4, 6))]
)
def test_flips_and_turns_are_exact_and_equally_frequent(flip, rotate, group):
    chip = torch.arange(2 * 9, dtype=torch.float32).view(2, 3, 3)
    batch = make_batch(chip.expand(800, -1, -1, -1).contiguous())
    views = augment(batch, params(flip=flip, rotate_90=rotate), None, seeded()).x0
    counts = [int((views == view).flatten(1).all(1).sum()) for view in _views(chip)]
    assert sum(counts) == 800, "an exact copy of one of the eight, all bands alike"
    assert [index for index, count in enumerate(counts) if count] == list(group)
    assert min(counts[index] for index in group) > 0.7 * 800 / len(group)


def test_random_crops_reach_every_place_equally():
    batch = make_batch(torch.arange(6.0).view(1, 1, 1, 6).expand(3000, 1, 6, 6).contiguous())
    left = augment(batch, params(), 4, seeded()).x0[:, 0, 0, 0]
    counts = torch.bincount(left.long(), minlength=3)
    assert counts.tolist() == pytest.approx([1000] * 3, abs=120)


def test_brightness_is_added_and_contrast_is_about_the_views_own_mean():
    batch = make_batch(torch.rand(64, 3, 6, 6, generator=seeded()) + 2)
    brighter = augment(batch, params(br_range=(0.1, 0.2)), None, seeded()).x0 - batch.x0
    assert brighter.min() >= 0.1 - 1e-6
    assert brighter.max() <= 0.2 + 1e-6
    assert brighter.flatten(1).std(1).max() < 1e-6, "one brightness per chip, all bands alike"
    assert brighter[:, 0, 0, 0].std() > 0.01
    view = augment(batch, params(contrast_range=(0.5, 0.5)), None, seeded()).x0
    torch.testing.assert_close(view.mean((2, 3)), batch.x0.mean((2, 3)))
    torch.testing.assert_close(view.std((2, 3)), 0.5 * batch.x0.std((2, 3)))


def test_radiometry_sees_and_changes_valid_pixels_only():
    batch = torn()
    strong = batch.x0 + torch.rand(batch.x0.shape, generator=seeded()) * 10
    section = params(br_range=(0.3, 0.4), contrast_range=(1.5, 2.0))
    view = augment(make_batch(strong, batch.valid), section, None, seeded())
    inside = batch.valid.expand_as(strong)
    assert torch.equal(view.x0[~inside], strong[~inside])
    junk = torch.where(batch.valid, strong, 1e4)
    other = augment(make_batch(junk, batch.valid), section, None, seeded())
    assert torch.equal(other.x0[inside], view.x0[inside])


def test_a_chip_without_valid_pixels_stays_finite():
    batch = make_batch(torch.rand(2, 1, 8, 8, generator=seeded()), torch.zeros(2, 1, 8, 8, dtype=torch.bool))
    everything = params(**{key: value for change in CHANGES.values() for key, value in change.items()})
    view = augment(batch, everything, 4, seeded())
    assert view.x0.isfinite().all()
    assert not view.valid.any()


def test_the_batch_that_came_in_is_left_alone():
    batch = numbered()
    before = batch.x0.clone()
    augment(batch, params(flip=True, rotate_90=True, br_range=(0.1, 0.2)), None, seeded())
    assert torch.equal(batch.x0, before)


@pytest.mark.parametrize("size", [*range(1, 30), 224])
def test_grid_origins_cover_evenly_with_the_fewest_windows(size):
    for px in range(1, size + 1):
        origins = grid_origins(size, px)
        assert len(origins) == -(-size // px)
        assert origins[0] == 0
        assert origins[-1] + px == size
        steps = [later - former for former, later in pairwise(origins)]
        assert all(0 < step <= px for step in steps)
        assert not steps or max(steps) - min(steps) <= 1


@pytest.mark.parametrize("px", [3, 4, 5, 8])
def test_grid_crops_cover_every_pixel_chip_by_chip_row_by_row(px):
    batch = numbered(count=3, size=8)
    batch = make_batch(batch.x0, torn(count=3, size=8).valid, {"label": torch.arange(3)})
    crops = grid_crops(batch, px)
    origins = grid_origins(8, px)
    per_chip = len(origins) ** 2
    assert crops.x0.shape == (3 * per_chip, 2, px, px)
    assert set(crops.x0.flatten().tolist()) == set(batch.x0.flatten().tolist())
    for index in range(len(crops)):
        chip, place = divmod(index, per_chip)
        top, left = origins[place // len(origins)], origins[place % len(origins)]
        window = (slice(None), slice(top, top + px), slice(left, left + px))
        assert torch.equal(crops.x0[index], batch.x0[chip][window])
        assert torch.equal(crops.valid[index], batch.valid[chip][window])
        assert crops.extra["label"][index] == chip
    assert crops.affine.offset.shape[0] == len(crops)
