"""augment: what holds for every option, alone and together."""

from __future__ import annotations

import pytest
import torch

from earthprior.chips.augment import augment
from earthprior.chips.crops import centre_crop
from earthprior.chips.selection import AS_THEY_ARE
from earthprior.params import AugmentationParams
from support import make_batch

CHANGES = {
    "flip": True,
    "rotation_degree": (-90.0, 0.0, 90.0),
    "scale_factor": (0.5, 2.0),
    "patch_shift_px": 3,
    "br_range": (-0.5, 0.5),
    "contrast_range": (0.5, 2.0),
    "bshift_gamma_range": (0.5, 2.0),
    "patch_gamma_range": (0.5, 2.0),
    "sigma_range": (0.03, 0.07),
}


def params(**changes):
    return AugmentationParams(**{**AS_THEY_ARE.model_dump(), **changes})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(count=4, bands=2, size=8):
    """Chips whose every pixel is unlike any other."""
    return make_batch(torch.arange(count * bands * size * size, dtype=torch.float32).view(count, bands, size, size))


def torn(count=8, size=12, share=0.3):
    """Chips that say at each pixel whether it is valid: 1 where it is, 0 where not."""
    valid = torch.rand(count, 1, size, size, generator=seeded(5)) > share
    return make_batch(valid.float().expand(-1, 3, -1, -1).contiguous(), valid)


def test_every_option_is_tried_here():
    assert set(CHANGES) == set(AugmentationParams.model_fields) - {"crop_strategy"}


def test_with_everything_off_chips_stay_as_they_are():
    batch = torn()
    view = augment(batch, params(), None, seeded())
    assert torch.equal(view.x0, batch.x0)
    assert torch.equal(view.valid, batch.valid)


@pytest.mark.parametrize("key", CHANGES)
def test_every_key_acts_alone(key):
    batch = numbered()
    assert not torch.equal(augment(batch, params(**{key: CHANGES[key]}), None, seeded()).x0, batch.x0)


@pytest.mark.parametrize("key", CHANGES)
def test_an_option_does_not_disturb_the_draws_of_others(key):
    """Places and brightness are as they are without it."""
    batch = make_batch(torch.zeros(16, 1, 24, 24))
    others = {"patch_shift_px": 9, "br_range": (-0.5, 0.5)}
    plain = augment(batch, params(**others), None, seeded())
    view = augment(batch, params(**{key: CHANGES[key], **others}), None, seeded())
    # All pixels of a view are alike but for the noise, of at most 0.07.
    assert [float(one[mask].mean()) for one, mask in zip(view.x0, view.valid, strict=True)] == pytest.approx(
        [float(one[mask].mean()) for one, mask in zip(plain.x0, plain.valid, strict=True)], abs=0.015
    )
    if key not in ("flip", "rotation_degree", "scale_factor"):
        assert torch.equal(view.valid, plain.valid)


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


def test_the_same_generator_address_gives_the_same_view():
    batch = torn()
    everything = params(**CHANGES)
    first, again = (augment(batch, everything, 7, seeded(3)) for _ in range(2))
    assert torch.equal(first.x0, again.x0)
    assert torch.equal(first.valid, again.valid)
    assert not torch.equal(first.x0, augment(batch, everything, 7, seeded(4)).x0)


def test_the_global_generator_plays_no_part():
    batch = numbered()
    torch.manual_seed(1)
    first = augment(batch, params(**CHANGES), 4, seeded())
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first.x0, augment(batch, params(**CHANGES), 4, seeded()).x0)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_chip_without_valid_pixels_stays_finite():
    batch = make_batch(torch.rand(2, 1, 8, 8, generator=seeded()), torch.zeros(2, 1, 8, 8, dtype=torch.bool))
    view = augment(batch, params(**CHANGES), 4, seeded())
    assert view.x0.isfinite().all()
    assert not view.valid.any()


def test_the_batch_that_came_in_is_left_alone():
    batch = torn()
    x0, valid = batch.x0.clone(), batch.valid.clone()
    for key in CHANGES:
        augment(batch, params(**{key: CHANGES[key]}), None, seeded())
    assert torch.equal(batch.x0, x0)
    assert torch.equal(batch.valid, valid)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_it_stays_there():
    batch = torn()
    where = torch.device("cuda")
    there = make_batch(batch.x0.to(where), batch.valid.to(where))
    for changes in (CHANGES, {"flip": True, "rotation_degree": (0.0, 90.0), "patch_shift_px": 2}):
        view = augment(there, params(**changes), 7, torch.Generator(where).manual_seed(0))
        assert view.x0.device.type == view.valid.device.type == "cuda"
        assert view.x0.isfinite().all()
