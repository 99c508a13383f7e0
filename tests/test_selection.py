from __future__ import annotations

import numpy as np
import pytest
import rasterio
import torch

from earthprior import build
from earthprior.chips import selection
from earthprior.chips import selection as selection_module
from earthprior.chips.selection import (
    chip_key,
    grid_batches,
    linear_crops,
    middle_crops,
    read_in_order,
    select,
    spread,
    validation_batches,
)
from earthprior.errors import DataError
from earthprior.files import sha256_file
from support import stats_of

CPU = torch.device("cpu")
BANDS = ["red", "green", "blue", "nir"]


@pytest.fixture(scope="module")
def root(make_chips, tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    make_chips(root / "data")
    return root


@pytest.fixture
def stats(root):
    """As the stats stage leaves them, as far as selection and normalization read them."""
    chips = sorted((root / "data/chips").glob("*.tif"))
    raw = torch.stack([torch.from_numpy(rasterio.open(path).read().astype(np.float32)) for path in chips])
    digest = sha256_file(root / "data/catalog.csv")
    chips = {"train": 8, "validate": 4, "test": 0, "skipped_lines": []}
    return {**stats_of(raw, BANDS), "data": {"catalog_sha256": digest}, "chips": chips}


@pytest.fixture
def prepared(root, stats, make_params):
    params = make_params({"data.dir": "data"})
    return params, select(params, root, stats), build.normalizer(params, stats)


def test_chips_are_selected_by_usage_without_the_skipped_ones(root, stats, make_params):
    every = select(make_params(), root, stats)
    assert [len(rows) for rows in (every.train, every.validate, every.test)] == [8, 4, 0]
    skipped = [every.train[0].line, every.validate[1].line]
    fewer = select(make_params(), root, {**stats, "chips": {"skipped_lines": skipped}})
    assert fewer.train == every.train[1:]
    assert fewer.validate == [every.validate[0], *every.validate[2:]]


def test_a_catalog_that_changed_since_the_statistics_is_refused(root, stats, make_params):
    with pytest.raises(
        DataError, match=r"catalog\.csv changed .*\(as many chips per split as before\); run: dvc repro stats"
    ):
        select(make_params(), root, {**stats, "data": {"catalog_sha256": "0" * 64}})
    then = {**stats["chips"], "train": 1234, "test": 2}
    with pytest.raises(DataError, match=r"\(chips: train 1,234 -> 8, test 2 -> 0\)"):
        select(make_params(), root, {**stats, "data": {"catalog_sha256": "0" * 64}, "chips": then})


def test_chips_are_read_in_the_catalogs_order_whatever_the_batch_size(prepared):
    params, chosen, normalizer = prepared

    def read(size):
        found = list(read_in_order(params, chosen.folder, chosen.train, normalizer, CPU, size))
        return torch.cat([batch.x0 for batch, _ in found]), [row for _, rows in found for row in rows], found

    x0, rows, batches = read(3)
    assert [len(batch) for batch, _ in batches] == [3, 3, 2]
    assert rows == chosen.train
    again, _, _ = read(8)
    assert torch.equal(x0, again)
    assert x0.shape == (8, 4, 32, 32)


def test_batches_kept_are_not_overwritten_by_the_readers_next_ones(prepared):
    params, chosen, normalizer = prepared
    iterator = read_in_order(params, chosen.folder, chosen.train, normalizer, CPU, 1)
    kept = [batch for batch, _ in iterator]
    assert len({float(batch.x0.sum()) for batch in kept}) == 8


def test_validation_sees_the_same_crops_each_time_with_keys_of_their_own(prepared):
    params, chosen, normalizer = prepared
    first, again = (list(validation_batches(params, chosen, normalizer, CPU)) for _ in range(2))
    keys = [key for _, keys in first for key in keys]
    # Four chips have four crops each: fewer than VALIDATION_CROPS, so all of them are seen.
    assert sorted(keys) == sorted(f"{chip_key(row)}#{place}" for row in chosen.validate for place in range(4))
    for (batch, _), (repeated, _) in zip(first, again, strict=True):
        assert torch.equal(batch.x0, repeated.x0)
    grid = {
        key: crop
        for b, ks, _ in grid_batches(params, chosen.folder, chosen.validate, normalizer, CPU)
        for key, crop in zip(ks, b.x0, strict=True)
    }
    for batch, keys in first:
        for crop, key in zip(batch.x0, keys, strict=True):
            assert torch.equal(crop, grid[key])


def test_validation_takes_one_crop_a_chip_where_chips_are_many(prepared, monkeypatch):
    params, chosen, normalizer = prepared
    monkeypatch.setattr(selection, "VALIDATION_CROPS", 3)
    keys = [key for _, keys in validation_batches(params, chosen, normalizer, CPU) for key in keys]
    assert [key.split("#")[0] for key in keys] == [chip_key(row) for row in chosen.validate]


def test_the_grid_covers_each_chip_with_a_key_per_crop(prepared):
    params, chosen, normalizer = prepared
    found = list(grid_batches(params, chosen.folder, chosen.validate, normalizer, CPU))
    assert len(found) == 4
    crops, keys, rows = found[1]
    assert crops.x0.shape == (4, 4, 16, 16)
    assert keys == [f"{chip_key(chosen.validate[1])}#{index}" for index in range(4)]
    assert rows == [chosen.validate[1]]
    whole, _ = list(read_in_order(params, chosen.folder, chosen.validate, normalizer, CPU, 1))[1]
    assert torch.equal(crops.x0[3], whole.x0[0, :, 16:, 16:])


def test_the_middles_of_some_chips_are_spread_over_the_list(prepared):
    params, chosen, normalizer = prepared
    crops, keys = middle_crops(params, chosen.folder, chosen.train, 3, normalizer, CPU)
    rows = spread(chosen.train, 3)
    assert rows != chosen.train[:3]
    assert keys == [chip_key(row) for row in rows]
    assert crops.x0.shape == (3, 4, 16, 16)
    whole, _ = next(read_in_order(params, chosen.folder, [rows[1]], normalizer, CPU, 1))
    assert torch.equal(crops.x0[1], whole.x0[0, :, 8:24, 8:24])
    assert torch.equal(crops.affine.scale[1], whole.affine.scale[0])


def test_a_chip_of_several_files_is_keyed_by_all_of_them(prepared):
    _, chosen, _ = prepared
    row = chosen.train[0]
    assert chip_key(row) == "chips/chip_000.tif"
    assert chip_key(type(row)(2, "train", ("a.tif", "b.tif"), {})) == "a.tif|b.tif"


def fitted_on(params, chosen, normalizer):
    crops, small = linear_crops(params, chosen, normalizer)
    return torch.cat([batch.x0 for batch in crops]), small


def test_the_linear_filter_gets_enough_crops_the_same_for_every_seed(prepared, root, stats, make_params):
    params, chosen, normalizer = prepared
    crops, small = fitted_on(params, chosen, normalizer)
    assert small
    assert crops.shape == (512, 4, 16, 16)
    assert len(torch.unique(crops[:, 0, 0, 0] * 1000 + crops[:, 0, 5, 7])) > 300, "crops of many places"
    other = make_params({"seed": 9, "operation.readers": 1, "batch_size": 2})
    assert torch.equal(fitted_on(other, chosen, normalizer)[0], crops)


def test_the_linear_filter_sees_no_augmentation(prepared, make_params):
    _, chosen, normalizer = prepared
    off = {"augmentation.flip": False, "augmentation.rotation_degree": None, "augmentation.br_range": None}
    assert torch.equal(
        fitted_on(make_params(off), chosen, normalizer)[0], fitted_on(make_params(), chosen, normalizer)[0]
    )


def test_whole_chips_are_taken_once(prepared, make_params):
    _, chosen, normalizer = prepared
    crops, _ = fitted_on(make_params({"data.crop_px": None}), chosen, normalizer)
    assert crops.shape == (8, 4, 32, 32)


def test_with_many_chips_each_is_taken_once_and_spectra_are_not_averaged(prepared, monkeypatch):
    params, chosen, normalizer = prepared
    monkeypatch.setattr(selection_module, "LINEAR_CROPS", 6)
    monkeypatch.setattr(selection_module, "LINEAR_CHIPS", 5)
    crops, small = fitted_on(params, chosen, normalizer)
    assert len(crops) == 10, "5 chips, 2 visits each to reach 6 crops"
    assert not small
