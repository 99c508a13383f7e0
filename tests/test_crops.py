from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from earthprior.chips.crops import grid_crops, grid_origins
from support import make_batch


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


@pytest.mark.parametrize("overlap", [1, 3, 6])
def test_grid_origins_overlap_as_asked(overlap):
    for size in range(1, 60):
        origins = grid_origins(size, 7, overlap)
        assert origins[0] == 0
        assert origins[-1] + 7 == max(size, 7)
        assert all(0 < later - former <= 7 - overlap for former, later in pairwise(origins))


@pytest.mark.parametrize("px", [3, 4, 5, 8])
def test_grid_crops_cover_every_pixel_chip_by_chip_row_by_row(px):
    x0 = torch.arange(3 * 2 * 64.0).view(3, 2, 8, 8)
    valid = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(5)) > 0.3
    batch = make_batch(x0, valid, {"label": torch.arange(3)})
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
